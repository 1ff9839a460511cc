import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from steph import Refused
from steph.survival import bin_index, concordance_index, nll_loss, nll_of_logits, risk_score, survival_curve


@pytest.mark.parametrize("case", ["max_below", "max_equal", "max_above", "int_days"])
def test_bins_are_the_releases(reference, case):
    numbers = reference("c_timebins")
    label = "label_int_days" if case == "int_days" else f"label_{case}"
    np.testing.assert_array_equal(bin_index(numbers[f"t_{case}"]), numbers[label])


@pytest.mark.parametrize(("tag", "alpha"), [("alpha05", 0.5), ("alpha0", 0.0), ("alpha015", 0.15)])
def test_likelihood_and_gradient_are_the_releases(reference, tag, alpha):
    numbers = reference("b_survmle")
    logits = numbers.tensor("logits").requires_grad_()
    bins, event = numbers.tensor("t_bin"), numbers.tensor("event")
    hazards = torch.sigmoid(logits)
    for reduction, name in [("none", "per_sample"), ("mean", "mean"), ("sum", "sum")]:
        found = nll_loss(hazards, bins, event, alpha=alpha, reduction=reduction)
        torch.testing.assert_close(found, numbers.tensor(f"loss_{name}_{tag}"), rtol=1e-12, atol=1e-14)
    of_logits = nll_of_logits(logits, bins, event, alpha)
    torch.testing.assert_close(of_logits, numbers.tensor(f"loss_mean_{tag}"), rtol=1e-12, atol=1e-14)
    for loss in (nll_loss(hazards, bins, event, alpha=alpha), of_logits):
        [gradient] = torch.autograd.grad(3 * loss, logits)
        torch.testing.assert_close(gradient, 3 * numbers.tensor(f"grad_logits_mean_{tag}"), rtol=1e-10, atol=1e-14)
    if alpha != 0.15:  # hazards of 0 and 1 are clamped as there
        hazards, bins, event = (numbers.tensor(f"clamp_{name}") for name in ("hazards", "t_bin", "event"))
        found = nll_loss(hazards, bins, event, alpha=alpha, eps=float(numbers["eps"]), reduction="none")
        torch.testing.assert_close(found, numbers.tensor(f"clamp_loss_per_sample_{tag}"), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("size", [1, 5, 12, 40, 1000])
def test_the_likelihood_of_logits_is_that_of_hazards_however_large_they_are(size):
    draw = torch.Generator().manual_seed(0)
    plain = (size * torch.randn(60, 6, generator=draw, dtype=torch.float64)).requires_grad_()
    ours = plain.detach().clone().requires_grad_()
    bins, event = torch.arange(60) % 6, torch.arange(60) // 6 % 2 == 0
    expected, found = nll_loss(torch.sigmoid(plain), bins, event), nll_of_logits(ours, bins, event)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=0)  # 1 - h has lost digits where h is almost 1
    expected.backward()
    found.backward()
    assert (ours.grad != 0).any(0).all() or size == 1000
    torch.testing.assert_close(ours.grad, plain.grad, rtol=1e-9, atol=1e-12)


CASES = ["random", "timeties", "riskties", "bothties", "lastgroup", "constant", "tolerance", "tolerance_shuffled"]


@pytest.mark.parametrize("case", CASES)
def test_c_index_is_scikit_survivals(reference, case):
    numbers = reference("d_cindex")
    if f"{case}_hazards" in numbers.arrays:
        risk = risk_score(numbers.tensor(f"{case}_hazards"))
        np.testing.assert_allclose(risk, numbers[f"{case}_risk"], rtol=1e-12)
    found = concordance_index(numbers[f"{case}_time"], numbers[f"{case}_event"], numbers[f"{case}_risk"])
    assert found == pytest.approx(float(numbers[f"{case}_cindex"]), rel=1e-12)


@given(st.lists(st.tuples(st.integers(0, 40), st.booleans(), st.integers(-5, 5)), min_size=2, max_size=40))
def test_c_index_agrees_with_two_packages_on_anything(rows):
    sksurv = pytest.importorskip("sksurv.metrics")
    time, event, risk = (np.array(column) for column in zip(*rows, strict=True))
    try:
        expected = sksurv.concordance_index_censored(event.astype(bool), time.astype(float), risk.astype(float))[0]
    except (ValueError, ZeroDivisionError):  # all censored, or nothing comparable
        expected = np.nan
    from lifelines.utils import concordance_index as lifelines_index

    if np.isnan(expected):
        with pytest.raises(Refused, match="no comparable pair"):
            concordance_index(time, event, risk)
    else:
        found = concordance_index(time, event, risk)
        assert found == pytest.approx(expected, abs=1e-12)
        assert found == pytest.approx(lifelines_index(time, -risk, event), abs=1e-12)


def test_higher_risk_is_worse():
    assert concordance_index([1, 2, 3], [1, 1, 1], [3, 2, 1]) == 1.0
    early, late = torch.zeros(2, 4).scatter(1, torch.tensor([[0], [3]]), 0.9).split(1)
    assert risk_score(early) > risk_score(late)
    assert survival_curve(early)[0].tolist() == pytest.approx([0.1] * 4)


@pytest.mark.parametrize(
    ("time", "risk", "message"),
    [([1, bad, 3], [3, 2, 1], "follow-up times") for bad in (np.nan, np.inf, "x")]
    + [([1, 2, 3], [0.0, np.nan, 0.0], "1 of 3 risks are not finite")],
)
def test_concordance_refuses_what_is_no_number(time, risk, message):
    with pytest.raises(Refused, match=message):
        concordance_index(time, [1, 1, 0], risk)


@given(st.lists(st.floats(), max_size=20), st.integers(1, 40), st.floats(1, 1e6))
@example([0.0, 5e-324, 1.7e308], 32, 365.0)
@example([10.0, np.nan], 32, 365.0)
@example([10.0, np.inf], 32, 365.0)
@example([10.0, -1.0], 32, 365.0)
@example([10.0, "x"], 32, 365.0)
def test_every_time_has_one_interval_or_is_refused(days, n_bins, width):
    if "x" in days or not all(np.isfinite(day) and day >= 0 for day in days):
        with pytest.raises(Refused, match="expected numbers" if "x" in days else "missing, infinite or negative"):
            bin_index(days, n_bins, width)
        return
    bins = bin_index(days, n_bins, width)
    assert bins.dtype == np.int64 and bins.shape == (len(days),) and ((bins >= 0) & (bins < n_bins)).all()
    assert (np.diff(bins[np.argsort(days, kind="stable")]) >= 0).all(), "longer is never an earlier interval"


@given(
    hnp.arrays(np.float64, hnp.array_shapes(min_dims=2, max_dims=2, max_side=6), elements=st.floats(0, 1)),
    st.randoms(use_true_random=False),
    st.floats(0, 1),
)
@example(np.zeros((2, 3)), None, 0.5)
@example(np.ones((2, 3)), None, 0.5)
def test_losses_and_risks_of_any_hazards_are_finite(hazards, chance, alpha):
    n, bins = hazards.shape
    where = torch.tensor([chance.randrange(bins) if chance else 0 for _ in range(n)])
    event = torch.tensor([chance.random() < 0.5 if chance else i % 2 == 0 for i in range(n)])
    given_hazards = torch.from_numpy(hazards)
    each = nll_loss(given_hazards, where, event, alpha, reduction="none")
    assert each.shape == (n,) and torch.isfinite(each).all() and (each >= -1e-9).all()
    assert nll_loss(given_hazards, where, event, alpha).item() == pytest.approx(each.mean().item())
    of_models = nll_loss(torch.stack([given_hazards / 2, given_hazards]), where, event, alpha, reduction="none")
    assert of_models.shape == (2, n) and torch.equal(of_models[1], each)
    curve, risk = survival_curve(given_hazards), risk_score(given_hazards)
    assert (curve >= 0).all() and (curve <= 1).all() and (curve[:, 1:] <= curve[:, :-1]).all()
    assert (risk <= 0).all() and (risk >= -bins).all()
