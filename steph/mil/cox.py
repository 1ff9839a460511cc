"""Cox's proportional hazards on the mean of a bag's patches: the classical baseline, without a network."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from steph.data.bags import as_batch
from steph.mil.base import Bags, ForwardPass, Model

LEAST, MOST = -16.0, 5.0
"""Logarithms of a cumulative hazard within an interval are kept between these, so that logits are finite."""


class CoxMean(Model):
    """h(t) = 1 - exp(-exp(b_t + x w)), x the mean of a bag's patches (D,): a bag's risk is proportional in all T
    intervals. weight: w (D,). baseline: b_t (T,), the logarithm of the baseline's cumulative hazard in each interval.

    `steph.methods.cox` finds both, and then nothing of it is trained.
    """

    def __init__(self, dim_in: int = 1536, n_bins: int = 32) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(dim_in))
        self.baseline = nn.Parameter(torch.zeros(n_bins))

    def forward_pass(self, bags: Bags | None, frozen: Tensor | None = None) -> ForwardPass:
        assert bags is not None
        batch = as_batch(bags)
        log_risk = batch.mean(batch.features.to(self.weight.dtype)) @ self.weight
        cumulative = (log_risk.unsqueeze(1) + self.baseline).clamp(LEAST, MOST).exp()
        return ForwardPass(cumulative + torch.log(-torch.expm1(-cumulative)))

    def architecture(self) -> dict[str, Any]:
        return {"kind": self.kind, "dim_in": len(self.weight), "n_bins": len(self.baseline)}

    @classmethod
    def rebuild(cls, architecture: Mapping[str, Any], part: Callable[[Mapping[str, Any]], Any]) -> "CoxMean":
        return cls(architecture["dim_in"], architecture["n_bins"])
