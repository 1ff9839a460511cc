"""Every way of merging goes through the same suite.

Three registries are walked: merges of a pair (`steph.merging.PAIR_MERGES`), the methods that merge (those of
`steph.methods.METHODS` that ask for the target's and the sources' models), and the variants of STEPH and AdaMerging
below. What is new in the first two is found here and fails until it says what it does with itself, or what it trains.
What holds for every class of model stands in `tests/mil/test_contract.py`.
"""

from dataclasses import replace

import pytest
import torch

from steph import Refused
from steph.data.bags import RaggedBatch
from steph.data.manifest import Network, Recipe, load_study
from steph.merging import PAIR_MERGES, Surgery, apply_task_vector, merge_pairs, model_average
from steph.merging.steph import STEPH, mixture_coefficients
from steph.merging.ties import trim
from steph.methods import METHODS, Inputs
from steph.methods.base import Settings
from steph.mil import ABMIL, NETWORKS
from steph.mil.state import load_into, state_of
from steph.training.device import Compute
from steph.training.engine import Trainer
from tests.conftest import assert_states_close
from tests.helpers.made_pool import Pool, adamerging, encoder, moved
from tests.training.test_engine import Patients

EXACT = {"rtol": 1e-9, "atol": 1e-12}
DIMENSIONS = Network(dim_emb=16, dim_attn=8, n_bins=8)


@pytest.fixture
def pool(float64):
    return Pool(lambda: ABMIL(6, 5, 4, 8))


@pytest.fixture
def bags(float64):
    generator = torch.Generator().manual_seed(5)
    return [torch.randn(n, 6, generator=generator) for n in (3, 9, 1, 5)]


# ------------------------------------------------------------------------------------------------ pairs


def twice(tau):
    return {name: 2 * value for name, value in tau.items()}


def trimmed(tau):
    flat = torch.cat([value.reshape(-1) for value in tau.values()])
    parts = trim(flat, 0.2).split([value.numel() for value in tau.values()])
    return {name: part.view_as(tau[name]) for name, part in zip(tau, parts, strict=True)}


def isotropic(tau):
    """tau, its matrices' singular values made equal: the fixed direction of Iso-C."""
    directions = dict(tau)
    for name, value in tau.items():
        if value.ndim == 2:
            u, s, vh = torch.linalg.svd(value, full_matrices=False)
            directions[name] = s.mean() * (u @ vh)
    return directions


def sum_of_matrices(tau):
    return {name: 2 * value if value.ndim == 2 else value for name, value in tau.items()}


# A vector merged with itself: what it is first turned into, and what becomes of that. TIES and Iso sum, so they double
# it: w = 1/2 is what makes identical models a fixed point of theirs.
WITH_ITSELF = {
    "ties": (trimmed, twice),
    "iso_c": (isotropic, sum_of_matrices),
    "iso_cts": (isotropic, sum_of_matrices),
}


@pytest.fixture(params=sorted(PAIR_MERGES))
def merge(request):
    return PAIR_MERGES[request.param]


def test_every_merge_says_what_it_does_with_itself():
    assert set(WITH_ITSELF) == set(PAIR_MERGES), "a new merge: add what merging a vector with itself gives"


@pytest.mark.parametrize("name", sorted(WITH_ITSELF))
def test_a_vector_merged_with_itself(pool, name):
    prepare, expected = WITH_ITSELF[name]
    tau = prepare(pool.vector(pool.target))
    assert_states_close(PAIR_MERGES[name](tau, tau), expected(tau))


def test_zero_vectors_give_zero(pool, merge):
    zero = pool.vector(pool.null)
    assert all(torch.equal(value, torch.zeros_like(value)) for value in merge(zero, zero).values())


def test_target_and_source_change_places(pool, merge):
    one, other = pool.vector(pool.target), pool.vector(pool.sources["a"])
    assert_states_close(merge(one, other), merge(other, one))


def test_vectors_twice_as_long_merge_to_twice_as_much(pool, merge):
    one, other = pool.vector(pool.target), pool.vector(pool.sources["a"])
    assert_states_close(merge(twice(one), twice(other)), twice(merge(one, other)))


def test_a_merge_is_deterministic_and_leaves_its_vectors_alone(pool, merge):
    one, other = pool.vector(pool.target), pool.vector(pool.sources["a"])
    before = {name: value.clone() for name, value in one.items()}
    first, second = merge(one, other), merge(one, other)
    assert all(torch.equal(first[name], second[name]) and torch.equal(one[name], before[name]) for name in one)
    assert {n: (v.shape, v.dtype) for n, v in first.items()} == {n: (v.shape, v.dtype) for n, v in one.items()}


@pytest.mark.parametrize("network", sorted(NETWORKS))
def test_a_merge_knows_no_layers(network, merge, float64):
    pool = Pool(lambda: NETWORKS[network](6, DIMENSIONS))
    merged = merge_pairs(pool.null, pool.target, pool.sources, merge)
    for name, state in merged.items():
        assert {k: v.shape for k, v in state.items()} == {k: v.shape for k, v in pool.null.items()}
        assert all(torch.isfinite(value).all() for value in state.values())
        expected = apply_task_vector(
            encoder(pool.null), merge(pool.vector(pool.target), pool.vector(pool.sources[name]))
        )
        assert_states_close(encoder(state), expected)


def test_merged_pairs_of_models_that_are_the_null_model(pool, merge):
    for state in merge_pairs(pool.null, pool.null, dict.fromkeys(pool.sources, pool.null), merge).values():
        assert_states_close(dict(state), dict(pool.null))


def test_a_pair_knows_no_other_source(pool, merge):
    together = merge_pairs(pool.null, pool.target, pool.sources, merge)
    for name, state in pool.sources.items():
        alone = merge_pairs(pool.null, pool.target, {name: state}, merge)[name]
        assert all(torch.equal(together[name][k], alone[k]) for k in alone)


def test_pairs_of_different_networks_are_refused(pool, merge):
    stranger = pool.vector(pool.target)
    stranger["embed.weight"] = torch.zeros(2, 2)
    with pytest.raises(Refused, match="different networks"):
        merge(stranger, pool.vector(pool.target))


# ------------------------------------------------------------------------------------------------ merged models


def dense(**options):
    options = {"dim_hidden": 7, "dropout": 0.0, "top_k": 3, **options}
    return lambda p: STEPH(p.null, p.target, p.sources, network=p.make(), **options)


def pairs(name, **options):
    def build(p):
        merged = merge_pairs(p.null, p.target, p.sources, PAIR_MERGES[name])
        return adamerging(p.null, p.target, merged, network=p.make(), dim_hidden=7, **options)

    return build


PLAIN = {
    "steph": dense(),
    "steph_dense": dense(top_k=None),
    "steph_sparse": dense(top_k=2),
    "steph_lambda0": dense(mix=0.0),
    "steph_lambda1": dense(mix=1.0),
    "steph_param_lambda": dense(mix="parameter"),
    "steph_param_w": dense(weight="parameter"),
    "steph_merged_head": dense(merge_head=True),
    "adamerging": lambda p: adamerging(p.null, p.target, {"t": p.target, **p.sources}, network=p.make()),
    "adamerging_hyper": lambda p: adamerging(
        p.null, p.target, {"t": p.target, **p.sources}, network=p.make(), weight="hypernetwork", dim_hidden=7
    ),
}
"""Models that merge task vectors as they are."""
PAIRED = {f"{name}_am": pairs(name) for name in PAIR_MERGES} | {
    f"{name}_hyper": pairs(name, weight="hypernetwork") for name in PAIR_MERGES
}
"""Models that merge merged pairs."""
VARIANTS = PLAIN | PAIRED


@pytest.fixture(params=sorted(VARIANTS))
def variant(request):
    torch.manual_seed(1)
    return VARIANTS[request.param]


def test_the_merged_state_is_the_looped_sum(pool, bags, variant):
    model = variant(pool).eval()
    vectors = model.encoder.states()[1:]
    for bag in bags:
        coefficients = mixture_coefficients(*model.batch_coefficients([bag]))[0]
        expected = moved(encoder(pool.null), vectors, coefficients)
        merged = model.merged_state(bag)
        assert_states_close(encoder(merged), expected)
        # And it is what the bag is seen through.
        network = pool.make().eval()
        load_into(network, merged)
        torch.testing.assert_close(model([bag]), network([bag]), **EXACT)


def test_zero_task_vectors_give_the_null_model_back(pool, bags, variant):
    still = pool.changed(target=pool.null, sources=dict.fromkeys(pool.sources, pool.null))
    merged = variant(still).merged_state(bags[0])
    assert_states_close(encoder(merged), encoder(pool.null))


@pytest.mark.parametrize("name", sorted(PLAIN))
def test_identical_models_are_a_fixed_point(pool, bags, name):
    """Where all models are M, merging moves along its one task vector; with coefficients that sum to 1, not at all."""
    torch.manual_seed(1)
    model = PLAIN[name](pool.changed(sources=dict.fromkeys(pool.sources, pool.target)))
    share = mixture_coefficients(*model.batch_coefficients([bags[0]]))[0].sum()
    expected = moved(encoder(pool.null), [pool.vector(pool.target)], [share])
    assert_states_close(encoder(model.merged_state(bags[0])), expected)
    if model.weight == "parameter" and model.top_k is None:
        assert share.item() == pytest.approx(1)
        assert_states_close(encoder(model.merged_state(bags[0])), encoder(pool.target))


def test_identical_models_average_to_themselves(pool):
    for state in (pool.target, pool.null):
        twins = dict.fromkeys(pool.sources, state)
        assert_states_close(model_average(pool.null, state, twins, merge_head=True), state)


def test_order_of_sources_does_not_matter_to_the_average(pool):
    turned = dict(reversed(pool.sources.items()))
    assert_states_close(
        model_average(pool.null, pool.target, pool.sources), model_average(pool.null, pool.target, turned)
    )


def test_order_of_sources_does_not_matter(pool, bags, variant):
    model = variant(pool).eval()
    other = variant(pool.changed(sources=dict(reversed(pool.sources.items())))).eval()
    order = [model.source_names.index(name) for name in other.source_names]
    assert order != sorted(order)
    trained = state_of(model, trainable_only=True)
    per_source = ("_head.3.", "weight_vector", "ratio_vector")
    if model.weight_vector is not None:  # unequal weights, or any order would do
        trained["weight_vector"] = torch.linspace(0.1, 0.7, len(order))
    load_into(model, trained)
    load_into(other, {k: v[order] if any(part in k for part in per_source) else v for k, v in trained.items()})
    torch.testing.assert_close(other(bags), model(bags), **EXACT)
    plain = dict(zip(model.source_names, model.coefficients(bags[0])[0].tolist(), strict=True))
    assert dict(zip(other.source_names, other.coefficients(bags[0])[0].tolist(), strict=True)) == pytest.approx(plain)


@pytest.mark.parametrize("mix", ["hypernetwork", "parameter", 0.0, 0.4, 1.0])
@pytest.mark.parametrize("weight", ["hypernetwork", "parameter"])
def test_keeping_all_sources_is_no_sparsity(pool, bags, mix, weight):
    models = []
    for top_k in (3, None):
        torch.manual_seed(2)
        models.append(dense(top_k=top_k, mix=mix, weight=weight)(pool).eval())
    torch.testing.assert_close(models[0](bags), models[1](bags), **EXACT)


@pytest.mark.parametrize("top_k", [1, 2, None])
@pytest.mark.parametrize("weight", ["hypernetwork", "parameter"])
def test_lambda_of_one_is_a_scaled_target_vector(pool, bags, top_k, weight):
    torch.manual_seed(2)
    model = dense(top_k=top_k, mix=1.0, weight=weight)(pool)
    w, _, selected = model.coefficients(bags[0])
    expected = moved(encoder(pool.null), [pool.vector(pool.target)], [w[selected].sum()])
    assert_states_close(encoder(model.merged_state(bags[0])), expected)


# ------------------------------------------------------------------------------------------------ what is trained

AM = {"weight_vector", "head"}
HYPER = {"hyper.embed", "hyper.weight_head", "head"}
MIXING = HYPER | {"hyper.mix_head"}
TRAINS = {
    "steph": MIXING,
    "steph_dense": MIXING,
    "steph_sparse": MIXING,
    "steph_lambda0": HYPER,
    "steph_lambda0_with_target": HYPER,
    "steph_lambda1": HYPER,
    "steph_param_lambda": HYPER | {"ratio_vector"},
    "steph_gamma_search": MIXING,
    "steph_param_w": {"weight_vector", "hyper.embed", "hyper.mix_head", "head"},
    **dict.fromkeys(["steph_merged_head", "steph_as_written"], MIXING - {"head"}),
    "steph_random_sources": MIXING,
    "steph_patch_gcn": MIXING,
    "steph_subsampled": MIXING,
    "steph_r256": MIXING,
    "steph_r1024": MIXING,
    "model_average": set(),
    **{f"steph_free_{way}": set() for way in ("cosine", "concordance", "scores")},
    "adamerging": AM,
    "adamerging_hyper": HYPER,
    "surgery_am": {"adapter"},
    "surgery_hyper": {"adapter"},
    **{f"{name}_am": AM for name in PAIR_MERGES},
    **{f"{name}_hyper": HYPER for name in PAIR_MERGES},
    **{name: MIXING for name, entry in METHODS.items() if entry.group == "sweep"},
}
"""The parts that each way of merging trains; everything else is frozen."""


def trained_parts(name, model):
    """Checks one update against what `name` says that it trains."""
    assert name in TRAINS, f"a new method of merging, {name}: say in TRAINS what it trains"
    named = dict(model.named_parameters())
    parts = TRAINS[name]
    inside = {n for n in named if any(n == part or n.startswith(f"{part}.") for part in parts)}
    assert {n for n, p in named.items() if p.requires_grad} == inside
    assert all(any(n == part or n.startswith(f"{part}.") for n in inside) for part in parts)
    return named, inside


def update(model, bags):
    """One update at a rate that moves whatever has a gradient."""
    trainer = Trainer(model.train(), Recipe(lr=0.1, warmup_epochs=0), 10)
    frozen = model.frozen_features(bags) if model.has_frozen_features else None
    trainer.step(bags, torch.tensor([0, 1, 2, 7]), torch.tensor([1, 0, 1, 1]), frozen)


def check_update(name, model, bags):
    named, inside = trained_parts(name, model)
    before = {n: p.detach().clone() for n, p in named.items()}
    buffers = {n: b.clone() for n, b in model.named_buffers()}
    if not inside:
        return
    update(model, bags)
    for n, parameter in named.items():
        assert (parameter.grad is not None) == (n in inside), n
        if n not in inside:
            assert torch.equal(parameter, before[n]), n
    assert any(not torch.equal(named[n], before[n]) for n in inside)
    assert all(torch.equal(b, buffers[n]) for n, b in model.named_buffers())


@pytest.mark.parametrize("name", sorted(VARIANTS))
def test_nothing_but_what_a_variant_names_is_trained(pool, bags, name):
    torch.manual_seed(1)
    check_update(name, VARIANTS[name](pool), bags)


@pytest.mark.parametrize("name", ["surgery_am", "surgery_hyper"])
def test_nothing_but_the_adapter_is_trained(pool, bags, name):
    merged = VARIANTS[name.replace("surgery", "adamerging").removesuffix("_am")](pool)
    own = pool.make()
    load_into(own, pool.target)
    check_update(name, Surgery(merged, own), bags)


def merging_methods():
    both = (name for name, entry in METHODS.items() if entry.needs_target and entry.needs_sources)
    return sorted(name for name in both if METHODS[name].group != "representation_transfer")


@pytest.mark.parametrize("name", merging_methods())
def test_nothing_but_what_a_method_names_is_trained(name, float64):
    entry, data = METHODS[name], Patients()
    pool = Pool(lambda: NETWORKS[entry.network](data.dim, DIMENSIONS))
    inputs = Inputs(
        data=data,
        patients=data.ids[:20],
        network_name=entry.network,
        dim=data.dim,
        dimensions=DIMENSIONS,
        recipe=Recipe(),
        settings=Settings(entry.settings_of(load_study("tiny"), len(data.ids))),
        null_state=pool.null,
        target_state=pool.target,
        source_states={f"s{i}": pool.near_null() for i in range(12)},
        facts={"gamma": 0.01} if name == "steph_gamma_search" else {},  # it was searched before
        compute=Compute(precision="fp64"),
    )
    if entry.after:
        stage = METHODS[entry.after].build(inputs, **METHODS[entry.after].options)
        inputs = replace(inputs, stage_state=state_of(stage, trainable_only=True))
    bags = [torch.randn(n, data.dim) for n in (3, 9, 1, 5)]
    coords = [torch.arange(2 * len(bag)).view(-1, 2) for bag in bags]
    check_update(name, entry.build(inputs, **entry.options), RaggedBatch.from_bags(bags, coords))


def test_what_is_said_to_be_trained_is_checked(pool):
    """The suite sees a parameter too many, and one that is missing."""
    model = VARIANTS["steph_lambda0"](pool)
    with pytest.raises(AssertionError):
        trained_parts("steph", model)
    model.encoder.network.embed.requires_grad_(True)
    with pytest.raises(AssertionError):
        trained_parts("steph_lambda0", model)
    with pytest.raises(AssertionError, match="say in TRAINS"):
        trained_parts("brand_new", model)
