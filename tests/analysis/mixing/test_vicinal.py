"""Appendix B in numbers: what holds exactly holds exactly, and what is measured is what it says."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import torch

from steph import Refused
from steph.analysis.mixing import vicinal
from steph.analysis.mixing.pairs import pair
from steph.analysis.mixing.vicinal import CONVEX, EQ_9, EQ_10, FEATURES, LOSSES, MIXTURE, OTHER_BATCHES, TARGET_ALONE
from steph.data.bags import RaggedBatch
from steph.data.manifest import load_study
from steph.mil.abmil import ABMIL
from steph.survival import concordance_index, nll_loss, risk_score


def patients(n: int, seed: int) -> vicinal.Patients:
    rng = np.random.default_rng(seed)
    bags = [torch.from_numpy(rng.normal(size=(int(rng.integers(2, 6)), 7))) for _ in range(n)]
    time = rng.integers(10, 1800, n).astype(float)
    event = torch.from_numpy(rng.random(n) < 0.6)
    return vicinal.Patients(RaggedBatch.from_bags(bags), torch.from_numpy(time // 365).long(), event, time)


@pytest.fixture
def problem(float64):
    torch.manual_seed(0)
    network = ABMIL(7, 6, 5, 5, dropout=0.0).eval()
    return vicinal.Problem(network, patients(40, 1), patients(37, 2), patients(30, 3), alpha=0.5)


def find(table: pd.DataFrame, **chosen: object) -> pd.DataFrame:
    return table[(table[list(chosen)] == pd.Series(chosen)).all(axis=1)]


def test_at_one_step_the_mixture_is_the_task_vector_of_mixed_losses(problem):
    """Eq. 8, to rounding; from the second step on, and for mixed features, it is not."""
    table = vicinal.compare(problem, [1, 2, 5], [0.3, 0.5], [0, 1])
    one = find(table, steps=1, reference=LOSSES, candidate=MIXTURE)
    assert len(one) == 4 and (one["distance"] < 1e-13).all()
    assert (find(table, steps=1, reference=FEATURES, candidate=MIXTURE)["distance"] > 1e-5).all()
    later = table[(table["steps"] > 1) & (table["candidate"] == MIXTURE)]
    assert (later["distance"] > 1e-5).all()


def test_with_lambda_one_every_training_is_the_targets_own_and_with_zero_the_sources(problem):
    tau = vicinal.train(problem, [1.0, 0.0, 1.0, 0.0], [False, False, True, True], [1, 7], 0, 0.3)
    for steps in (1, 7):
        torch.testing.assert_close(tau[steps][2:], tau[steps][:2], rtol=1e-10, atol=1e-13)
    table = vicinal.compare(problem, [1, 7], [1.0], [0])
    assert (table.loc[table["candidate"] == MIXTURE, "distance"] < 1e-12).all()
    assert (table.loc[table["candidate"] == TARGET_ALONE, "cosine"] > 1 - 1e-12).all()


def test_the_gradient_is_that_of_a_plain_loop_over_pairs(problem):
    """One network, pair after pair, through autograd and the network's own head."""
    share, target, source = 0.3, problem.target.some([4, 9, 2]), problem.source.some([5, 0])
    flat = problem.null.expand(2, -1)
    kinds = torch.tensor([False, True])
    found = vicinal.gradients(problem, flat, torch.tensor([share, share]), kinds, target, source)
    network = problem.network
    h_t, h_s = network.encode(target.bags), network.encode(source.bags)

    def nll(feature, of, i):
        return nll_loss(torch.sigmoid(network.head(feature))[None], of.bins[i : i + 1], of.event[i : i + 1], 0.5)

    pairs = [(i, j) for i in range(3) for j in range(2)]
    apart = sum(share * nll(h_t[i], target, i) + (1 - share) * nll(h_s[j], source, j) for i, j in pairs)
    mixed = {(i, j): share * h_t[i] + (1 - share) * h_s[j] for i, j in pairs}
    joined = sum(share * nll(h, target, i) + (1 - share) * nll(h, source, j) for (i, j), h in mixed.items())
    for loss, own in zip((apart, joined), found, strict=True):
        expected = torch.autograd.grad(loss / len(pairs), list(network.parameters()), retain_graph=True)
        torch.testing.assert_close(own, torch.cat([g.flatten() for g in expected]), rtol=1e-10, atol=1e-14)


def test_the_loss_is_linear_in_the_label():
    """The likelihood of a label as counts (event in an interval, at risk and well in an interval): a mixed label has
    the mixed loss."""
    hazards = torch.rand(1, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1)) * 0.8 + 0.1

    def counts(y: int, event: bool, alpha: float) -> tuple[torch.Tensor, torch.Tensor]:
        died, well = torch.zeros(6, dtype=torch.float64), torch.zeros(6, dtype=torch.float64)
        died[y] = float(event)
        well[: y if event else y + 1] = 1.0 if event else 1 - alpha
        return died, well

    labels, share = [(2, True), (4, False)], 0.3
    died, well = (share * a + (1 - share) * b for a, b in zip(*(counts(*y, 0.5) for y in labels), strict=True))
    direct = -(died * hazards[0].log() + well * (1 - hazards[0]).log()).sum()
    own, other = (nll_loss(hazards, torch.tensor([y]), torch.tensor([e]), 0.5) for y, e in labels)
    torch.testing.assert_close(share * own + (1 - share) * other, direct, rtol=1e-12, atol=0)


def test_batches_are_the_same_for_all_and_follow_the_seed(problem):
    alone = vicinal.train(problem, [1.0], [False], [4], 0, 0.3)[4]
    among = vicinal.train(problem, [0.5, 1.0, 0.2], [True, False, False], [4], 0, 0.3)[4]
    torch.testing.assert_close(alone[0], among[1], rtol=1e-9, atol=1e-13)
    assert torch.equal(alone, vicinal.train(problem, [1.0], [False], [4], 0, 0.3)[4])
    assert not torch.allclose(alone, vicinal.train(problem, [1.0], [False], [4], 1, 0.3)[4])


def test_steps_go_down_the_gradient_at_the_rate_given(problem):
    """All patients fit in a batch of their own: one step is the whole gradient, in a known order or none."""
    few = vicinal.Problem(problem.network, problem.target.some(range(9)), problem.source, problem.test, 0.5)
    tau = vicinal.train(few, [1.0], [False], [1], 0, 0.3)[1]
    loss = nll_loss(torch.sigmoid(few.network(few.target.bags)), few.target.bins, few.target.event, 0.5)
    gradient = torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(few.network.parameters()))])
    torch.testing.assert_close(tau[0], -0.3 * gradient, rtol=1e-9, atol=1e-14)


def test_models_are_judged_as_networks_are(problem):
    losses, scores = vicinal.evaluate(problem, torch.stack([problem.null + 0.1, problem.null]))
    with torch.no_grad():
        hazards = torch.sigmoid(problem.network(problem.test.bags))
    expected = nll_loss(hazards, problem.test.bins, problem.test.event, alpha=0.0)
    assert losses[1] == pytest.approx(expected.item(), abs=1e-12) and losses[0] != losses[1]
    risk = risk_score(hazards).numpy()
    assert scores[1] == concordance_index(problem.test.time_days, problem.test.event.numpy(), risk)


def test_vectors_are_compared_with_what_they_are_beside(problem):
    table = vicinal.compare(problem, [1, 3], [0.5], [0, 1])
    pd.testing.assert_frame_equal(table, vicinal.compare(problem, [1, 3], [0.5], [0, 1]))
    assert set(table["candidate"]) == set(vicinal.CANDIDATES)
    other = find(table, steps=3, reference=FEATURES, candidate=OTHER_BATCHES)
    by_seed = [vicinal.train(problem, [0.5], [True], [3], seed, vicinal.RATE)[3][0] for seed in (0, 1)]
    cosine = float(torch.nn.functional.cosine_similarity(*by_seed, dim=0))
    assert other["cosine"].tolist() == pytest.approx([cosine, cosine], abs=1e-9)
    assert OTHER_BATCHES not in set(vicinal.compare(problem, [1], [0.5], [0])["candidate"])
    row = table[table["candidate"] == MIXTURE].iloc[0]
    gap2 = 1 + row["ratio"] ** 2 - 2 * row["ratio"] * row["cosine"]
    assert row["distance"] ** 2 == pytest.approx(gap2, abs=1e-9)


def test_over_seeds_means_and_extremes(problem):
    table = vicinal.compare(problem, [1, 3], [0.5], [0, 1, 2])
    summary = vicinal.summary(table)
    assert len(summary) == 2 * 2 * 4
    own, row = (find(t, steps=3, reference=LOSSES, candidate=TARGET_ALONE) for t in (table, summary))
    assert row["cosine"].iloc[0] == pytest.approx(own["cosine"].mean())
    assert (row["cosine_min"].iloc[0], row["cosine_max"].iloc[0]) == (own["cosine"].min(), own["cosine"].max())
    assert row["nll_gap"].iloc[0] == pytest.approx((own["nll"] - own["nll_reference"]).mean())


def test_a_training_that_diverges_is_refused(problem):
    with pytest.raises(Refused, match="diverged within 3 steps at rate 1e\\+300"):
        vicinal.train(problem, [1.0], [False], [3], 0, 1e300)


# ------------------------------------------------------------------------------------- Eq. 9's premise


def shifted(problem: vicinal.Problem, by: float) -> torch.Tensor:
    """M_0 with every logit moved by so much."""
    state = {k: v.detach().clone() for k, v in problem.network.named_parameters()}
    state["head.bias"] += by
    return problem.layout.flatten(state)


def test_the_gradient_is_convex_where_hazards_are_below_one_half_and_only_there(problem):
    models = {"low": shifted(problem, -2.0), "high": shifted(problem, 2.0)}
    table = vicinal.premise(problem, models, n_pairs=300).set_index(["place", "statement"])
    assert table.loc[("low", CONVEX), "above_half"] == 0 and table.loc[("high", CONVEX), "above_half"] == 1
    assert table.loc[("low", CONVEX), "holds"] == 1
    assert table.loc[("high", CONVEX), "holds"] < 0.05
    assert 0.3 < table.loc[("low", EQ_9), "holds"] < 1  # labels are mixed too: convexity in the logits is not enough
    assert 0.1 < table.loc[("low", EQ_10), "holds"] < 0.9
    assert np.isnan(table.loc[("low", EQ_10), "above_half"])
    assert ("random logits", CONVEX) in table.index and ("random logits", EQ_10) not in table.index
    again = vicinal.premise(problem, models, n_pairs=300)
    pd.testing.assert_frame_equal(table.reset_index(), again)


def test_eq_9_is_an_equality_where_nothing_differs(problem):
    """One patient as both the target's and the source's: both sides of Eq. 9 are the same."""
    only = problem.target.some([3])
    same = vicinal.Problem(problem.network, only, only, problem.test, 0.5)
    table = vicinal.premise(same, {"M_0": same.null}, n_pairs=50)
    at_null = table[(table["place"] == "M_0") & (table["statement"] != EQ_10)]
    assert (at_null["holds"] == 1).all() and (at_null["gap"] < 1e-12).all()


def test_eq_9_is_an_equality_where_only_labels_differ(problem):
    """Everybody gets the same logits: what is mixed then is the label alone, in which the gradient is linear."""
    state = {k: v.detach().clone() for k, v in problem.network.named_parameters()}
    state["head.weight"] *= 0
    table = vicinal.premise(problem, {"flat": problem.layout.flatten(state)}, n_pairs=50)
    row = find(table, place="flat", statement=EQ_9)
    assert row["holds"].item() == 1 and row["gap"].item() < 1e-12


# ------------------------------------------------------------------------------------------- of a study


def test_the_small_problem_of_a_study(tiny):
    found = vicinal.small_problem(tiny, pair(tiny.study, "SARC", "LIHC", 1))
    data = tiny.dataset("SARC")
    assert data.splits is not None and data.external is not None
    assert len(found.target) == len(data.splits.train(1)) and len(found.test) == len(data.external.cohort)
    assert max(found.source.bags.sizes) <= vicinal.MAX_PATCHES
    assert found.null.dtype == torch.float64 and found.network.dropout == 0
    torch.testing.assert_close(
        found.null, vicinal.small_problem(tiny, pair(tiny.study, "SARC", "LIHC", 1)).null, rtol=0, atol=0
    )


def test_a_large_set_of_patients_is_sampled(tiny, monkeypatch):
    monkeypatch.setattr(vicinal, "MAX_PATIENTS", 20)
    found = vicinal.small_problem(tiny, pair(tiny.study, "SARC", "LIHC", 0))
    assert len(found.target) == len(found.source) == 20
    train = tiny.dataset("SARC").splits.train(0)
    every = set(tiny.dataset("SARC").labels(train)["time_days"])
    assert set(found.target.time_days) <= every


def test_wide_features_are_projected_and_scaled(tiny, monkeypatch):
    whole = vicinal.small_problem(tiny, pair(tiny.study, "SARC", "LIHC", 0))
    monkeypatch.setattr(vicinal, "DIM_IN", 8)
    found = vicinal.small_problem(tiny, pair(tiny.study, "SARC", "LIHC", 0))
    assert found.target.bags.features.square().mean() == pytest.approx(1)
    assert found.network.embed.in_features == found.test.bags.features.shape[1] == 8
    assert found.target.bags.offsets == whole.target.bags.offsets
    # One linear map for all of them.
    wide, narrow = (torch.cat([p.target.bags.features, p.source.bags.features]) for p in (whole, found))
    onto = torch.linalg.lstsq(wide, narrow).solution
    torch.testing.assert_close(whole.test.bags.features @ onto, found.test.bags.features, rtol=1e-6, atol=1e-8)


def test_how_long_a_study_trains():
    assert vicinal.lengths(load_study("tiny")) == [1, 2, 5, 10, 20]
    assert vicinal.lengths(load_study("demo")) == vicinal.lengths(load_study("tcga")) == list(vicinal.LENGTHS)


def test_a_studys_comparison_is_kept_and_read_in_words(tiny, monkeypatch):
    monkeypatch.setattr(vicinal, "LENGTHS", (1, 2))
    asked = pair(tiny.study, "SARC", "LIHC", 0)
    table, premise = vicinal.of_pair(tiny, asked, [42, 43]), vicinal.premise_of_pair(tiny, asked, 42)
    monkeypatch.setattr(vicinal, "compare", None)
    pd.testing.assert_frame_equal(table, vicinal.of_pair(tiny, asked, [42, 43]))
    lines = vicinal.take_away(vicinal.summary(table), premise)
    assert len(lines) == 4 and lines[0].startswith("- After 1 step the mixture is, up to a relative distance of")
    holds = premise.set_index(["place", "statement"])["holds"]
    assert f"at M_t in {100 * holds['M_t', CONVEX]:.0f} % of the components" in lines[3]
