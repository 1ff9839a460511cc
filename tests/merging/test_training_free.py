"""Training-free merging: closed forms against straight-line computations, and their limits."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from steph.data.bags import RaggedBatch
from steph.merging import MergedEncoder, task_vector
from steph.merging.steph import mixture_coefficients
from steph.merging.training_free import by_concordance, by_cosine, by_scores, by_worth, merged, patient_scores
from steph.mil import ABMIL
from steph.mil.state import ModelState, load_into
from steph.survival import nll_loss
from tests.conftest import assert_states_close
from tests.helpers.made_pool import Pool, encoder, moved

positive = st.floats(0.01, 10)


@pytest.fixture
def pool(float64):
    return Pool(lambda: ABMIL(6, 5, 4, 8))


@pytest.fixture
def sources(pool):
    return list(pool.sources.values())


def scores_of(pool, sources, n=12):
    """Scores of patients with made-up bags and labels, and what they were made from."""
    generator = torch.Generator().manual_seed(1)
    bags = [torch.randn(2 + i % 4, 6, generator=generator) for i in range(n)]
    bins, event = torch.arange(n) % 8, torch.arange(n) % 2
    vectors = [task_vector(state, pool.null) for state in (pool.target, *sources)]
    network = pool.make().eval()
    load_into(network, pool.target)
    merging = MergedEncoder(pool.make(), pool.null, vectors).eval()
    scores = patient_scores(merging, network.head, RaggedBatch.from_bags(bags), bins, event, 0.5)
    return scores, (bags, bins, event, network, vectors)


def coefficients(mixture):
    """(1 + m,): of tau_t and of each source's vector."""
    w, lam = mixture
    return mixture_coefficients(w[None], lam[None], torch.arange(len(w))[None])[0]


def test_the_merged_state_is_the_mixture_of_task_vectors(pool, sources):
    w, lam = torch.tensor([0.2, 0.0, 0.7]), torch.tensor([0.9, 0.3, 0.4])
    expected = dict(pool.target)
    for name, base in encoder(pool.null).items():
        tau = pool.target[name] - base
        mixtures = [lam[j] * tau + (1 - lam[j]) * (source[name] - base) for j, source in enumerate(sources)]
        expected[name] = base + sum(share * mixture for share, mixture in zip(w, mixtures, strict=True))
    assert_states_close(merged(pool.null, pool.target, sources, (w, lam)), expected)


@given(own=positive, worth=st.lists(st.floats(0, 10), min_size=1, max_size=8), top_k=st.integers(1, 8))
def test_worth_gives_a_weighted_mean_of_the_most_worthy(own, worth, top_k):
    w, lam = by_worth(own, torch.tensor(worth, dtype=torch.float64), top_k)
    assert w.sum().item() == pytest.approx(1) and (w >= 0).all() and (w > 0).sum() <= top_k
    assert ((lam >= 0) & (lam <= 1)).all()
    selected = [x for x, share in zip(worth, w.tolist(), strict=True) if share > 0]
    assert sorted(worth)[-len(selected) :] == sorted(selected)
    assert coefficients((w, lam)).sum().item() == pytest.approx(1)


@pytest.mark.parametrize(
    ("own", "worth", "top_k", "w", "lam"),
    [
        (2.0, [2.0, 2.0, 1.0], 2, [0.5, 0.5, 0.0], [0.5, 0.5, 2 / 3]),  # equal worth is an even mean
        (0.0, [0.3, 0.0], None, [1.0, 0.0], [0.0, 1.0]),  # a target without worth leaves it to the sources
    ],
)
def test_worth_at_its_limits(own, worth, top_k, w, lam):
    mixture = by_worth(own, torch.tensor(worth), top_k)
    assert mixture[0].tolist() == pytest.approx(w) and mixture[1].tolist() == pytest.approx(lam)


def test_cosines_against_a_straight_line_computation(pool, sources):
    def flat(state):
        return torch.cat([value.flatten() for value in pool.vector(state).values()])

    away = ModelState({k: 2 * v - pool.target[k] for k, v in pool.null.items()}, pool.null.origin)
    w, lam = by_cosine(pool.null, pool.target, [*sources, away], None)
    tau = flat(pool.target)
    cosines = [float(tau @ flat(s) / (tau.norm() * flat(s).norm())) for s in (*sources, away)]
    worth = [max(0.0, c) for c in cosines]
    assert any(worth) and cosines[3] == pytest.approx(-1), "one went the other way and is worth nothing"
    assert w.tolist() == pytest.approx([x / sum(worth) for x in worth])
    assert lam.tolist() == pytest.approx([1 / (1 + x) for x in worth])


def test_cosine_knows_no_lengths_and_no_heads(pool, sources):
    def changed(state):
        longer = moved(encoder(pool.null), [pool.vector(state)], [3])
        return ModelState({**{k: torch.randn_like(v) for k, v in state.items()}, **longer}, pool.null.origin)

    other = by_cosine(pool.null, pool.target, [changed(s) for s in sources], 2)
    for values, expected in zip(other, by_cosine(pool.null, pool.target, sources, 2), strict=True):
        torch.testing.assert_close(values, expected)


def test_concordance_counts_from_chance():
    w, lam = by_concordance(0.9, [0.7, 0.5, 0.4, 0.6], None)
    assert w.tolist() == pytest.approx([2 / 3, 0, 0, 1 / 3])
    assert lam.tolist() == pytest.approx([0.4 / 0.6, 1, 1, 0.4 / 0.5])
    assert coefficients(by_concordance(0.7, [0.5, 0.45, 0.2], 2)).tolist() == [1, 0, 0, 0]


def test_scores_are_the_derivative_of_each_patients_loss(pool, sources):
    scores, (bags, bins, event, network, vectors) = scores_of(pool, sources)
    assert scores.shape == (12, 4)
    for j, vector in enumerate(vectors):
        losses = []
        for step in (1e-6, -1e-6):
            load_into(network, moved(pool.target, [encoder(vector)], [step]))
            losses.append(nll_loss(torch.sigmoid(network(bags)), bins, event, alpha=0.5, reduction="none"))
        numeric = (losses[0] - losses[1]) / 2e-6
        torch.testing.assert_close(scores[:, j], numeric.detach(), rtol=1e-5, atol=1e-8)


def test_the_scoring_step_solves_its_equations(pool, sources):
    scores, _ = scores_of(pool, sources)
    fisher = sum(torch.outer(s, s) for s in scores)
    step = torch.linalg.inv(fisher + torch.eye(4)) @ sum(scores)
    expected = (torch.tensor([1.0, 0, 0, 0]) - step).clamp(min=0)
    assert (expected[1:] > 0).any()
    torch.testing.assert_close(coefficients(by_scores(scores, None)), expected)
    one = coefficients(by_scores(scores, 1))
    assert (one[1:] > 0).sum() == 1 and one[1:].max() == pytest.approx(expected[1:].max().item())
    assert coefficients(by_scores(torch.zeros(5, 4), 2)).tolist() == [1, 0, 0, 0], "at their best they keep the target"


def ways(pool, sources, top_k=None):
    return {
        "cosine": by_cosine(pool.null, pool.target, sources, top_k),
        "concordance": by_concordance(0.8, [0.8] * len(sources), top_k),
        "scores": by_scores(scores_of(pool, sources)[0], top_k),
    }


@pytest.mark.parametrize("way", ["cosine", "concordance", "scores"])
@pytest.mark.parametrize("top_k", [1, 2, None])
def test_sources_that_are_the_target_itself(pool, way, top_k):
    """Merging twins gives the target back; the scoring step may make its one vector longer or shorter."""
    mixture = ways(pool, [pool.target] * 3, top_k)[way]
    share = 1.0 if way != "scores" else float(coefficients(mixture).sum())
    expected = {**pool.target, **moved(encoder(pool.null), [pool.vector(pool.target)], [share])}
    assert_states_close(merged(pool.null, pool.target, [pool.target] * 3, mixture), expected)


@pytest.mark.parametrize("way", ["cosine", "scores"])
def test_sources_that_learnt_nothing_are_left_out(pool, way):
    """A zero task vector has no direction and moves no loss."""
    mixture = ways(pool, [pool.null] * 3)[way]
    assert coefficients(mixture)[1:].tolist() == [0, 0, 0]
    if way == "cosine":
        assert_states_close(merged(pool.null, pool.target, [pool.null] * 3, mixture), dict(pool.target))
