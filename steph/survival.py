"""Discrete-time survival: bins, likelihood, risk and concordance.

Time is cut into ``T`` intervals of equal width (32 years in the paper's experiments); a network gives the hazard of
each interval, the probability of the event in it given survival up to it. Survival to the end of interval ``t`` is
``S(t) = prod_{u<=t} (1 - h(u))``.
"""

import math
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from steph import Refused


def bin_index(days: Any, n_bins: int = 32, width_days: float = 365) -> np.ndarray:
    """Interval of each follow-up time: ``min(floor(days / width_days), n_bins - 1)``; the last interval is open.

    days: (N,) follow-up times in days, finite and not negative.
    Returns int64 (N,). Raises `Refused` for a missing, infinite or negative time.
    """
    days = _numbers(days, "follow-up times")
    bad = ~np.isfinite(days) | (days < 0)
    if bad.any():
        raise Refused(
            f"{int(bad.sum())} of {days.size} follow-up times are missing, infinite or negative "
            f"(first: {days[bad][0]}); expected days >= 0. Remove or correct these rows."
        )
    return np.minimum(days // width_days, n_bins - 1).astype(np.int64)


def targets(
    labels: pd.DataFrame, n_bins: int, width_days: float, device: torch.device | str = "cpu"
) -> tuple[Tensor, Tensor]:
    """What a loss compares hazards with, from a table with time_days and event: the interval of each patient's time
    (`bin_index`), (N,) int64, and whether it ends in an event, (N,) bool."""
    bins = torch.from_numpy(bin_index(labels["time_days"], n_bins, width_days))
    return bins.to(device), torch.from_numpy(labels["event"].to_numpy(dtype=bool)).to(device)


def _numbers(values: Any, what: str) -> np.ndarray:
    try:
        return np.asarray(values, dtype=np.float64)
    except (TypeError, ValueError):
        raise Refused(f"{what}: expected numbers, got {values!r}.") from None


def survival_curve(hazards: Tensor) -> Tensor:
    """Survival probability at the end of each interval, (..., T) from hazards (..., T)."""
    return torch.cumprod(1 - hazards, dim=-1)


def risk_score(hazards: Tensor) -> Tensor:
    """Risk (...,) from hazards (..., T): minus the sum of the survival curve. Higher = worse prognosis."""
    return -survival_curve(hazards).sum(dim=-1)


EPS = 1e-7
"""Below it, arguments of logarithms in the likelihood are taken to be this."""


def nll_loss(
    hazards: Tensor,
    bin_index: Tensor,
    event: Tensor,
    alpha: float = 0.5,
    eps: float = EPS,
    reduction: str = "mean",
) -> Tensor:
    """Negative log-likelihood of discrete survival (the paper's L_sl; Zadeh and Schmid, TPAMI 2020).

    A patient with an event in interval y costs ``-log S(y-1) - log h(y)``; a censored one ``-(1-alpha) log S(y)``.
    Every logarithm's argument is clamped at `eps` from below.

    hazards: (B, T) in [0, 1], or (G, B, T), of G models. bin_index: (B,) int64 in 0..T-1. event: (B,) 1 = event seen,
    0 = censored. alpha: how much less a censored patient counts; 0.5 in training, 0 when a loss is reported.
    Returns a scalar (reduction "mean" or "sum") or (B,) or (G, B) ("none").
    """
    survival = torch.cat([torch.ones_like(hazards[..., :1]), survival_curve(hazards)], dim=-1)
    y = bin_index.view(-1, 1).expand(*hazards.shape[:-1], 1)
    before, at, after = (
        x.squeeze(-1).clamp(min=eps).log()
        for x in (survival.gather(-1, y), hazards.gather(-1, y), survival.gather(-1, y + 1))
    )
    event = event.to(hazards.dtype)
    loss = -event * (before + at) - (1 - alpha) * (1 - event) * after
    if reduction == "none":
        return loss
    return loss.mean() if reduction == "mean" else loss.sum()


def nll_of_logits(logits: Tensor, bin_index: Tensor, event: Tensor, alpha: float = 0.5) -> Tensor:
    """`nll_loss` of the hazards sigmoid(logits), its mean over B patients: what training minimises.

    logits: (B, T), finite. The other arguments as of `nll_loss`. Its gradient is written by hand: with autograd's of
    `nll_loss` a step of the demo's size (16 bags of 64 patches) takes 1.10 times as long for ABMIL and 1.07 for STEPH
    (measured 2026-11-30; `python -m benchmarks --only by_hand`).
    """
    return _NllOfLogits.apply(logits, bin_index, event.bool(), alpha, -math.log(EPS))


class _NllOfLogits(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, bin_index: Tensor, event: Tensor, alpha: float, most: float) -> Tensor:
        n, y, died = len(logits), bin_index.unsqueeze(1), event.to(logits.dtype)
        survived = torch.arange(logits.shape[1], device=logits.device) < (bin_index + ~event).unsqueeze(1)
        until = (F.softplus(logits) * survived).sum(1)  # -log S of the last interval survived, (B,)
        logit = logits.gather(1, y).squeeze(1)
        at = F.softplus(-logit)  # -log h(y)
        weight, died = (1 - alpha * (1 - died)) / n, died / n
        grad = torch.sigmoid(logits) * survived * (weight * (until <= most)).unsqueeze(1)
        grad.scatter_add_(1, y, (torch.sigmoid(-logit) * (at <= most) * -died).unsqueeze(1))
        ctx.save_for_backward(grad)
        return torch.dot(until.clamp_(max=most), weight) + torch.dot(at.clamp_(max=most), died)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return grads[0] * ctx.saved_tensors[0], None, None, None, None


TIED = 1e-8
"""Risks this near count as tied."""


def comparable_pairs(time: np.ndarray, event: np.ndarray) -> np.ndarray:
    """Which pairs of N patients a C-index compares: (D, N) bool, the D with an event, in their order, against all. A
    pair is comparable when the earlier of the two had the event, or both times are equal and only one had."""
    died = time[event][:, None]
    return (time > died) | ((time == died) & ~event)


def concordant_pairs(risk: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Is the first of each pair at the higher risk, (D, N) from risks (D,) and (N,)? 1 yes, 0 no, 1/2 tied (`TIED`)."""
    difference = risk[:, None] - other
    return (difference > TIED) + 0.5 * (np.abs(difference) <= TIED)


def concordance_index(time_days: Any, event: Any, risk: Any) -> float:
    """Harrell's C-index on continuous time: the share of comparable pairs in which the shorter survival has the
    higher risk, of those that are comparable (`comparable_pairs`); risks within `TIED` count one half (lifelines has no
    such tolerance; otherwise the two agree).

    time_days, event, risk: (N,); event 1 or 0; higher risk = worse. Raises `Refused` where no pair is comparable
    (fewer than two patients, or no event before the longest follow-up) or a time or risk is not finite.
    """
    time, risk = _numbers(time_days, "follow-up times"), _numbers(risk, "risks")
    died = np.asarray(event).astype(bool)
    if not np.isfinite(time).all():
        raise Refused(f"{int((~np.isfinite(time)).sum())} of {time.size} follow-up times are missing or infinite.")
    if not np.isfinite(risk).all():
        raise Refused(f"{int((~np.isfinite(risk)).sum())} of {risk.size} risks are not finite; the model diverged.")
    comparable = comparable_pairs(time, died)
    if not comparable.any():
        raise Refused(
            f"no comparable pair among {time.size} patients with {int(died.sum())} events: the C-index is undefined. "
            "Use a fold or a cohort in which somebody with an event was followed for less time than somebody else."
        )
    return float(concordant_pairs(risk[died], risk)[comparable].sum() / comparable.sum())
