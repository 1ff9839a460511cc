"""Every network goes through the same suite; a new one in `steph.mil.NETWORKS` cannot dodge it."""

import pytest
import torch

from steph import Refused
from steph.data import RaggedBatch
from steph.data.manifest import Network
from steph.mil import NETWORKS
from steph.mil.state import load_into, load_state, save_state, state_fingerprint, state_of

DIMENSIONS = Network(dim_emb=16, dim_attn=8, n_bins=4)


@pytest.fixture(params=sorted(NETWORKS))
def network(request, float64):
    torch.manual_seed(0)
    return NETWORKS[request.param](6, DIMENSIONS).eval()


@pytest.fixture
def bags():
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(n, 6, generator=generator, dtype=torch.float64) for n in (1, 5, 12)]


def test_shapes(network, bags):
    assert network(bags).shape == (3, 4)
    assert network.encode(bags).shape == (3, network.head.in_features)
    torch.testing.assert_close(network.head(network.encode(bags)), network(bags))


def test_packed_equals_one_by_one(network, bags):
    alone = torch.cat([network([bag]) for bag in bags])
    torch.testing.assert_close(network(RaggedBatch.from_bags(bags)), alone, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(network([bag.unsqueeze(0) for bag in bags]), alone, rtol=1e-12, atol=1e-14)


def test_order_of_patches_does_not_matter(network, bags):
    turned = [bag.flip(0) for bag in bags]
    torch.testing.assert_close(network(turned), network(bags), rtol=1e-10, atol=1e-12)


def test_attention_sums_to_one(network, bags):
    for bag in bags:
        attention = network.attention(bag)
        assert attention.shape == (len(bag),) and attention.min() >= 0
        assert attention.sum().item() == pytest.approx(1)


def test_gradients_are_finite_and_everywhere(network, bags):
    network.train()(bags).square().sum().backward()
    for name, parameter in network.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name


def test_state_round_trip_is_exact(network, bags, tmp_path):
    state = state_of(network, origin="abc")
    save_state(state, tmp_path / "m.safetensors")
    found = load_state(tmp_path / "m.safetensors")
    assert found.origin == "abc" and state_fingerprint(found) == state_fingerprint(state)
    expected = network(bags)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.zero_()
    load_into(network, found)
    assert torch.equal(network(bags), expected)


def test_a_state_that_does_not_fit_is_refused(network):
    state = state_of(network)
    with pytest.raises(Refused, match=r"1 parameters differ, first head\.bias"):
        load_into(network, {k: v for k, v in state.items() if k != "head.bias"})


@pytest.mark.parametrize("content", [b"", b"not safetensors at all"])
def test_a_damaged_state_is_named(tmp_path, content):
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    with pytest.raises(Refused, match="not a readable safetensors file"):
        load_state(path)
