"""AdaMerging is STEPH without mixing, sparsity and hypernetworks: held to the release's AdaMerging."""

import pytest
import torch

from steph.data import RaggedBatch
from steph.data.manifest import Recipe
from steph.merging import iso_c, merge_pairs, ties
from steph.merging.steph import STEPH
from steph.mil import convert_released
from steph.mil.state import load_into, state_of
from steph.training.engine import Trainer
from tests.conftest import assert_states_close
from tests.merging.test_steph import Problem
from tests.training.test_engine import groups_of, released_names

MERGES = {"plain": None, "ties_merging": ties, "iso_c": iso_c}


def states(numbers):
    null, target = (convert_released(numbers.state(name)) for name in ("theta0", "theta_t"))
    return null, target, {f"s{i}": convert_released(numbers.state(f"theta_s{i}")) for i in range(5)}


def adamerging(null, target, pool, **options):
    """The paper's rows: one trained weight for each model of the pool, a new head, no auxiliary loss."""
    reading = {"weight": "parameter", "mix": 0.0, "top_k": None, "beta": 0.0, "gamma": 0.0, "dropout": 0.0}
    return STEPH(null, target, pool, **{**reading, **options})


@pytest.mark.parametrize("merge", MERGES)
@pytest.mark.parametrize("clamp", ["noclamp", "clamp"])
@pytest.mark.parametrize("pool", ["excl", "incl"])
def test_merged_model_is_the_releases(reference, float64, pool, clamp, merge):
    numbers = reference("f_adamerging")
    null, target, sources = states(numbers)
    members = {"target": target, **sources} if pool == "incl" else sources
    if MERGES[merge]:
        members = merge_pairs(null, target, members, MERGES[merge])
    model = adamerging(null, target, members, clamp_weights=clamp == "clamp")
    torch.testing.assert_close(
        model.weight_vector.detach(), numbers.tensor(f"init_w_{pool}").double(), rtol=1e-6, atol=0
    )  # 1/m, in float32 there
    head = {f"head.{k.rpartition('.')[2]}": v for k, v in numbers.state("new_head").items()}
    load_into(model, {"weight_vector": numbers.tensor(f"w_{pool}"), **head})
    tag = f"ada_{pool}_{clamp}_{merge}"
    bag = numbers.tensor("X")
    assert_states_close(model.eval().merged_state(bag), convert_released(numbers.state(tag)), rtol=1e-8)
    torch.testing.assert_close(model([bag])[0], numbers.tensor(f"{tag}_logits"), rtol=1e-9, atol=1e-12)


def test_five_updates_land_on_the_releases_weights(reference, float64):
    numbers = reference("k_train_steps")
    null, target, sources = states(numbers)
    model = adamerging(null, target, {"target": target, **sources})

    def ours(tag):
        return {
            "weight_vector" if k == "merge_weight" else k.replace("pred_head", "head"): v
            for k, v in numbers.state(f"adamerging_{tag}").items()
        }

    load_into(model, ours("init"))
    trainer = Trainer(model.train(), Recipe(), int(numbers["steps_per_epoch"]))
    for step in range(5):
        bags = [numbers.tensor(f"bag_{i}") for i in range(4 * step, 4 * step + 4)]
        bins, event = numbers.tensor("labels")[4 * step : 4 * step + 4].T
        used, seen = trainer.step(RaggedBatch.from_bags(bags), bins, event)
        nll, *_, total, rate = numbers["adamerging_record_nll_merge_mix_total_lr"][step]
        assert seen[0].item() == pytest.approx(nll, rel=1e-10)
        assert (seen[0] + seen[1]).item() == pytest.approx(total, rel=1e-10)
        assert used == pytest.approx(rate, rel=1e-10, abs=1e-20)
        if step + 1 in (1, 2, 5):
            assert_states_close(state_of(model, trainable_only=True), ours(f"after{step + 1}"), rtol=1e-9)


def test_weight_decay_groups_are_the_releases(reference, float64):
    from steph.merging.steph import RELEASED_NAMES as STEPH_NAMES

    numbers = reference("i_lr_groups")
    null, target, sources = states(reference("f_adamerging"))
    table = {**STEPH_NAMES, "merge_weight": "weight_vector"}
    models = {
        "adamerging": adamerging(null, target, sources),
        "dynamic_w": adamerging(null, target, sources, weight="hypernetwork", dim_hidden=4),
    }
    for name, model in models.items():
        plain, decayed = groups_of(model)
        assert plain == released_names(numbers, f"group_nodecay__{name}", table), name
        assert decayed == released_names(numbers, f"group_decay__{name}", table), name


def test_hypernetwork_driven_weights_merge_the_whole_pool(reference, float64):
    """Table 3: w is the hypernetwork's, there is no lambda and no sparsity."""
    problem = Problem(reference("e_steph"))
    model = problem.released(mix=0.0, top_k=None, weight="hypernetwork")
    bag = problem.numbers.tensor("X_A")
    w = model.coefficients(bag)[0]
    torch.testing.assert_close(w, problem.numbers.tensor("w_A"), rtol=1e-10, atol=1e-13)
    expected = dict(problem.null)
    for weight, source in zip(w, problem.sources.values(), strict=True):
        expected = {k: v + weight * (source[k] - problem.null[k]) for k, v in expected.items()}
    found = model.merged_state(bag)
    for name in found:
        if not name.startswith("head."):
            torch.testing.assert_close(found[name], expected[name], rtol=1e-10, atol=1e-13)
    model([bag])
    z_loss = float(problem.numbers["zloss_A_Knone"])
    assert model.auxiliary_loss().item() == pytest.approx(0.005 * z_loss, rel=1e-10)  # the balance term needs a K


def test_merged_pairs_keep_heads_and_say_where_they_stem_from(reference):
    from steph.mil.state import ModelState, state_fingerprint

    null, target, sources = states(reference("f_adamerging"))
    null = ModelState(null)
    null.origin = state_fingerprint(null)
    pool = merge_pairs(null, target, sources, ties)
    assert list(pool) == list(sources)
    for name, state in pool.items():
        assert state.origin == null.origin
        assert torch.equal(state["head.weight"], sources[name]["head.weight"])
        assert not torch.equal(state["embed.weight"], sources[name]["embed.weight"])


def test_clamped_weights_stay_between_0_and_1(reference, float64):
    null, target, sources = states(reference("f_adamerging"))
    given = torch.tensor([-0.5, 0.0, 0.3, 1.0, 2.0])
    for clamp, expected in ((True, [0, 0, 0.3, 1, 1]), (False, given.tolist())):
        model = adamerging(null, target, sources, clamp_weights=clamp)
        load_into(model, {**state_of(model, trainable_only=True), "weight_vector": given})
        assert model.coefficients(torch.zeros(2, 24))[0].tolist() == pytest.approx(expected)
