"""AdaMerging is STEPH without mixing, sparsity and hypernetworks: held to the release's AdaMerging."""

import pytest
import torch

from steph.merging import iso_c, merge_pairs, task_vector, ties
from steph.mil import convert_released
from steph.mil.state import load_into, state_of
from tests.conftest import assert_states_close
from tests.helpers.made_pool import adamerging, encoder, moved, released_pool
from tests.merging.test_steph import Problem

MERGES = {"plain": None, "ties_merging": ties, "iso_c": iso_c}


@pytest.mark.parametrize("merge", MERGES)
@pytest.mark.parametrize("clamp", ["noclamp", "clamp"])
@pytest.mark.parametrize("pool", ["excl", "incl"])
def test_merged_model_is_the_releases(reference, float64, pool, clamp, merge):
    numbers = reference("f_adamerging")
    null, target, sources = released_pool(numbers)
    members = {"target": target, **sources} if pool == "incl" else sources
    if MERGES[merge]:
        members = merge_pairs(null, target, members, MERGES[merge])
    model = adamerging(null, target, members, clamp_weights=clamp == "clamp")
    initial = numbers.tensor(f"init_w_{pool}").double()  # 1/m, in float32 there
    torch.testing.assert_close(model.weight_vector.detach(), initial, rtol=1e-6, atol=0)
    head = {f"head.{k.rpartition('.')[2]}": v for k, v in numbers.state("new_head").items()}
    load_into(model, {"weight_vector": numbers.tensor(f"w_{pool}"), **head})
    tag = f"ada_{pool}_{clamp}_{merge}"
    bag = numbers.tensor("X")
    assert_states_close(model.eval().merged_state(bag), convert_released(numbers.state(tag)), rtol=1e-8)
    torch.testing.assert_close(model([bag])[0], numbers.tensor(f"{tag}_logits"), rtol=1e-9, atol=1e-12)


def test_hypernetwork_driven_weights_merge_the_whole_pool(reference, float64):
    """Table 3: w is the hypernetwork's, there is no lambda and no sparsity."""
    problem = Problem(reference("e_steph"))
    model = problem.released(mix=0.0, top_k=None, weight="hypernetwork")
    bag = problem.numbers.tensor("X_A")
    w = model.coefficients(bag)[0]
    torch.testing.assert_close(w, problem.numbers.tensor("w_A"), rtol=1e-10, atol=1e-13)
    expected = moved(problem.null, [task_vector(source, problem.null) for source in problem.sources.values()], w)
    assert_states_close(encoder(model.merged_state(bag)), encoder(expected), rtol=1e-10)
    loss = model.forward_pass([bag]).auxiliary_loss.item()
    assert loss == pytest.approx(0.005 * float(problem.numbers["zloss_A_Knone"]), rel=1e-10)  # balancing needs a K


def test_clamped_weights_stay_between_0_and_1(reference, float64):
    null, target, sources = released_pool(reference("f_adamerging"))
    weights = torch.tensor([-0.5, 0.0, 0.3, 1.0, 2.0])
    for clamp, expected in ((True, [0, 0, 0.3, 1, 1]), (False, weights.tolist())):
        model = adamerging(null, target, sources, clamp_weights=clamp)
        load_into(model, {**state_of(model, trainable_only=True), "weight_vector": weights})
        assert model.coefficients(torch.zeros(2, 24))[0].tolist() == pytest.approx(expected)
