"""steph.mil.products: a layer is the same layer whichever library computes it."""

import pytest
import torch

from steph.mil import products
from steph.mil.products import ENOUGH, linear

PLAIN = {"none": lambda y: y, "relu": torch.relu, "tanh": torch.tanh, "sigmoid": torch.sigmoid}


def layer(n, dtype=torch.float32):
    generator = torch.Generator().manual_seed(n)
    x, weight, bias = (torch.randn(*shape, generator=generator) for shape in ((n, 48), (40, 48), (40,)))
    return x.to(dtype), weight.to(dtype), bias.to(dtype)


def exact(x, weight, bias, activation):
    return PLAIN[activation](torch.addmm(bias.double(), x.double(), weight.double().T))


@pytest.mark.parametrize("activation", PLAIN)
@pytest.mark.parametrize("n", [1, ENOUGH - 1, ENOUGH, 3 * ENOUGH + 5])
@pytest.mark.parametrize("fused", [True, False])
def test_a_layer_in_single_precision(activation, n, fused, monkeypatch):
    monkeypatch.setattr(products, "_FUSED", fused and products._FUSED)
    given = layer(n)
    found = linear(*given, activation)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), exact(*given, activation), rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.bfloat16, 0.1)])
def test_other_precisions_stay_what_they_are(dtype, tolerance):
    given = layer(2 * ENOUGH, dtype)
    found = linear(*given, "relu")
    assert found.dtype == dtype
    torch.testing.assert_close(found.double(), exact(*given, "relu"), rtol=tolerance, atol=tolerance)


def test_patches_that_do_not_lie_in_one_piece(monkeypatch):
    """They go PyTorch's own way: oneDNN would take a hundred times as long to sort them."""
    x, weight, bias = layer(2 * ENOUGH)
    assert products._fused(x, weight) == products._FUSED
    wide = torch.cat([x, x], dim=1)[:, :48]
    assert not products._fused(wide, weight) and not products._fused(x, weight.T.contiguous().T)
    assert not products._fused(x[: ENOUGH - 1], weight) and not products._fused(x.double(), weight.double())
    torch.testing.assert_close(linear(wide, weight, bias), linear(x, weight, bias), rtol=1e-5, atol=2e-5)


def test_the_same_layer_twice_is_the_same_to_the_last_bit():
    given = layer(2 * ENOUGH)
    assert torch.equal(linear(*given, "tanh"), linear(*given, "tanh"))
