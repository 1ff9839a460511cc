"""Attention pooling by hand is autograd's, in any precision, in chunks, whatever is saved for the way back."""

import pytest
import torch
from torch.nn import functional as F

from steph.data import RaggedBatch
from steph.mil import ABMIL
from steph.mil import gated_attention as module
from steph.mil.gated_attention import ENOUGH, NAMES, attend, attend_with_gradient, dropout_mask, linear, to_save

SIZES = (5, 1, 300, 17, 40)


def plain(parameters, batch, mask=None):
    """The same, as a textbook writes it; mask: that of the dropout, with its scale."""
    p = parameters
    embedded = F.relu(F.linear(batch.features, p["embed.weight"], p["embed.bias"]))
    tanh = torch.tanh(F.linear(embedded, p["gate_tanh.weight"], p["gate_tanh.bias"]))
    gated = tanh * torch.sigmoid(F.linear(embedded, p["gate_sigmoid.weight"], p["gate_sigmoid.bias"]))
    gated = gated if mask is None else gated * mask
    scores = F.linear(gated, p["score.weight"], p["score.bias"]).squeeze(1)
    return batch.softmax(scores) @ embedded


@pytest.fixture
def problem(float64):
    torch.manual_seed(0)
    network = ABMIL(24, 16, 12, 8)
    batch = RaggedBatch.from_bags([torch.randn(n, 24) for n in SIZES])
    return {name: network.get_parameter(name) for name in NAMES}, batch, torch.randn(len(SIZES), 16)


def gradients(features, weighting, parameters):
    return torch.autograd.grad((features * weighting).sum(), list(parameters.values()))


@pytest.mark.parametrize("dropout", [0.0, 0.25])
@pytest.mark.parametrize(
    ("chunk", "policy"),
    [(2048, (10**6, 10**6)), (50, (10**6, 10**6)), (64, (10, 10**6)), (64, (10, 20))],
    ids=["whole", "chunks", "gates twice", "all twice"],
)
def test_features_and_gradients_are_autograds(problem, monkeypatch, chunk, policy, dropout):
    parameters, batch, weighting = problem
    monkeypatch.setattr(module, "CHUNKS", {"cpu": chunk})
    monkeypatch.setattr(module, "SAVE_UP_TO", {"cpu": policy})
    torch.manual_seed(3)
    found = attend_with_gradient(parameters, batch, dropout)
    torch.manual_seed(3)
    keep = (1 - dropout) ** 2
    mask = dropout_mask((sum(SIZES), 12), keep, batch.features.device) / keep if dropout else None
    expected = plain(parameters, batch, mask)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-13)
    ours, theirs = (gradients(features, weighting, parameters) for features in (found, expected))
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)


def test_half_precision_is_near(problem):
    parameters, batch, weighting = problem
    single = {name: p.detach().float().requires_grad_() for name, p in parameters.items()}
    half = RaggedBatch(batch.features.bfloat16(), batch.offsets)
    found, expected = attend_with_gradient(single, half, 0.0), plain(parameters, batch)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), expected, rtol=0.03, atol=0.03)
    for mine, theirs in zip(
        gradients(found, weighting.float(), single), gradients(expected, weighting, parameters), strict=True
    ):
        assert mine.dtype == torch.float32
        assert (mine.double() - theirs).norm() <= 0.05 * theirs.norm() + 1e-3


def test_nothing_is_saved_where_there_is_no_way_back(problem):
    parameters, batch, _ = problem
    saved = attend(parameters, batch, 0.0)[1]
    assert not saved.embedded and not saved.gates
    with torch.no_grad():
        assert not attend_with_gradient(parameters, batch, 0.0).requires_grad


def test_the_larger_a_batch_the_less_is_saved():
    cpu = torch.device("cpu")
    assert [to_save(n, cpu) for n in (1, 65_536, 65_537, 262_144, 262_145)] == [
        "everything", "everything", "embedding", "embedding", "scores"
    ]  # fmt: skip
    assert to_save(1, cpu, recompute=True) == "scores"


@pytest.mark.parametrize("keep", [0.5625, 0.1, 0.9])
def test_masks_leave_as_many_as_they_should(keep):
    torch.manual_seed(0)
    found = dropout_mask((1000, 1000), keep, torch.device("cpu"))
    assert found.shape == (1000, 1000) and found.float().mean().item() == pytest.approx(keep, abs=2e-3)
    # No pattern from drawing four at a time.
    lanes = found.view(-1, 4).float()
    correlation = torch.corrcoef(lanes.T)
    assert (correlation - torch.eye(4)).abs().max() < 0.01


PLAIN = {"relu": torch.relu, "tanh": torch.tanh, "sigmoid": torch.sigmoid}


@pytest.mark.parametrize("activation", PLAIN)
@pytest.mark.parametrize("n", [1, ENOUGH - 1, ENOUGH, 3 * ENOUGH + 5])
@pytest.mark.parametrize(
    ("dtype", "fused", "tolerance"),
    [(torch.float32, True, 2e-5), (torch.float32, False, 2e-5), (torch.float64, 1, 1e-12), (torch.bfloat16, 1, 0.1)],
)
def test_a_layer_is_the_same_whichever_library_computes_it(activation, n, dtype, fused, tolerance, monkeypatch):
    """To the last bit when it is computed again, and where patches do not lie in one piece."""
    monkeypatch.setattr(module, "_FUSED", fused and module._FUSED)
    x, weight, bias = (torch.randn(*shape).to(dtype) for shape in ((n, 48), (40, 48), (40,)))
    found = linear(x, weight, bias, activation)
    assert found.dtype == dtype and torch.equal(found, linear(x, weight, bias, activation))
    expected = PLAIN[activation](torch.addmm(bias.double(), x.double(), weight.double().T))
    torch.testing.assert_close(found.double(), expected, rtol=tolerance, atol=tolerance)
    strided = linear(torch.cat([x, x], dim=1)[:, :48], weight, bias, activation)
    torch.testing.assert_close(strided, found, rtol=tolerance, atol=tolerance)
