"""Every way of merging goes through the same suite.

Two registries are walked: merges of a pair (`steph.merging.PAIR_MERGES`), and the methods that merge (those of
`steph.methods.METHODS` that ask for the target's and the sources' models). What is new is found here and fails until it
says what it does with itself, or what it trains. What holds for every class of model stands in
`tests/mil/test_contract.py`.
"""

from dataclasses import replace

import pytest
import torch

from steph import Refused
from steph.data.bags import RaggedBatch
from steph.data.manifest import Network, Recipe, load_study
from steph.merging import PAIR_MERGES, STEPH, apply_task_vector, merge_pairs, model_average
from steph.merging.steph import mixture_coefficients
from steph.merging.ties import trim
from steph.methods import METHODS, Inputs
from steph.mil import ABMIL, NETWORKS
from steph.mil.state import load_into, state_of
from steph.training.device import Compute
from steph.training.engine import Trainer
from tests.conftest import assert_states_close
from tests.helpers.made_pool import Pool, encoder, moved
from tests.training.test_engine import Patients

EXACT = {"rtol": 1e-9, "atol": 1e-12}
DIMENSIONS = Network(dim_emb=16, dim_attn=8, n_bins=8)


@pytest.fixture
def pool(float64):
    return Pool(lambda: ABMIL(6, 5, 4, 8))


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


def test_a_merge_is_symmetric_scales_with_its_vectors_and_leaves_them_alone(pool, merge):
    one, other = pool.vector(pool.target), pool.vector(pool.sources["a"])
    before = {name: value.clone() for name, value in one.items()}
    merged = merge(one, other)
    assert all(torch.equal(value, merged[name]) for name, value in merge(one, other).items())
    assert {n: (v.shape, v.dtype) for n, v in merged.items()} == {n: (v.shape, v.dtype) for n, v in one.items()}
    assert_states_close(merge(other, one), merged)
    assert all(torch.equal(value, before[name]) for name, value in one.items())
    assert_states_close(merge(twice(one), twice(other)), twice(merged))
    assert not any(value.any() for value in merge(pool.vector(pool.null), pool.vector(pool.null)).values())


@pytest.mark.parametrize("network", sorted(NETWORKS))
def test_a_merge_knows_no_layers_and_no_other_source(network, merge, float64):
    pool = Pool(lambda: NETWORKS[network](6, DIMENSIONS))
    merged = merge_pairs(pool.null, pool.target, pool.sources, merge)
    assert list(merged) == list(pool.sources)
    for name, state in merged.items():
        assert {k: v.shape for k, v in state.items()} == {k: v.shape for k, v in pool.null.items()}
        assert all(torch.isfinite(value).all() for value in state.values())
        assert torch.equal(state["head.weight"], pool.sources[name]["head.weight"]) and state.origin == pool.null.origin
        tau = merge(pool.vector(pool.target), pool.vector(pool.sources[name]))
        assert_states_close(encoder(state), apply_task_vector(encoder(pool.null), tau))


def test_pairs_of_different_networks_are_refused(pool, merge):
    stranger = pool.vector(pool.target)
    stranger["embed.weight"] = torch.zeros(2, 2)
    with pytest.raises(Refused, match="different networks"):
        merge(stranger, pool.vector(pool.target))


def test_identical_models_average_to_themselves(pool):
    for state in (pool.target, pool.null):
        twins = dict.fromkeys(pool.sources, state)
        assert_states_close(model_average(pool.null, state, twins, merge_head=True), state)


# ------------------------------------------------------------------------------------------------ methods that merge

AM = {"weight_vector", "head"}
HYPER = {"hyper.embed", "hyper.weight_head", "head"}
MIXING = HYPER | {"hyper.mix_head"}
TRAINS = {
    **dict.fromkeys(["steph", "steph_dense", "steph_gamma_search", "steph_random_sources", "steph_patch_gcn"], MIXING),
    "steph_patch_gcn_softplus": MIXING,
    **dict.fromkeys(["steph_subsampled", "steph_r256", "steph_r1024"], MIXING),
    **dict.fromkeys(["steph_lambda0", "steph_lambda0_with_target", "steph_lambda1"], HYPER),
    "steph_param_lambda": HYPER | {"ratio_vector"},
    "steph_param_w": {"weight_vector", "hyper.embed", "hyper.mix_head", "head"},
    **dict.fromkeys(["steph_as_written", "steph_on_target"], MIXING - {"head"}),
    **{name: set() for name in ("model_average", "steph_free_cosine", "steph_free_concordance", "steph_free_scores")},
    "adamerging": AM,
    "adamerging_hyper": HYPER,
    "surgery_am": {"adapter"},
    "surgery_hyper": {"adapter"},
    **{f"{name}_am": AM for name in PAIR_MERGES},
    **{f"{name}_hyper": HYPER for name in PAIR_MERGES},
    **{name: MIXING for name, entry in METHODS.items() if entry.group == "sweep"},
}
"""The parts that each way of merging trains; everything else is frozen."""
MERGING = sorted(
    name
    for name, entry in METHODS.items()
    if entry.needs_target and entry.needs_sources and entry.group != "representation_transfer"
)
FORMS = [name for name in MERGING if METHODS[name].group != "sweep" and not METHODS[name].after]
"""Those that differ in more than a number, and build their model in one stage."""


def built(name, turned=False):
    """The model of a method before training, on 12 sources; turned: on the same in reversed order."""
    entry, data = METHODS[name], Patients()
    pool = Pool(lambda: NETWORKS[entry.network](data.dim, DIMENSIONS))
    sources = {f"s{i}": pool.near_null() for i in range(12)}
    inputs = Inputs(
        data=data,
        patients=data.ids[:20],
        network_name=entry.network,
        dim=data.dim,
        dimensions=DIMENSIONS,
        recipe=Recipe(),
        settings=entry.settings_of(load_study("tiny"), len(data.ids)),
        null_state=pool.null,
        target_state=pool.target,
        source_states=dict(reversed(sources.items())) if turned else sources,
        facts={"gamma": 0.01} if name == "steph_gamma_search" else {},  # it was searched before
        compute=Compute(precision="fp64"),
    )
    if entry.after:
        stage = METHODS[entry.after].build(inputs, **METHODS[entry.after].options)
        inputs = replace(inputs, stage_state=state_of(stage, trainable_only=True))
    return entry.build(inputs, **entry.options), pool


@pytest.fixture
def bags(float64):
    generator = torch.Generator().manual_seed(5)
    bags = [torch.randn(n, Patients.dim, generator=generator) for n in (3, 9, 1, 5)]
    return RaggedBatch.from_bags(bags, [torch.arange(2 * len(bag)).view(-1, 2) for bag in bags])


@pytest.mark.parametrize("name", FORMS)
def test_a_bag_goes_through_the_sum_of_base_and_weighted_vectors(name, bags):
    model, pool = built(name)
    if not isinstance(model, STEPH):
        assert not any(p.requires_grad for p in model.parameters())
        return
    vectors = model.eval().encoder.states()[1:]
    assert_states_close(vectors[0], pool.vector(pool.target))
    for i in range(len(bags)):
        bag = bags.single(i)
        coefficients = mixture_coefficients(*model.batch_coefficients(bag))[0]
        network = model._network(bag)
        start = pool.target if METHODS[name].options.get("base") == "target" else pool.null
        assert_states_close(encoder(state_of(network)), moved(encoder(start), vectors, coefficients))
        torch.testing.assert_close(model(bag), network(bag), **EXACT)


@pytest.mark.parametrize("name", FORMS)
def test_order_of_sources_does_not_matter(name, bags):
    (model, _), (other, _) = built(name), built(name, turned=True)
    if isinstance(model, STEPH):
        order = [model.source_names.index(source) for source in other.source_names]
        assert order != sorted(order)
        trained = state_of(model, trainable_only=True)
        for vector in {"weight_vector", "ratio_vector"} & trained.keys():  # unequal weights, or any order would do
            trained[vector] = torch.linspace(0.1, 0.7, len(order))
        load_into(model, trained)
        per_source = ("_head.3.", "mix_head.w", "mix_head.b", "weight_head.w", "weight_head.b", "_vector")
        load_into(other, {k: v[order] if any(part in k for part in per_source) else v for k, v in trained.items()})
    torch.testing.assert_close(other.eval()(bags), model.eval()(bags), **EXACT)


def trained_parts(name, model):
    """All parameters, and the names of those that a method says it trains, after a look at what asks for a gradient."""
    assert name in TRAINS, f"a new method of merging, {name}: say in TRAINS what it trains"
    named, parts = dict(model.named_parameters()), TRAINS[name]
    inside = {n for n in named if any(n == part or n.startswith(f"{part}.") for part in parts)}
    assert {n for n, p in named.items() if p.requires_grad} == inside
    assert all(any(n == part or n.startswith(f"{part}.") for n in inside) for part in parts)
    return named, inside


@pytest.mark.parametrize("name", MERGING)
def test_nothing_but_what_a_method_names_is_trained(name, bags):
    """By one update at a rate that moves whatever has a gradient."""
    model, _ = built(name)
    named, inside = trained_parts(name, model)
    if not inside:
        return
    before = {n: p.detach().clone() for n, p in named.items()}
    buffers = {n: b.clone() for n, b in model.named_buffers()}
    frozen = model.frozen_features(bags) if model.has_frozen_features else None
    trainer = Trainer(model.train(), Recipe(lr=0.1, warmup_epochs=0), 10)
    trainer.step(bags, torch.tensor([0, 1, 2, 7]), torch.tensor([1, 0, 1, 1]), frozen)
    for n, parameter in named.items():
        assert (parameter.grad is not None) == (n in inside), n
        assert n in inside or torch.equal(parameter, before[n]), n
    assert any(not torch.equal(named[n], before[n]) for n in inside)
    assert all(torch.equal(b, buffers[n]) for n, b in model.named_buffers())


def test_what_is_said_to_be_trained_is_checked(float64):
    """The suite sees a parameter too many, and one that is missing."""
    model, _ = built("steph_lambda0")
    with pytest.raises(AssertionError):
        trained_parts("steph", model)
    model.encoder.network.embed.requires_grad_(True)
    with pytest.raises(AssertionError):
        trained_parts("steph_lambda0", model)
    with pytest.raises(AssertionError, match="say in TRAINS"):
        trained_parts("brand_new", model)
