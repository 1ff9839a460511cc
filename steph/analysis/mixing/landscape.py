"""Loss landscapes of task vector mixup (the paper's Figs. 4, 6, S3, S5): M_0 + C_s tau_s + C_t tau_t for one source and
one target, C_s and C_t from 0 to 1.

What the paper leaves open is decided as the release decides it elsewhere: the encoder is merged, the prediction head is
the target's own (`head="merged"` merges it too, the paper's words taken literally), and the loss is the one that
evaluation reports, with alpha = 0. All numbers are of the landscape as computed; `smoothed` is for drawing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn
from torch.func import functional_call

from steph import Refused
from steph.analysis.mixing import dynamics
from steph.data.bags import RaggedBatch
from steph.data.dataset import Dataset
from steph.data.manifest import Study
from steph.files.records import fingerprint
from steph.merging.merged_encoder import MergedEncoder
from steph.merging.task_vectors import State, task_vector
from steph.methods.registry import method
from steph.mil import ABMIL, MIL, new_network
from steph.mil.base import network_needing_coords
from steph.study.cache import cached_table
from steph.study.runs import TARGET, Run, Workbench
from steph.survival import nll_loss, targets
from steph.training.device import parameter_dtype, single_thread

STEPS = 25
"""Of 0.04 each: 26 values from 0 to 1 (Appendix C.2.3)."""
AUTO = 5
"""Sources of largest w that are shown where nobody names some; the one of smallest w comes on top."""
NUMBERS = 2**25
"""Intermediate numbers held at a time; a single patient at a single point may need more."""
SETS = ("train", "test", "external")
"""Patients whose loss is told: the fold's training and test patients and, in a synthetic study, others."""


def pair(study: Study, target: str, source: str, fold: int, precision: str = "fp32", base: str = "steph") -> Run:
    """STEPH with this source only: its `upstream` are the two models of the landscape.

    base: the method, for landscapes of other networks ("steph_patch_gcn"). Raises `Refused` for an unknown data set or
    fold and a source that is the target.
    """
    study.entry(target)
    wanted = Run(target, f"{base}@{source}", fold, study.seed, precision)
    refusal = method(wanted.method).refusal(study, target)
    if refusal:
        raise Refused(refusal)
    study.check_fold(fold)
    return wanted


def models(bench: Workbench, wanted: Run) -> tuple[Run, Run]:
    """The runs that trained M_s (fold 0 of the source) and M_t (the same fold of the target)."""
    found = bench.prerequisites(wanted)
    return found[str(method(wanted.method).only)], found[TARGET]


def landscape(
    bench: Workbench,
    target: str,
    source: str,
    fold: int,
    precision: str = "fp32",
    device: str = "cpu",
    head: str = "target",
    base: str = "steph",
) -> pd.DataFrame:
    """The landscape of a pair: `losses` on the grid of 26 x 26 points. Raises `Refused` where one of the two models is
    not finished; `runs` names them."""
    return losses(bench, pair(bench.study, target, source, fold, precision, base), grid(), device, head)


def runs(bench: Workbench, target: str, sources: Sequence[str], fold: int, precision: str = "fp32") -> list[Run]:
    """The runs that landscapes of a target stand on: its own model and those of the sources. Raises `Refused` where a
    pair cannot be, and where no source is named."""
    if not sources:
        raise Refused(f"no source for {target}: name at least one of {', '.join(bench.study.sources_of(target))}.")
    found = [models(bench, pair(bench.study, target, source, fold, precision)) for source in sources]
    return list(dict.fromkeys(run for both in found for run in reversed(both)))


def losses(
    bench: Workbench, wanted: Run, points: np.ndarray, device: str = "cpu", head: str | Run = "target"
) -> pd.DataFrame:
    """Mean loss of the target's patients at points (G, 2) of the plane of a pair (`pair`): c_s, c_t, loss_train,
    loss_test and, where there are external patients, loss_external. Computed once and kept.

    head: "target" (M_t's own), "merged" (M_0's + C_s tau_s's + C_t tau_t's) or a finished run, whose head is taken.
    """
    decides = {
        "models": [bench.key(run) for run in models(bench, wanted)],
        "fold": wanted.fold,
        "head": bench.key(head) if isinstance(head, Run) else head,
        "points": fingerprint(points.tolist()),
    }
    return cached_table(bench, "landscape", decides, lambda: _losses(bench, wanted, points, device, head))


def grid() -> np.ndarray:
    """All points (C_s, C_t) of the landscape, (676, 2)."""
    ticks = np.arange(STEPS + 1) / STEPS
    return np.stack(np.meshgrid(ticks, ticks, indexing="ij"), axis=-1).reshape(-1, 2)


def _losses(bench: Workbench, wanted: Run, points: np.ndarray, device: str, head: str | Run) -> pd.DataFrame:
    study, data = bench.study, bench.dataset(wanted.dataset)
    sets = {"train": (data, data.splits.train(wanted.fold)), "test": (data, data.splits.test(wanted.fold))}
    if data.external is not None:
        sets["external"] = data.external, list(data.external.cohort.patients["patient_id"])
    name = method(wanted.method).network
    source, target = (bench.state(run) for run in models(bench, wanted))
    network = new_network(name, study.features.dim, study.network)
    own = bench.state(head) if isinstance(head, Run) else target if head == "target" else head
    plane = Plane(network, bench.null_state(name), source, target, points, own)
    plane.to(device, parameter_dtype(wanted.precision)).eval()
    table = pd.DataFrame(points, columns=["c_s", "c_t"])
    with single_thread(), torch.inference_mode():
        for which, (of, patients) in sets.items():
            table[f"loss_{which}"] = _mean_loss(plane, of, patients, study, device)
    return table


def _mean_loss(plane: Plane, data: Dataset, patients: Sequence[str], study: Study, device: str) -> np.ndarray:
    """Mean loss of patients at each of the plane's points, (G,). As many are loaded at a time as an update takes."""
    n, recipe = study.network, study.recipe
    bins, event = targets(data.labels(patients), n.n_bins, n.bin_width_days, device)
    network = network_needing_coords(plane)
    if network is not None:
        data.check_coords(patients, network)
    total = torch.zeros(len(plane.points), dtype=torch.float64, device=device)
    for start in range(0, len(patients), recipe.bags_per_step):
        chosen = slice(start, start + recipe.bags_per_step)
        batch = data.batch(
            patients[chosen], device, plane.points.dtype, coords=network is not None, max_patches=recipe.max_patches
        )
        hazards = torch.sigmoid(plane(batch)).double()  # (G, B, T)
        at, seen = (x[chosen].expand(len(hazards), -1).flatten() for x in (bins, event))
        loss = nll_loss(hazards.flatten(0, 1), at, seen, alpha=0.0, reduction="none")
        total += loss.view(hazards.shape[:2]).sum(1)
    return (total / len(patients)).cpu().numpy()


class Plane(nn.Module):
    """A network under M_0 + C_s tau_s + C_t tau_t at each of G points (C_s, C_t), points (G, 2).

    head: the state whose head predicts at every point, or "merged": then the head is merged like the encoder.
    """

    points: Tensor

    def __init__(
        self, network: MIL, null: State, source: State, target: State, points: np.ndarray, head: str | State
    ) -> None:
        super().__init__()
        if isinstance(head, str) and head != "merged":
            raise Refused(f"head = {head!r}; expected 'target', 'merged' or a head's parameters.")
        vectors = [task_vector(state, null) for state in (source, target)]
        self.encoder = MergedEncoder(network, null, vectors, without="" if head == "merged" else "head.")
        if not isinstance(head, str):
            own = {name: head[f"head.{name}"] for name in ("weight", "bias")}
            network.head.to(own["weight"].dtype).load_state_dict(own)
        self.register_buffer("points", torch.from_numpy(points), persistent=False)
        self._held: dict[str, Tensor] | None = None

    def forward(self, batch: RaggedBatch) -> Tensor:
        """Logits of the hazards (G, B, T) of B bags."""
        network = self.encoder.network
        if isinstance(network, ABMIL):
            return torch.stack([self._abmil(batch.bag(i)) for i in range(len(batch))], dim=1)
        return torch.stack([functional_call(network, self.encoder.state(at), (batch,)) for at in self.points])

    def _abmil(self, bag: Tensor) -> Tensor:
        """Logits (G, T) of one bag (n, D) in ABMIL. What its first layer gives before the ReLU is linear in (C_s, C_t):
        three products with the bag serve all points."""
        encoder = self.encoder
        layers = encoder.stacked()
        bias, weight = layers["embed.bias"].unsqueeze(1), layers["embed.weight"].transpose(1, 2)
        first = torch.baddbmm(bias, bag.expand(3, -1, -1), weight)  # (3, n, H): of M_0, tau_s, tau_t
        width = first.shape[2] + 2 * layers["score.weight"].shape[2]
        together = max(1, NUMBERS // (len(bag) * width + encoder.layout.size))
        return torch.cat([self._abmil_at(first, points) for points in self.points.split(together)])

    def _abmil_at(self, first: Tensor, points: Tensor) -> Tensor:
        weights = self._weights(points)
        embedded = torch.addmm(first[:1].flatten(1), points, first[1:].flatten(1)).relu_().view(-1, *first.shape[1:])
        gates = torch.baddbmm(weights["gates.bias"], embedded, weights["gates.weight"]).sigmoid_()
        tanh, sigmoid = gates.chunk(2, dim=2)
        gate = tanh.mul_(2).sub_(1) * sigmoid
        attention = torch.softmax(_linear(gate, weights, "score"), dim=1)  # (G, n, 1)
        features = attention.transpose(1, 2) @ embedded  # (G, 1, H)
        if "head.weight" in weights:
            return _linear(features, weights, "head").squeeze(1)
        return self.encoder.network.head(features.squeeze(1))

    def _weights(self, points: Tensor) -> dict[str, Tensor]:
        """The merged parameters (G, ...) at some of the points; those of all points are kept for the next bag."""
        if len(points) < len(self.points):
            return _gates_at_once(self.encoder.weights(points))
        if self._held is None:
            self._held = _gates_at_once(self.encoder.weights(points))
        return self._held


def _gates_at_once(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Parameters with both gates' as one layer, "gates", whose sigmoid is all that they ask for: tanh(x) is
    2 sigmoid(2 x) - 1, and PyTorch's own takes six times as long."""
    weight = torch.cat([2 * weights["gate_tanh.weight"], weights["gate_sigmoid.weight"]], dim=1)
    bias = torch.cat([2 * weights["gate_tanh.bias"], weights["gate_sigmoid.bias"]], dim=1)
    return {**weights, "gates.weight": weight.transpose(1, 2).contiguous(), "gates.bias": bias.unsqueeze(1)}


def _linear(x: Tensor, weights: Mapping[str, Tensor], layer: str) -> Tensor:
    """x (G, n, i) through a layer of its own per point: (G, n, o)."""
    return torch.baddbmm(weights[f"{layer}.bias"].unsqueeze(1), x, weights[f"{layer}.weight"].transpose(1, 2))


# ------------------------------------------------------------------------------------- what is read from it


def smoothed(table: pd.DataFrame, sigma: float = 1.0, mode: str = "reflect") -> pd.DataFrame:
    """The landscape with its losses smoothed by a Gaussian of `sigma` grid steps, as the paper draws it.

    The paper names sigma alone. mode: what stands beyond the border (`scipy.ndimage.gaussian_filter`); the default is
    scipy's own, the border mirrored. It flattens the landscape there, and M_0, M_s and M_t all lie on the border: draw
    what this gives, and take numbers from the landscape itself.
    """
    from scipy.ndimage import gaussian_filter

    names = loss_columns(table)
    found = {name: gaussian_filter(square(table, name), sigma, mode=mode).ravel() for name in names}
    return table.assign(**found)


def square(table: pd.DataFrame, column: str) -> np.ndarray:
    """A column of a landscape as a matrix (26, 26): a row per C_s, a column per C_t, both rising."""
    return table.pivot(index="c_s", columns="c_t", values=column).to_numpy()


def loss_columns(table: pd.DataFrame) -> list[str]:
    """The losses that a table has, of `SETS`."""
    return [f"loss_{name}" for name in SETS if f"loss_{name}" in table]


def lambda_line(table: pd.DataFrame) -> pd.DataFrame:
    """The landscape along Eq. 3, C_t = lambda and C_s = 1 - lambda: lambda (0, 0.04, ..., 1) and the losses. All of its
    points are points of the grid; the first is M_s and the last M_t, each in the encoder."""
    on = ((table["c_s"] + table["c_t"]) * STEPS).round() == STEPS
    line = table[on].sort_values("c_t").rename(columns={"c_t": "lambda"})
    return line[["lambda", *loss_columns(table)]].reset_index(drop=True)


def best_magnitude(table: pd.DataFrame) -> pd.DataFrame:
    """The least loss on the ray of each lambda, w [lambda tau_t + (1 - lambda) tau_s] with w >= 0 inside the landscape:
    lambda, and for each set of patients its loss and the w_... of it. Between grid points the landscape is interpolated
    (bilinear). At lambda = 1 and 0 the landscape ends at w = 1, at 1/2 with w = 2.
    """
    from scipy.interpolate import RegularGridInterpolator

    ticks = np.arange(STEPS + 1) / STEPS
    lam, w = np.meshgrid(ticks, np.arange(2 * STEPS + 1) / STEPS, indexing="ij")  # w = 1 is among them: the line itself
    c_t, c_s = w * lam, w * (1 - lam)
    inside = np.maximum(c_t, c_s) <= 1 + 1e-9
    points = np.clip(np.stack([c_s, c_t], axis=-1), 0, 1)
    found = pd.DataFrame({"lambda": ticks})
    for name in loss_columns(table):
        loss = np.where(inside, RegularGridInterpolator((ticks, ticks), square(table, name))(points), np.inf)
        found[name] = loss.min(axis=1)
        found[name.replace("loss", "w")] = w[0, loss.argmin(axis=1)]
    return found


def lower_range(line: pd.DataFrame, column: str) -> tuple[float, float] | None:
    """The lambdas, from and to, around the best one on a `lambda_line` that all give less loss than lambda = 1; None
    where no lambda does."""
    lower = line[column].to_numpy() < line[column].iloc[-1]
    best = int(line[column].argmin())
    if not lower[best]:
        return None
    first = last = best
    while first > 0 and lower[first - 1]:
        first -= 1
    while lower[last + 1]:  # ends at lambda = 1 at the latest
        last += 1
    return float(line["lambda"][first]), float(line["lambda"][last])


def summary(table: pd.DataFrame) -> dict[str, float]:
    """A landscape in numbers. For each set of patients (`SETS`):

    target_...: the loss of M_t (lambda = 1). lambda_..., best_...: the best lambda on the line and its loss. gain_...:
    how much less that is than M_t's; never negative, as the lambda is chosen on these very patients. ray_...: the
    least loss when w scales the mixture. plane_...: the least loss anywhere in the landscape.
    And across sets: moved_test (and moved_external), the gain there of the lambda that is best on training patients,
    what one would really get; tested_external, that of the lambda that is best on test patients; both_low, both_high,
    the least and largest lambda with less loss than M_t on training and on test patients alike (NaN: there is none).
    """
    line, rays = lambda_line(table), best_magnitude(table)
    found: dict[str, float] = {}
    for column in loss_columns(table):
        which = column.removeprefix("loss_")
        best, target = int(line[column].argmin()), float(line[column].iloc[-1])
        found |= {
            f"target_{which}": target,
            f"lambda_{which}": float(line["lambda"][best]),
            f"best_{which}": float(line[column][best]),
            f"gain_{which}": target - float(line[column][best]),
            f"ray_{which}": float(rays[column].min()),
            f"plane_{which}": float(table[column].min()),
        }
    at = {which: int(line[f"loss_{which}"].argmin()) for which in ("train", "test")}
    for chosen_on, which, name in (("train", "test", "moved"), ("train", "external", "moved"),
                                   ("test", "external", "tested")):  # fmt: skip
        if f"loss_{which}" in line:
            own = line[f"loss_{which}"]
            found[f"{name}_{which}"] = float(own.iloc[-1] - own[at[chosen_on]])
    lower = (line[["loss_train", "loss_test"]] < line[["loss_train", "loss_test"]].iloc[-1]).all(axis=1)
    found["both_low"], found["both_high"] = line["lambda"][lower].min(), line["lambda"][lower].max()
    return found


def summaries(tables: Mapping[str, pd.DataFrame]) -> pd.DataFrame:
    """`summary` of the landscapes of several sources: a row each, with the column source."""
    return pd.DataFrame([{"source": source, **summary(table)} for source, table in tables.items()])


def summaries_wide(found: pd.DataFrame) -> pd.DataFrame:
    """Format `summaries` for display: M_t's loss, the best lambda and its gain on training and test patients, and what
    the lambda of the training patients gains on others."""
    shown = {"source": found["source"]}
    for which in ("train", "test"):
        shown[f"λ best on {which}"] = found[f"lambda_{which}"]
        shown[f"gain on {which}"] = found[f"gain_{which}"]
    for which in ("test", "external"):
        if f"moved_{which}" in found:
            shown[f"λ of train: gain on {which}"] = found[f"moved_{which}"]
    if "tested_external" in found:
        shown["λ of test: gain on external"] = found["tested_external"]
    return pd.DataFrame(shown)


def magnitudes_wide(found: pd.DataFrame, which: str = "test") -> pd.DataFrame:
    """Format `summaries` for display: how far lambda alone goes on a set of patients, and how far with w."""
    names = {"target": "M_t", "best": "best λ, w = 1", "ray": "best λ and w", "plane": "least in the plane"}
    return pd.DataFrame({"source": found["source"], **{name: found[f"{k}_{which}"] for k, name in names.items()}})


# ------------------------------------------------------------------------------------------ which sources


def chosen_sources(last: pd.DataFrame, n: int = AUTO) -> pd.DataFrame:
    """Sources to look at, of one finished STEPH run (`steph.analysis.mixing.dynamics.at_the_end`): the n of largest
    final w and the one of smallest, so that one is there that STEPH left out.

    Returns source, rank (of w, 1 = largest), w, lambda, share = w (1 - lambda). The first has the largest share: STEPH
    takes most of it. A w may be large where lambda is 1; then it is the target's own model that counts. Of equal ones
    the source that comes first in the study has the lower rank.
    """
    ranked = last.sort_values("w", ascending=False, kind="stable").reset_index(drop=True)
    ranked["rank"], ranked["share"] = ranked.index + 1, ranked["w"] * (1 - ranked["lambda"])
    few = pd.concat([ranked.head(n), ranked.tail(1)]).drop_duplicates("source")
    few = few.sort_values("share", ascending=False, kind="stable")
    return few[["source", "rank", "w", "lambda", "share"]].reset_index(drop=True)


def of_finished(
    bench: Workbench, target: str, fold: int = 0, head: str = "target", precision: str = "fp32"
) -> dict[str, pd.DataFrame]:
    """The landscapes of a target with its `chosen_sources`, by source; none where STEPH is not finished on it with the
    study's seed. Nothing is trained."""
    wanted = Run(target, "steph", fold, bench.study.seed, precision)
    if bench.record(wanted) is None:
        return {}
    names = chosen_sources(dynamics.at_the_end(dynamics.dynamics(bench, [wanted])))["source"]
    return {name: landscape(bench, target, name, fold, precision, head=head) for name in names}
