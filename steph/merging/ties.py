"""TIES (Yadav et al., NeurIPS 2023) of a pair of task vectors: trim, elect a sign, merge what agrees with it."""

from typing import Literal

import torch
from torch import Tensor

from steph import Refused
from steph.merging.task_vectors import Layout, State, check_same_network


def ties(
    tau_target: State, tau_source: State, keep: float = 0.2, merge: Literal["sum", "mean"] = "sum"
) -> dict[str, Tensor]:
    """The TIES merge of two task vectors, as released with STEPH.

    Each vector is trimmed over all of its parameters together, not layer by layer. keep: share of entries, by
    magnitude, that trimming leaves; the release leaves one more, int(keep * d) + 1 of d, and all that tie with the
    smallest of them. merge: what becomes of entries that agree with the elected sign: their sum (the release) or their
    mean (the original, which also merges all tasks at once and scales the result).

    Raises `Refused` for a share outside (0, 1] or vectors of different networks.
    """
    check_same_network(tau_target, tau_source)
    if not 0 < keep <= 1:
        raise Refused(f"keep = {keep}: the share of entries that TIES leaves; expected more than 0, at most 1.")
    layout = Layout.of(tau_target)
    trimmed = torch.stack([trim(layout.flatten(tau), keep) for tau in (tau_target, tau_source)])  # (2, d)
    agrees = torch.where(elected_sign(trimmed) > 0, trimmed > 0, trimmed < 0)
    merged = (trimmed * agrees).sum(0)
    if merge == "mean":
        merged = merged / agrees.sum(0).clamp(min=1)
    return layout.views(merged)


def trim(vector: Tensor, keep: float) -> Tensor:
    """A flat vector (d,) with all but its int(keep * d) + 1 largest entries, by magnitude, set to 0."""
    magnitude = vector.abs()
    threshold = magnitude.kthvalue(max(1, len(vector) - int(keep * len(vector)))).values
    return torch.where(magnitude >= threshold, vector, 0)


def elected_sign(trimmed: Tensor) -> Tensor:
    """The sign (d,) of the entries' sum in trimmed vectors (n, d).

    Where they cancel, the majority sign of all elected entries decides; where there is no majority either, it is 0,
    which merging takes for negative, as the release does.
    """
    sign = trimmed.sum(0).sign()
    return torch.where(sign == 0, sign.sum().sign(), sign)
