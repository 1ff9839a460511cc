"""Every network goes through the same suite; a new one in `steph.mil.NETWORKS` cannot dodge it."""

import subprocess
import sys

import pytest
import torch

from steph import Refused
from steph.data import RaggedBatch
from steph.data.manifest import Network
from steph.merging import MergedEncoder, task_vector
from steph.merging.steph import STEPH
from steph.mil import NETWORKS
from steph.mil.state import load_into, load_state, save_state, state_fingerprint, state_of

DIMENSIONS = Network(dim_emb=16, dim_attn=8, n_bins=4)
SIZES = (1, 5, 12, 40, 14, 6, 90, 85)
"""Some share a shape (squares, regions), some do not; order is no sorting."""


@pytest.fixture(params=sorted(NETWORKS))
def name(request):
    return request.param


@pytest.fixture
def network(name, float64):
    torch.manual_seed(0)
    return NETWORKS[name](6, DIMENSIONS).eval()


@pytest.fixture
def bags():
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(n, 6, generator=generator, dtype=torch.float64) for n in SIZES]


def packed(network, bags, order=None):
    """The bags as the network wants them: with coordinates, of a 10 wide grid, where it asks for them. order: what was
    done to the patches of each bag."""
    order = order or (lambda patches: patches)
    grid = [torch.stack([torch.arange(len(b)) % 10, torch.arange(len(b)) // 10], dim=1) * 256 for b in bags]
    wanted = getattr(network, "needs_coords", False)
    flat = [bag.squeeze(0) if bag.ndim == 3 else bag for bag in bags]
    return RaggedBatch.from_bags(
        [order(bag).reshape(given.shape) for bag, given in zip(flat, bags, strict=True)],
        [order(coords) for coords in grid] if wanted else None,
    )


def test_shapes(network, bags):
    batch = packed(network, bags)
    assert network(batch).shape == (len(SIZES), 4)
    assert isinstance(network.head, torch.nn.Linear)
    assert network.encode(batch).shape == (len(SIZES), network.head.in_features)
    torch.testing.assert_close(network.head(network.encode(batch)), network(batch))


def test_packed_equals_one_by_one(network, bags):
    alone = torch.cat([network(packed(network, [bag])) for bag in bags])
    torch.testing.assert_close(network(packed(network, bags)), alone, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("sizes", [SIZES, (6, 40, 9, 23, 12, 16, 17, 31), (64, 65, 1, 64, 2)])
def test_batches_and_bags_one_by_one_have_the_same_logits_and_gradients(network, sizes):
    """What bags share on their way (padding, masks, groups) leaves no trace."""
    torch.manual_seed(2)
    bags, weights = [torch.randn(n, 6) for n in sizes], torch.randn(len(sizes), 4)

    def gradients():
        found = {name: p.grad for name, p in network.named_parameters()}
        network.zero_grad()
        return found

    together = network(packed(network, bags))
    (together * weights).sum().backward()
    batched = gradients()
    alone = torch.cat([network(packed(network, [bag])) for bag in bags])
    (alone * weights).sum().backward()
    torch.testing.assert_close(together, alone, rtol=1e-10, atol=1e-12)
    for name, expected in gradients().items():
        torch.testing.assert_close(batched[name], expected, rtol=1e-10, atol=1e-12, msg=lambda m, n=name: f"{n}: {m}")


def test_half_precision_is_the_same_network(name):
    torch.manual_seed(0)
    network = NETWORKS[name](6, DIMENSIONS).eval()
    batch = packed(network, [torch.randn(n, 6) for n in SIZES])
    half = network(batch.to("cpu", torch.bfloat16))
    half.square().sum().backward()
    single = network(batch)
    assert half.dtype == torch.float32
    assert (half - single).abs().max() < 0.05 * (single.max() - single.min())
    assert all(p.grad.isfinite().all() for p in network.parameters())


def test_a_leading_axis_of_one_changes_nothing(network, bags):
    if getattr(network, "needs_coords", False):
        batch = RaggedBatch.from_bags([bag.unsqueeze(0) for bag in bags], packed(network, bags).coords.split(SIZES))
        assert torch.equal(network(batch), network(packed(network, bags)))
    else:
        assert torch.equal(network([bag.unsqueeze(0) for bag in bags]), network(bags))
        assert torch.equal(network(bags), network(packed(network, bags)))


def test_order_of_patches_matters_only_where_it_is_said(network, bags):
    straight, turned = network(packed(network, bags)), network(packed(network, bags, lambda patches: patches.flip(0)))
    if getattr(network, "order_invariant", True):
        torch.testing.assert_close(turned, straight, rtol=1e-10, atol=1e-12)
    else:
        assert (turned - straight)[-1].abs().max() > 1e-6, "it promises less than it keeps"


def test_attention_sums_to_one(network, bags):
    for bag in bags:
        attention = network.attention(packed(network, [bag]) if getattr(network, "needs_coords", False) else bag)
        assert attention.shape == (len(bag),) and attention.min() >= 0
        assert attention.sum().item() == pytest.approx(1)


@pytest.mark.parametrize("sizes", [SIZES, (1,), (3, 64, 65)])
def test_gradients_are_finite_and_everywhere(network, sizes):
    bags = [torch.randn(n, 6, dtype=torch.float64) for n in sizes]
    network.train()(packed(network, bags)).square().sum().backward()
    for name, parameter in network.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name


def test_gradients_are_those_of_finite_differences(network, bags):
    network.zero_grad()
    batch = packed(network, bags[:3])
    weights = torch.linspace(-1, 1, 12, dtype=torch.float64).view(3, 4)
    (network(batch) * weights).sum().backward()
    torch.manual_seed(5)
    directions = {name: torch.randn_like(p) for name, p in network.named_parameters()}
    expected = sum((p.grad * directions[name]).sum() for name, p in network.named_parameters()).item()
    step, values = 1e-6, []
    for sign in (1, -2):
        with torch.no_grad():
            for name, parameter in network.named_parameters():
                parameter += sign * step * directions[name]
            values.append((network(batch) * weights).sum().item())
    assert (values[0] - values[1]) / (2 * step) == pytest.approx(expected, rel=1e-5, abs=1e-7)


def test_evaluation_is_deterministic_and_training_drops(name, network, bags):
    batch = packed(network, bags)
    assert torch.equal(network(batch), network(batch))
    differs = not torch.equal(network.train()(batch), network(batch))
    assert differs == (name != "ilra"), "ILRA alone has no dropout"
    still = NETWORKS[name](6, DIMENSIONS.model_copy(update={"dropout": 0.0})).train()
    assert torch.equal(still(batch), still(batch)), "network.dropout = 0 must mean none"


def test_one_seed_gives_one_network(name):
    states = []
    for _ in range(2):
        torch.manual_seed(3)
        states.append(state_fingerprint(state_of(NETWORKS[name](6, DIMENSIONS))))
    assert states[0] == states[1]


def test_state_round_trip_is_exact(network, bags, tmp_path):
    state = state_of(network, origin="abc")
    save_state(state, tmp_path / "m.safetensors")
    found = load_state(tmp_path / "m.safetensors")
    assert found.origin == "abc" and state_fingerprint(found) == state_fingerprint(state)
    batch = packed(network, bags)
    expected = network(batch)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.zero_()
    load_into(network, found)
    assert torch.equal(network(batch), expected)


def test_a_state_that_does_not_fit_is_refused(network):
    state = state_of(network)
    with pytest.raises(Refused, match=r"1 parameters differ, first head\.bias"):
        load_into(network, {k: v for k, v in state.items() if k != "head.bias"})


# ------------------------------------------------------------------------------------------------ merging


@pytest.fixture
def states(name, network):
    """M_0 and three models of other seeds."""
    found = []
    for seed in range(3):
        torch.manual_seed(seed + 1)
        found.append(state_of(NETWORKS[name](6, DIMENSIONS)))
    return state_of(network), found


def test_merging_nothing_gives_the_network_back(name, network, bags, states):
    null, others = states
    merged = MergedEncoder(NETWORKS[name](6, DIMENSIONS).eval(), null, [task_vector(s, null) for s in others])
    batch = packed(network, bags)
    zero = torch.zeros(len(SIZES), 3, dtype=torch.float64)
    torch.testing.assert_close(merged(zero, batch), network.encode(batch), rtol=1e-11, atol=1e-13)


def test_merging_one_whole_vector_gives_its_model(name, network, bags, states):
    null, others = states
    merged = MergedEncoder(NETWORKS[name](6, DIMENSIONS).eval(), null, [task_vector(s, null) for s in others])
    batch = packed(network, bags)
    found = merged(torch.tensor([[0.0, 1.0, 0.0]] * len(SIZES), dtype=torch.float64), batch)
    load_into(network, others[1])
    torch.testing.assert_close(found, network.encode(batch), rtol=1e-9, atol=1e-11)


def test_steph_trains_on_any_network(name, network, bags, states):
    null, others = states
    pool = {"a": others[1], "b": others[2]}
    model = STEPH(null, others[0], pool, top_k=1, dim_hidden=5, network=NETWORKS[name](6, DIMENSIONS))
    batch = packed(network, bags)
    (model(batch).square().sum() + model.auxiliary_loss()).backward()
    trained = [p for p in model.parameters() if p.requires_grad]
    assert trained and all(p.grad is not None and p.grad.isfinite().all() for p in trained)


# ------------------------------------------------------------------------------------------------ files, packages


@pytest.mark.parametrize("content", [b"", b"not safetensors at all"])
def test_a_damaged_state_is_named(tmp_path, content):
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    with pytest.raises(Refused, match="not a readable safetensors file"):
        load_state(path)


def test_a_package_that_is_not_there_is_named(monkeypatch):
    for module in [name for name in sys.modules if name.split(".")[0] == "torch_geometric"] or ["torch_geometric"]:
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(Refused, match="needs the package torch_geometric: pip install"):
        NETWORKS["patch_gcn"](6, DIMENSIONS)


def test_importing_networks_imports_no_package_of_one_network():
    code = "import sys, steph.mil; print(sorted({'torch_geometric', 'scipy'} & set(sys.modules)))"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"


@pytest.mark.parametrize("network", ["transmil", "ilra", "r2t_mil"])
def test_a_width_that_heads_do_not_divide_is_refused(network):
    with pytest.raises(Refused, match=r"8 heads.*network\.dim_emb.* no multiple"):
        NETWORKS[network](6, Network(dim_emb=20))
