"""Appendix B in numbers: what holds exactly holds exactly, and what is measured is what it says."""

from collections.abc import Callable
from dataclasses import replace

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

TARGET = (1.0, LOSSES)  # training on the target alone


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


def changed(problem: vicinal.Problem, name: str, change: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
    """M_0 with one parameter changed."""
    state = {k: v.detach() for k, v in problem.network.named_parameters()}
    return problem.layout.flatten(state | {name: change(state[name])})


def find(table: pd.DataFrame, **chosen: object) -> pd.DataFrame:
    return table[(table[list(chosen)] == pd.Series(chosen)).all(axis=1)]


def test_at_one_step_the_mixture_is_the_task_vector_of_mixed_losses(problem):
    """Eq. 8, to rounding; from the second step on, and for mixed features, it is not."""
    mixtures = find(vicinal.compare(problem, [1, 2, 5], [0, 1]), candidate=MIXTURE)
    equal = (mixtures["steps"] == 1) & (mixtures["reference"] == LOSSES)
    assert equal.sum() == 2 * len(vicinal.LAMBDAS) and (mixtures.loc[equal, "distance"] < 1e-13).all()
    assert (mixtures.loc[~equal, "distance"] > 1e-5).all()


def test_with_lambda_one_every_training_is_the_targets_own_and_with_zero_the_sources(problem):
    tau = vicinal.train(problem, [(1.0, LOSSES), (0.0, LOSSES), (1.0, FEATURES), (0.0, FEATURES)], [1, 7], 0)
    for steps in (1, 7):
        torch.testing.assert_close(tau[steps][2:], tau[steps][:2], rtol=1e-10, atol=1e-13)


def test_the_gradient_is_that_of_a_plain_loop_over_pairs(problem):
    """One network, pair after pair, through autograd and the network's own head."""
    share, target, source = 0.3, problem.target.some(np.array([4, 9, 2])), problem.source.some(np.array([5, 0]))
    flat = problem.null.expand(2, -1)
    found = vicinal.gradients(problem, flat, [(share, LOSSES), (share, FEATURES)], target, source)
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
    alone = vicinal.train(problem, [TARGET], [4], 0)[4]
    among = vicinal.train(problem, [(0.5, FEATURES), TARGET, (0.2, LOSSES)], [4], 0)[4]
    torch.testing.assert_close(alone[0], among[1], rtol=1e-9, atol=1e-13)
    assert torch.equal(alone, vicinal.train(problem, [TARGET], [4], 0)[4])
    assert not torch.allclose(alone, vicinal.train(problem, [TARGET], [4], 1)[4])


def test_steps_go_down_the_gradient_at_the_rate_given(problem):
    """All patients fit in a batch of their own: one step is the whole gradient, in a known order or none."""
    few = replace(problem, target=problem.target.some(np.arange(9)))
    tau = vicinal.train(few, [TARGET], [1], 0)[1]
    loss = nll_loss(torch.sigmoid(few.network(few.target.bags)), few.target.bins, few.target.event, 0.5)
    gradient = torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(few.network.parameters()))])
    torch.testing.assert_close(tau[0], -vicinal.RATE * gradient, rtol=1e-9, atol=1e-14)


def test_models_are_judged_as_networks_are(problem):
    losses, scores = vicinal.evaluate(problem, torch.stack([problem.null + 0.1, problem.null]))
    with torch.no_grad():
        hazards = torch.sigmoid(problem.network(problem.test.bags))
    expected = nll_loss(hazards, problem.test.bins, problem.test.event, alpha=0.0)
    assert losses[1] == pytest.approx(expected.item(), abs=1e-12) and losses[0] != losses[1]
    risk = risk_score(hazards).numpy()
    assert scores[1] == concordance_index(problem.test.time_days, problem.test.event.numpy(), risk)


def test_vectors_are_compared_and_summed_up_over_seeds(problem):
    table = vicinal.compare(problem, [1, 3], [0, 1])
    pd.testing.assert_frame_equal(table, vicinal.compare(problem, [1, 3], [0, 1]))
    assert set(table["candidate"]) == set(vicinal.CANDIDATES)
    other = find(table, steps=3, reference=FEATURES, candidate=OTHER_BATCHES, **{"lambda": 0.5})
    first, second = (vicinal.train(problem, [(0.5, FEATURES)], [3], seed)[3][0] for seed in (0, 1))
    cosine = float(torch.nn.functional.cosine_similarity(first, second, dim=0))
    assert other["cosine"].tolist() == pytest.approx([cosine, cosine], abs=1e-9)
    assert other["distance"].iloc[0] == pytest.approx(float((second - first).norm() / first.norm()), abs=1e-9)
    summary = vicinal.summary(table)
    assert len(summary) == 2 * len(vicinal.LAMBDAS) * 2 * 4
    chosen = {"steps": 3, "lambda": 0.5, "reference": LOSSES, "candidate": TARGET_ALONE}
    own, row = find(table, **chosen)["cosine"], find(summary, **chosen).iloc[0]
    assert row[["cosine", "cosine_min", "cosine_max"]].tolist() == pytest.approx([own.mean(), own.min(), own.max()])


def test_a_training_that_diverges_is_refused(problem, monkeypatch):
    monkeypatch.setattr(vicinal, "RATE", 1e300)
    with pytest.raises(Refused, match="diverged within 3 steps at rate 1e\\+300"):
        vicinal.train(problem, [TARGET], [3], 0)


def test_the_gradient_is_convex_where_hazards_are_below_one_half_and_only_there(problem):
    shifts = {"low": -2.0, "high": 2.0}  # of every logit
    models = {name: changed(problem, "head.bias", lambda bias, by=by: bias + by) for name, by in shifts.items()}
    table = vicinal.premise(problem, models, 0)
    pd.testing.assert_frame_equal(table, vicinal.premise(problem, models, 0))
    table = table.set_index(["place", "statement"])
    assert table.loc[("low", CONVEX), "above_half"] == 0 and table.loc[("high", CONVEX), "above_half"] == 1
    holds = table["holds"]
    assert holds["low", CONVEX] == 1 and holds["high", CONVEX] < 0.05
    assert 0.3 < holds["low", EQ_9] < 1  # labels are mixed too: convexity in the logits is not enough
    assert 0.1 < holds["low", EQ_10] < 0.9 and np.isnan(table.loc[("low", EQ_10), "above_half"])
    assert ("random logits", CONVEX) in table.index and ("random logits", EQ_10) not in table.index


def test_eq_9_is_an_equality_where_nothing_differs_but_labels(problem):
    """One patient as both the target's and the source's; and the same logits for everybody, where what is mixed is the
    label alone, in which the gradient is linear."""
    only = problem.target.some(np.array([3]))
    at_null = vicinal.premise(replace(problem, target=only, source=only), {"M_0": problem.null}, 0)
    flat = vicinal.premise(problem, {"flat": changed(problem, "head.weight", torch.zeros_like)}, 0)
    for table, place, statement in ((at_null, "M_0", CONVEX), (at_null, "M_0", EQ_9), (flat, "flat", EQ_9)):
        row = find(table, place=place, statement=statement)
        assert row["holds"].item() == 1 and row["gap"].item() < 1e-12


def test_the_small_problem_of_a_study_and_of_a_sample_of_its_patients(tiny, monkeypatch):
    found = vicinal.small_problem(tiny, pair(tiny, "SARC", "LIHC", 1))
    data = tiny.dataset("SARC")
    assert len(found.target) == len(data.splits.train(1)) and len(found.test) == len(data.external.cohort)
    assert max(found.source.bags.sizes) <= vicinal.MAX_PATCHES
    assert found.null.dtype == torch.float64 and found.network.dropout == 0
    monkeypatch.setattr(vicinal, "MAX_PATIENTS", 20)
    sampled = vicinal.small_problem(tiny, pair(tiny, "SARC", "LIHC", 1))
    assert torch.equal(found.null, sampled.null) and len(sampled.target) == len(sampled.source) == 20
    assert set(sampled.target.time_days) <= set(data.labels(data.splits.train(1))["time_days"])


def test_wide_features_are_projected_and_scaled(tiny, monkeypatch):
    whole = vicinal.small_problem(tiny, pair(tiny, "SARC", "LIHC", 0))
    monkeypatch.setattr(vicinal, "DIM_IN", 8)
    found = vicinal.small_problem(tiny, pair(tiny, "SARC", "LIHC", 0))
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
    asked = pair(tiny, "SARC", "LIHC", 0)
    table, premise = vicinal.of_pair(tiny, asked, [42, 43]), vicinal.premise_of_pair(tiny, asked, 42)
    monkeypatch.setattr(vicinal, "compare", None)
    pd.testing.assert_frame_equal(table, vicinal.of_pair(tiny, asked, [42, 43]))
    lines = vicinal.take_away(vicinal.summary(table), premise)
    assert len(lines) == 4 and lines[0].startswith("- After 1 step the mixture is, up to a relative distance of")
    holds = premise.set_index(["place", "statement"])["holds"]
    assert f"at M_t in {100 * holds['M_t', CONVEX]:.0f} % of the components" in lines[3]
