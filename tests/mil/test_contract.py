"""The contracts of `steph.mil.base`, for every network of the registry and every class of model: a new one is found
here, and cannot dodge them."""

import inspect
import json
import pkgutil
import subprocess
import sys
from copy import deepcopy
from functools import partial
from importlib import import_module

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import steph.merging
import steph.mil
from steph import Refused
from steph.data import RaggedBatch
from steph.data.manifest import Network
from steph.deploy.model_folder import build, fill, tensors_of
from steph.merging import STEPH, Surgery
from steph.mil import ABMIL, NETWORKS, ROUPKT, FineTuned, MeanMIL, Model, network_needing_coords, new_network
from steph.mil.cox import CoxMean
from steph.mil.gated_attention import layer_by_layer
from steph.mil.state import load_into, load_state, save_state, state_fingerprint, state_of

DIMENSIONS = Network(dim_emb=16, dim_attn=8, n_bins=4)
SIZES = (1, 5, 12, 40, 14, 6, 90, 85)
"""Some share a shape (squares, regions), some do not; order is no sorting."""


def network(name="abmil", seed=0):
    torch.manual_seed(seed)
    return new_network(name, 6, DIMENSIONS)


def steph_on(name="abmil", **options):
    null, target, *sources = (state_of(network(name, seed)) for seed in range(4))
    pool = dict(zip("ab", sources, strict=True))
    return STEPH(null, target, pool, network=network(name), **{"top_k": 1, "dim_hidden": 5, **options})


def roupkt():
    return ROUPKT(network(), {name: network(seed=i) for i, name in enumerate(("own", "a", "b"))}, top_k=3)


def surgery(merged, target):
    model = Surgery(merged, target)
    torch.nn.init.normal_(model.adapter.up.weight)  # as trained: it starts as the identity
    return model


def cox():
    torch.manual_seed(0)
    model = CoxMean(6, 4)
    for p in model.parameters():
        torch.nn.init.normal_(p, -1)
    return model


fixed_steph = partial(steph_on, weight="parameter", mix="parameter", top_k=2)
MAKERS = {
    **{name: partial(network, name) for name in NETWORKS},
    **{f"finetuned_{name}": lambda name=name: FineTuned(network(name), fresh_head=False) for name in NETWORKS},
    **{f"steph_{name}": partial(steph_on, name) for name in NETWORKS},
    "steph_fixed": fixed_steph,
    "steph_merged_head": partial(steph_on, merge_head=True),
    "cox": cox,
    "roupkt": roupkt,
    "surgery": lambda: surgery(steph_on("patch_gcn"), network("patch_gcn")),
    "surgery_fixed": lambda: surgery(fixed_steph(), network()),
}
"""How models of every class are made, always the same."""


def without_a_maker():
    """Names of the library's classes of models that none of `MAKERS` makes."""
    for package in (steph.mil, steph.merging):
        for module in pkgutil.iter_modules(package.__path__):
            import_module(f"{package.__name__}.{module.name}")
    ours = (kind for kind in Model.KINDS.values() if kind.__module__.startswith(("steph.mil", "steph.merging")))
    made = {type(make()) for make in MAKERS.values()}
    return {kind.__name__ for kind in ours if not inspect.isabstract(kind) and kind not in made}


def test_every_class_of_model_is_taken_through_the_contract():
    assert not without_a_maker(), "a new class of model: say in MAKERS of tests/mil/test_contract.py how one is made"
    type("BrandNew", (ABMIL,), {"__module__": "steph.mil.brand_new"})
    try:
        assert without_a_maker() == {"BrandNew"}
    finally:
        del Model.KINDS["brandnew"]


@pytest.fixture(params=MAKERS)
def model(request, float64):
    return MAKERS[request.param]().eval()


@pytest.fixture(params=sorted(NETWORKS))
def name(request):
    return request.param


@pytest.fixture
def net(name, float64):
    return network(name).eval()


@pytest.fixture
def bags():
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(n, 6, generator=generator, dtype=torch.float64) for n in SIZES]


def packed(model, bags, order=lambda patches: patches):
    """The bags as a model takes them: with coordinates, of a 10 wide grid, where it asks for them. order: what was
    done to the patches of each bag."""
    grid = [torch.stack([torch.arange(len(b)) % 10, torch.arange(len(b)) // 10], dim=1) * 256 for b in bags]
    return RaggedBatch.from_bags(
        [order(bag) for bag in bags],
        [order(coords) for coords in grid] if network_needing_coords(model) else None,
    )


# ------------------------------------------------------------------------------------------------ every model


def passed(model, bags):
    """One pass as in training: with the frozen features, where the model has them."""
    batch = packed(model, bags)
    return model.forward_pass(batch, model.frozen_features(batch) if model.has_frozen_features else None)


def test_a_pass_gives_logits_and_what_the_model_says_that_it_gives(model, bags):
    batch = packed(model, bags)
    logits, loss, monitored = passed(model, bags)
    assert logits.shape == (len(SIZES), 4) and torch.equal(model(batch), logits)
    assert torch.equal(model(batch), model.forward_pass(batch).logits)
    assert len(model.monitored) == (0 if monitored is None else len(monitored))
    assert monitored is None or not monitored.requires_grad
    trained = [p for p in model.parameters() if p.requires_grad]
    assert loss is not None or model.supervised
    if loss is not None:
        assert loss.shape == () and any(g is not None for g in torch.autograd.grad(loss, trained, allow_unused=True))


def test_frozen_features_are_those_of_each_bag_and_get_no_gradient(model, bags):
    batch = packed(model, bags)
    if not model.has_frozen_features:
        assert model.reads_patches
        with pytest.raises(Refused, match="does not define `frozen_features`"):
            model.frozen_features(batch)
        return
    frozen = model.train().frozen_features(batch)
    assert not frozen.requires_grad and len(frozen) == len(bags)
    alone = torch.cat([model.frozen_features(packed(model, [bag])) for bag in bags])
    torch.testing.assert_close(frozen, alone, rtol=1e-10, atol=1e-12)
    given_back, others = (model.eval().forward_pass(batch, given).logits for given in (frozen, frozen.roll(1, 0)))
    assert not torch.equal(given_back, others)
    if not model.reads_patches:
        assert torch.equal(model.forward_pass(None, frozen).logits, model.forward_pass(batch).logits)


def test_a_pass_leaves_nothing_behind(model, bags):
    """Evaluation is repeatable, and in whatever order; a bag's logits are its own."""
    one, other = bags[:3], bags[3:]
    first, second = passed(model, one), passed(model, other)
    again, before = passed(model, other), passed(model, one)
    for found, expected in zip((*before, *again), (*first, *second), strict=True):
        assert found is expected is None or torch.equal(found, expected)
    alone = torch.cat([model(packed(model, [bag])) for bag in bags])
    torch.testing.assert_close(model(packed(model, bags)), alone, rtol=1e-9, atol=1e-11)


def test_what_is_deployed_predicts_the_same(model, bags):
    deployed = model.deployed()
    torch.testing.assert_close(deployed(packed(model, bags)), model(packed(model, bags)), rtol=1e-10, atol=1e-12)
    assert (deployed is model) == (not model.merging or not model.merging.same_for_all_bags)
    assert deployed is model or deployed.merging is None


def test_the_network_that_pools_a_bag_attends_to_all_of_it(model, bags):
    for bag in bags:
        batch = packed(model, [bag])
        pooling = model.pooling_network(batch)
        if pooling is None:
            assert isinstance(model, ROUPKT | CoxMean) or any(isinstance(part, MeanMIL) for part in model.modules())
            continue
        attention = pooling.attention(batch)
        assert attention.shape == (len(bag),) and attention.min() >= 0
        assert attention.sum().item() == pytest.approx(1)
        if not isinstance(model, Surgery):  # which moves what is pooled
            torch.testing.assert_close(pooling(batch), model(batch), rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("kind", MAKERS)
def test_in_half_precision_it_is_the_same_model(kind):
    model = MAKERS[kind]().eval()
    batch = packed(model, [torch.randn(n, 6) for n in SIZES])
    single, half = model(batch), model(batch.to("cpu", torch.bfloat16))
    half.square().sum().backward()
    assert half.dtype == torch.float32 and not torch.equal(half, single)
    assert (half - single).abs().max() < 0.05 * (single.max() - single.min())
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


def test_a_model_is_made_again_from_its_architecture(model, bags):
    architecture = json.loads(json.dumps(model.architecture()))
    again = build(architecture, 6, DIMENSIONS)
    assert type(again) is type(model) and again.architecture() == architecture
    assert {n: p.shape for n, p in again.named_parameters()} == {n: p.shape for n, p in model.named_parameters()}
    fill(again, tensors_of(model))
    torch.testing.assert_close(again(packed(model, bags)), model(packed(model, bags)), rtol=1e-12, atol=1e-14)


def test_coordinates_are_needed_where_that_is_said(model, bags):
    bare = RaggedBatch.from_bags(bags)
    if network_needing_coords(model):
        with pytest.raises(Refused, match="needs the coordinates of patches"):
            model(bare)
    else:
        assert torch.equal(model(bare), model(bags))


def test_models_run_on_shapes_unless_they_say_that_they_need_numbers(model, bags):
    def logits():
        return deepcopy(model).to("meta")(packed(model, bags).to("meta")).shape

    if model.runs_on_shapes:
        assert logits() == (len(SIZES), 4)
    else:
        with pytest.raises((RuntimeError, NotImplementedError)):
            logits()


@pytest.mark.parametrize("sizes", [SIZES, (1,), (3, 64, 65)])
def test_every_trained_part_of_a_model_gets_a_gradient(model, sizes):
    logits, loss, _ = passed(model.train(), [torch.randn(n, 6) for n in sizes])
    (logits.square().sum() + (0 if loss is None else loss)).backward()
    trained = [p for p in model.parameters() if p.requires_grad]
    assert trained and all(p.grad is not None and p.grad.isfinite().all() for p in trained)


# ------------------------------------------------------------------------------------------------ every network


@pytest.mark.parametrize("sizes", [SIZES, (6, 40, 9, 23, 12, 16, 17, 31), (64, 65, 1, 64, 2)])
def test_batches_and_bags_one_by_one_have_the_same_logits_and_gradients(net, sizes):
    """What bags share on their way (padding, masks, groups) leaves no trace."""
    torch.manual_seed(2)
    bags, weights = [torch.randn(n, 6) for n in sizes], torch.randn(len(sizes), 4)

    def gradients(logits):
        return torch.autograd.grad((logits * weights).sum(), list(net.parameters()))

    together = net(packed(net, bags))
    alone = torch.cat([net(packed(net, [bag])) for bag in bags])
    torch.testing.assert_close(together, alone, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(gradients(together), gradients(alone), rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(net.head(net.encode(packed(net, bags))), together)


@pytest.mark.parametrize("sizes", [(5, 1, 12, 30), SIZES])
def test_bags_under_weights_of_their_own_are_encoded_as_by_networks_of_their_own(name, net, sizes):
    """Small bags together or large ones one by one: the features, and the gradient of every bag's weights."""
    torch.manual_seed(3)
    bags = [torch.randn(n, 6) for n in sizes]
    networks = [network(name, seed).double().eval() for seed in range(len(sizes))]
    weights = {
        key: torch.stack([dict(one.named_parameters())[key].detach() for one in networks]).requires_grad_()
        for key, _ in net.named_parameters()
        if not key.startswith("head.")
    }
    together = net.encode_under(weights, packed(net, bags))
    alone = torch.cat([one.encode(packed(one, [bag])) for one, bag in zip(networks, bags, strict=True)])
    torch.testing.assert_close(together, alone, rtol=1e-10, atol=1e-12)
    share = torch.randn_like(together)
    (together * share).sum().backward()
    (alone * share).sum().backward()
    for key, value in weights.items():
        grads = [dict(one.named_parameters())[key].grad for one in networks]
        expected = torch.stack([torch.zeros_like(value[0]) if grad is None else grad for grad in grads])
        found = torch.zeros_like(value) if value.grad is None else value.grad
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12, msg=lambda m, key=key: f"{key}: {m}")


def test_a_leading_axis_of_one_changes_nothing(net, bags):
    batch = packed(net, bags)
    coords = batch.coords if batch.coords is None else batch.coords.split(SIZES)
    assert torch.equal(net(RaggedBatch.from_bags([bag.unsqueeze(0) for bag in bags], coords)), net(batch))


def test_order_of_patches_matters_only_where_it_is_said(net, bags):
    straight, turned = net(packed(net, bags)), net(packed(net, bags, lambda patches: patches.flip(0)))
    if net.order_invariant:
        torch.testing.assert_close(turned, straight, rtol=1e-10, atol=1e-12)
    else:
        assert (turned - straight)[-1].abs().max() > 1e-6, "it promises less than it holds"


def test_attention_is_of_one_bag(net, bags):
    with pytest.raises(Refused, match=r"one bag was expected; this batch has 8\."):
        net.attention(packed(net, bags))


def test_gradients_are_those_of_finite_differences(net, bags):
    batch = packed(net, bags[:3])
    weights = torch.linspace(-1, 1, 12, dtype=torch.float64).view(3, 4)
    parameters = list(net.parameters())
    gradients = torch.autograd.grad((net(batch) * weights).sum(), parameters)
    torch.manual_seed(5)
    directions = [torch.randn_like(p) for p in parameters]
    expected = sum((g * d).sum() for g, d in zip(gradients, directions, strict=True)).item()
    step, values = 1e-6, []
    with torch.no_grad():
        for sign in (1, -2):
            for parameter, direction in zip(parameters, directions, strict=True):
                parameter += sign * step * direction
            values.append((net(batch) * weights).sum().item())
    assert (values[0] - values[1]) / (2 * step) == pytest.approx(expected, rel=1e-5, abs=1e-7)


def test_training_drops_what_it_is_told_to(name, net, bags):
    batch = packed(net, bags)
    differs = not torch.equal(net.train()(batch), net(batch))
    assert differs == (name != "ilra"), "ILRA alone has no dropout"
    still = NETWORKS[name](6, DIMENSIONS.model_copy(update={"dropout": 0.0})).train()
    assert torch.equal(still(batch), still(batch)), "network.dropout = 0 must mean none"


def test_works_at_the_demos_size(name):
    net = new_network(name, 32, Network(dim_emb=32)).eval()
    assert net(packed(net, [torch.randn(n, 32) for n in range(1, 41)])).isfinite().all()


# ------------------------------------------------------------------------------------------------ states


@pytest.mark.parametrize("kind", MAKERS)
def test_one_seed_gives_one_model(kind):
    assert state_fingerprint(state_of(MAKERS[kind]())) == state_fingerprint(state_of(MAKERS[kind]()))


def test_a_state_goes_to_a_file_and_back_exactly(net, tmp_path):
    state = state_of(net, origin="abc")
    save_state(state, tmp_path / "m.safetensors")
    found = load_state(tmp_path / "m.safetensors")
    assert found.origin == "abc" and state_fingerprint(found) == state_fingerprint(state)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.zero_()
    load_into(net, found)
    assert all(torch.equal(value, state[parameter]) for parameter, value in net.named_parameters())
    with pytest.raises(Refused, match=r"1 parameters differ, first head\.bias"):
        load_into(net, {k: v for k, v in state.items() if k != "head.bias"})


@pytest.mark.parametrize("content", [b"", b"not safetensors at all"])
def test_a_damaged_state_is_named(tmp_path, content):
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    with pytest.raises(Refused, match="not a readable safetensors file"):
        load_state(path)


# ------------------------------------------------------------------------------------------------ packages, widths


def test_a_package_that_is_not_there_is_named(monkeypatch):
    for module in [name for name in sys.modules if name.split(".")[0] == "torch_geometric"] or ["torch_geometric"]:
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(Refused, match="needs the package torch_geometric: pip install"):
        network("patch_gcn")


def test_importing_networks_imports_no_package_of_one_network():
    code = "import sys, steph.mil; print(sorted({'torch_geometric', 'scipy'} & set(sys.modules)))"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"


@pytest.mark.parametrize("network", ["transmil", "ilra", "r2t_mil"])
def test_a_width_that_heads_do_not_divide_is_refused(network):
    with pytest.raises(Refused, match=r"8 heads.*network\.dim_emb.* no multiple"):
        NETWORKS[network](6, Network(dim_emb=20))


PAPERS = {"transmil": (2_949_680, 116.2), "ilra": (4_214_560, 55.1), "r2t_mil": (2_975_008, 44.4),
          "patch_gcn": (1_687_330, 33.4), "abmil": (1_197_729, None)}  # fmt: skip


def test_trained_parameters_are_the_papers():
    """1.34 M of STEPH in Table S4; with a linear head in its hypernetworks (difference D1), with the release's `fnn`;
    of ROUPKT on 13 models."""
    with torch.device("meta"):
        target, *others = (new_network("abmil", 1536, Network()) for _ in range(13))
        states = {str(i): dict(other.named_parameters()) for i, other in enumerate(others)}
        null = dict(target.named_parameters())
        models = [STEPH(null, null, states, hyper_head=head) for head in ("mlp", "linear")]
        models.append(STEPH(null, null, states, separate_encoders=True))
        experts = {str(i): expert for i, expert in enumerate([target, *others])}
        models.append(ROUPKT(new_network("abmil", 1536, Network()), experts))
    counts = [sum(p.numel() for p in model.parameters() if p.requires_grad) for model in models]
    assert counts == [1_340_984, 815_672, 2_127_928, 4_618_913]


@pytest.mark.parametrize("name", PAPERS)
def test_parameters_and_work_are_the_papers(name):
    """Of Table S4, and billions of operations on 10,000 patches."""
    with torch.device("meta"):
        net = new_network(name, 1536, Network()).eval()
        features = torch.empty(10_000, 1536)
    parameters, work = PAPERS[name]
    assert sum(p.numel() for p in net.parameters()) == parameters
    if work is not None:
        with FlopCounterMode(display=False) as counter, layer_by_layer():
            net(packed(net, [features]))
        assert counter.get_total_flops() / 1e9 == pytest.approx(work, rel=0.01)
