"""How far a device's numbers are from the CPU's in double precision: logits, C-index and gradients of every network and
of STEPH, with what is tolerated. ``python -m benchmarks.agreement`` prints the table of tolerances.
"""

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.steps import Dimensions, make_steph
from steph.data.bags import RaggedBatch
from steph.data.manifest import Network
from steph.merging.steph import STEPH
from steph.mil import NETWORKS, Model, network_needing_coords
from steph.survival import concordance_index, nll_loss, risk_score
from steph.training.device import PRECISIONS, parameter_dtype, products

NAMES = (*NETWORKS, "steph")
"""Every network, and STEPH on ABMIL."""


@dataclass(frozen=True)
class Tolerance:
    """What is tolerated. logits, gradients: length of the difference relative to the length of what it should be
    (gradients: of all trained parameters at once). c_index: difference."""

    logits: float
    c_index: float
    gradients: float


TOLERANCES = {
    "fp64": Tolerance(1e-9, 1e-9, 1e-8),
    "fp32": Tolerance(1e-5, 0.005, 3e-4),
    "tf32": Tolerance(5e-3, 0.02, 2e-2),
    "bf16": Tolerance(2e-2, 0.05, 1e-1),
}
"""By precision of a device, against fp64 on the CPU."""

BAGS, LARGEST = 32, 600
"""Patients that are compared, and patches of the largest."""


@dataclass(frozen=True)
class Problem:
    """A model in evaluation mode, its patients and what became of them; all in double precision on the CPU."""

    model: Model
    batch: RaggedBatch
    bins: Tensor
    event: Tensor
    time: np.ndarray


def problem(
    name: str, dim_in: int = 1536, network: Network | None = None, bags: int = BAGS, largest: int = LARGEST
) -> Problem:
    """The same random problem every time. Patches of a patient have a direction in common, so that patients differ, and
    are numbers that half precision holds, as a store's."""
    network = network or Network()
    random = np.random.default_rng(0)
    sizes = np.exp(random.uniform(math.log(max(2, largest // 20)), math.log(largest), bags)).astype(int).tolist()
    offsets = tuple(np.cumsum([0, *sizes]).tolist())
    own = np.repeat(random.standard_normal((bags, dim_in)), sizes, axis=0)
    features = torch.from_numpy(random.standard_normal((offsets[-1], dim_in)) + own).half().double()
    places = [np.stack([np.arange(n) % 40, np.arange(n) // 40], axis=1) * 256 for n in sizes]
    model = _model(name, dim_in, network).double().eval()
    coords = torch.from_numpy(np.concatenate(places)).int() if network_needing_coords(model) else None
    time = random.integers(1, network.n_bins, bags)
    event = random.random(bags) < 0.6
    return Problem(model, RaggedBatch(features, offsets, coords), torch.from_numpy(time), torch.from_numpy(event), time)


def _model(name: str, dim_in: int, network: Network) -> Model:
    torch.manual_seed(0)
    if name != "steph":
        return NETWORKS[name](dim_in, network)
    model = make_steph(Dimensions(dim_in, network.dim_emb, network.dim_attn, network.dim_emb))
    _spread(model)
    return model


@torch.no_grad()
def _spread(model: STEPH) -> None:
    """Keep the w of different sources apart, so that rounding does not change which are kept: then logits would jump,
    and that is no error of a device."""
    for head, low, high in ((model.hyper.weight_head, 0.2, 2.4), (model.hyper.mix_head, -1.0, 1.0)):
        assert isinstance(head, nn.Sequential) and isinstance(head[-1], nn.Linear)
        head[-1].bias.copy_(torch.linspace(low, high, len(head[-1].bias)))


def numbers(given: Problem, device: str, precision: str) -> tuple[Tensor, Tensor]:
    """Logits (B, T) and the loss's gradient of all trained parameters (P,) on a device; on the CPU in fp64."""
    model = copy.deepcopy(given.model).to(device, parameter_dtype(precision))
    batch = given.batch.to(device, PRECISIONS[precision])
    with products(precision):
        logits, auxiliary, _ = model.forward_pass(batch)
        loss = nll_loss(torch.sigmoid(logits), given.bins.to(device), given.event.to(device))
        (loss if auxiliary is None else loss + auxiliary).backward()
    trained = [p for p in model.parameters() if p.requires_grad]
    gradient = torch.cat([torch.zeros_like(p).flatten() if p.grad is None else p.grad.flatten() for p in trained])
    return logits.detach().double().cpu(), gradient.double().cpu()


def agreement(
    device: str,
    precisions: Sequence[str] = tuple(TOLERANCES),
    names: Sequence[str] = NAMES,
    dim_in: int = 1536,
    network: Network | None = None,
    bags: int = BAGS,
    largest: int = LARGEST,
) -> list[dict[str, Any]]:
    """Rows, one per network and precision: the differences of logits, c_index and gradients from fp64 on the CPU, and
    whether all are tolerated (`TOLERANCES`). The rest is as for `problem`."""
    rows = []
    for name in names:
        given = problem(name, dim_in, network, bags, largest)
        logits, gradient = numbers(given, "cpu", "fp64")
        c_index = _c_index(given, logits)
        for precision in precisions:
            own, slope = numbers(given, device, precision)
            found = {
                "logits": _distance(own, logits),
                "c_index": abs(_c_index(given, own) - c_index) if own.isfinite().all() else math.inf,
                "gradients": _distance(slope, gradient),
            }
            allowed = TOLERANCES[precision]
            tolerated = all(value <= getattr(allowed, what) for what, value in found.items())
            rows.append({"network": name, "precision": precision, **found, "tolerated": tolerated})
    return rows


def _distance(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


def _c_index(given: Problem, logits: Tensor) -> float:
    return concordance_index(given.time, given.event.numpy(), risk_score(torch.sigmoid(logits)).numpy())


def table() -> list[str]:
    """`TOLERANCES` as lines of a Markdown table."""
    rows = [f"| {p} | {t.logits:g} | {t.c_index:g} | {t.gradients:g} |" for p, t in TOLERANCES.items()]
    return ["| precision | logits | C-index | gradients |", "|---|---|---|---|", *rows]


if __name__ == "__main__":
    print("\n".join(table()))
