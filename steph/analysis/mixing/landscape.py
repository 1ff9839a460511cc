"""Loss landscapes of task vector mixup (the paper's Figs. 4, 6, S3, S5): M_0 + C_s tau_s + C_t tau_t for one source and
one target, C_s and C_t from 0 to 1.

What the paper leaves open is decided as the release decides it elsewhere: the encoder is merged, the prediction head is
the target's own (`head="merged"` merges it too, the paper's words taken literally), and the loss is the one that
evaluation reports, with alpha = 0. All numbers are of the landscape as computed; `smoothed` is for drawing.
"""

from collections.abc import Mapping
from typing import Any, Literal

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from steph.analysis.mixing import dynamics
from steph.analysis.mixing.pairs import pair, patient_sets
from steph.data.bags import RaggedBatch
from steph.files.records import fingerprint
from steph.merging.merged_encoder import Merged
from steph.merging.task_vectors import Layout, State, task_vector
from steph.mil.abmil import linear_each
from steph.study.cache import cached_table
from steph.study.runs import TARGET, Run, Workbench
from steph.survival import nll_loss, targets
from steph.training.device import single_thread
from steph.training.engine import groups_of, loader

Head = Literal["target", "merged"] | Run
"""Whose head predicts: M_t's; M_0's + C_s tau_s's + C_t tau_t's; or that of a finished run."""
STEPS = 25
"""Of 0.04 each: 26 values from 0 to 1 (Appendix C.2.3)."""
NUMBERS = 2**25
"""Intermediate numbers held at a time; a single patient at a single point may need more."""
GAINS = {
    "source": "source", "lambda_train": "λ best on train", "gain_train": "gain on train",
    "lambda_test": "λ best on test", "gain_test": "gain on test",
    "moved_test": "λ of train: gain on test", "moved_external": "λ of train: gain on external",
    "tested_external": "λ of test: gain on external",
}  # fmt: skip
MAGNITUDES = {
    "source": "source", "target_test": "M_t", "best_test": "best λ, w = 1", "ray_test": "best λ and w",
    "plane_test": "least in the plane",
}  # fmt: skip
"""Columns of tables (`wide`) by those of `summaries`: the best lambda and its gain, also on other patients than it was
chosen on; how far lambda alone goes on test patients, and how far with w."""


def landscape(bench: Workbench, run: Run, head: Head = "target", points: np.ndarray | None = None) -> pd.DataFrame:
    """The landscape of a pair: mean loss of the target's patients at points (C_s, C_t), as c_s, c_t, loss_train,
    loss_test and, where there are external patients, loss_external. Computed once, then read from disk.

    run: STEPH with one source (`steph.analysis.mixing.pairs.pair`), whose two models are taken. points: (G, 2), None
    takes `grid`. Raises `Refused` where one of the models is not finished.
    """
    points = grid() if points is None else points
    inputs = {
        "models": {role: bench.key(model) for role, model in bench.prerequisites(run).items()},
        "fold": run.fold,
        "head": bench.key(head) if isinstance(head, Run) else head,
        "points": fingerprint(points.tolist()),
    }
    return cached_table(bench, "landscape", inputs, lambda: _losses(bench, run, head, points))


def grid() -> np.ndarray:
    """All points (C_s, C_t) of the landscape, (676, 2)."""
    ticks = np.arange(STEPS + 1) / STEPS
    return np.stack(np.meshgrid(ticks, ticks, indexing="ij"), axis=-1).reshape(-1, 2)


def _losses(bench: Workbench, run: Run, head: Head, points: np.ndarray) -> pd.DataFrame:
    study, compute = bench.study, bench.compute_of(run)
    states = {role: bench.state(model) for role, model in bench.prerequisites(run).items()}
    target = states.pop(TARGET)
    (source,) = states.values()
    of_head = bench.state(head) if isinstance(head, Run) else target if head == "target" else None
    plane = Plane(bench.null_state("abmil"), source, target, points, of_head)
    plane.to(compute.device, compute.parameter_dtype)
    table = pd.DataFrame(points, columns=["c_s", "c_t"])
    with single_thread(), torch.inference_mode():
        for name, (data, patients) in patient_sets(bench, run).items():
            n, batch_of = study.network, loader(plane, data, patients, compute.exact)
            total = torch.zeros(len(points), dtype=torch.float64, device=compute.device)
            for group in groups_of(patients, study.recipe.bags_per_step):  # as many as an update takes
                hazards = torch.sigmoid(plane(batch_of(group))).double()  # (G, B, T)
                bins, event = targets(data.labels(group), n.n_bins, n.bin_width_days, compute.device)
                total += nll_loss(hazards, bins, event, alpha=0.0, reduction="none").sum(1)
            table[f"loss_{name}"] = (total / len(patients)).cpu().numpy()
    return table


class Plane(Merged):
    """ABMIL's parameters M_0 + C_s tau_s + C_t tau_t at each of G points (C_s, C_t), points (G, 2).

    head: the state whose head predicts at every point; None merges the head like the encoder.
    """

    points: Tensor

    def __init__(self, null: State, source: State, target: State, points: np.ndarray, head: State | None) -> None:
        vectors, base = [task_vector(state, null) for state in (source, target)], dict(null)
        if head is not None:
            own = {name: head[name] for name in ("head.weight", "head.bias")}
            nothing = {name: torch.zeros_like(value) for name, value in own.items()}
            base, vectors = base | own, [tau | nothing for tau in vectors]
        super().__init__(Layout.of(base), base, vectors)
        self.register_buffer("points", torch.from_numpy(points), persistent=False)

    def forward(self, batch: RaggedBatch) -> Tensor:
        """Logits of the hazards (G, B, T) of B bags."""
        return torch.stack([self._of_bag(batch.bag(i)) for i in range(len(batch))], dim=1)

    def _of_bag(self, bag: Tensor) -> Tensor:
        """Logits (G, T) of one bag (n, D). What the first layer gives before the ReLU is linear in (C_s, C_t), so three
        products with the bag serve all points. Through `ABMIL.encode_each`, which multiplies the bag at every point, a
        landscape of the demo takes 1.4 times as long, and one at the paper's width of features about three times."""
        layers = self.stacked()
        first = linear_each(bag.expand(3, -1, -1), layers, "embed")  # (3, n, H): of M_0, tau_s, tau_t
        width = first.shape[2] + 2 * layers["score.weight"].shape[2]
        together = max(1, NUMBERS // (len(bag) * width + self.layout.size))
        return torch.cat([self._at(first, points) for points in self.points.split(together)])

    def _at(self, first: Tensor, points: Tensor) -> Tensor:
        weights = self.weights(points, without="embed.")
        embedded = torch.addmm(first[:1].flatten(1), points, first[1:].flatten(1)).relu_().view(-1, *first.shape[1:])
        # tanh(x) = 2 sigmoid(2 x) - 1: with tanh_ a landscape of the demo takes 1.3 times as long.
        gated = linear_each(embedded, weights, "gate_tanh").mul_(2).sigmoid_().mul_(2).sub_(1)
        gated *= linear_each(embedded, weights, "gate_sigmoid").sigmoid_()
        attention = torch.softmax(linear_each(gated, weights, "score"), dim=1)  # (G, n, 1)
        return linear_each(attention.transpose(1, 2) @ embedded, weights, "head").squeeze(1)


def smoothed(table: pd.DataFrame, column: str) -> np.ndarray:
    """A `square` smoothed by a Gaussian of one grid step, as the paper draws it.

    The border is mirrored, scipy's default: the paper names sigma alone. That flattens the landscape there, and M_0,
    M_s and M_t all lie on the border: draw what this gives, and take numbers from the landscape itself.
    """
    from scipy.ndimage import gaussian_filter

    return gaussian_filter(square(table, column), 1.0)


def square(table: pd.DataFrame, column: str) -> np.ndarray:
    """A column of a landscape as a matrix (26, 26): a row per C_s, a column per C_t, both rising."""
    return table.pivot(index="c_s", columns="c_t", values=column).to_numpy()


def lambda_line(table: pd.DataFrame) -> pd.DataFrame:
    """The landscape along Eq. 3, C_t = lambda and C_s = 1 - lambda: lambda (0, 0.04, ..., 1) and the losses. All of its
    points are points of the grid; the first is M_s and the last M_t, each in the encoder."""
    on = ((table["c_s"] + table["c_t"]) * STEPS).round() == STEPS
    line = table[on].sort_values("c_t").rename(columns={"c_t": "lambda"})
    return line.drop(columns="c_s").reset_index(drop=True)


def best_magnitude(table: pd.DataFrame) -> pd.DataFrame:
    """The least loss on the ray of each lambda, w [lambda tau_t + (1 - lambda) tau_s] with w >= 0 inside the landscape:
    lambda and the losses. Between grid points the landscape is interpolated (bilinear). At lambda = 1 and 0 it ends at
    w = 1, at 1/2 with w = 2.
    """
    from scipy.interpolate import RegularGridInterpolator

    ticks = np.arange(STEPS + 1) / STEPS
    lam, w = np.meshgrid(ticks, np.arange(2 * STEPS + 1) / STEPS, indexing="ij")  # w = 1 is among them: the line itself
    points = np.stack([w * (1 - lam), w * lam], axis=-1)
    outside, points = points.max(axis=-1) > 1 + 1e-9, points.clip(0, 1)
    rays = pd.DataFrame({"lambda": ticks})
    for name in table.columns.drop(["c_s", "c_t"]):
        losses = RegularGridInterpolator((ticks, ticks), square(table, name))(points)
        rays[name] = np.where(outside, np.inf, losses).min(axis=1)
    return rays


def lower_range(line: pd.DataFrame, column: str) -> tuple[float, float] | None:
    """The lambdas, from and to, around the best one on a `lambda_line` that all give less loss than lambda = 1; None
    where no lambda does."""
    lower = line[column].to_numpy() < line[column].iloc[-1]
    best = int(line[column].argmin())
    if not lower[best]:
        return None
    higher = np.flatnonzero(~lower)  # lambda = 1 is one of them
    start = int(higher[higher < best].max(initial=-1)) + 1
    stop = int(higher[higher > best].min()) - 1
    return float(line["lambda"][start]), float(line["lambda"][stop])


def summaries(tables: Mapping[str, pd.DataFrame]) -> pd.DataFrame:
    """Landscapes of several sources in numbers, a row each. source; and for training, test and external patients:

    target_...: the loss of M_t (lambda = 1). lambda_..., best_...: the best lambda on the line and its loss. gain_...:
    how much less that is than M_t's; never negative, as the lambda is chosen on these very patients. ray_...: the
    least loss when w scales the mixture. plane_...: the least loss anywhere in the landscape.
    And across sets: moved_test (and moved_external), the gain there of the lambda that is best on training patients,
    what one would really get; tested_external, that of the lambda that is best on test patients; both_low, both_high,
    the least and largest lambda with less loss than M_t on training and on test patients alike (NaN: there is none).
    The paper's Fig. 4 (c) can be read so, or as the least loss when w scales the mixture: scaled_low, scaled_high, the
    same for lambda < 1 with the best w on each set; scaled_alike, is there a mixture of less loss with one w for both?
    """
    rows = []
    for source, table in tables.items():
        line, rays = (losses.set_index("lambda") for losses in (lambda_line(table), best_magnitude(table)))
        gain = line.iloc[-1] - line
        row: dict[str, Any] = {"source": source}
        for column in line.columns:
            name, best = column.removeprefix("loss_"), line[column].idxmin()
            row |= {f"target_{name}": line[column].iloc[-1], f"lambda_{name}": best, f"best_{name}": line[column][best]}
            row |= {f"gain_{name}": gain[column][best], f"ray_{name}": rays[column].min()}
            row |= {f"plane_{name}": table[column].min(), f"moved_{name}": gain[column][row["lambda_train"]]}
        if "loss_external" in line:
            row["tested_external"] = gain["loss_external"][row["lambda_test"]]
        both = ["loss_train", "loss_test"]
        for name, losses in (("both", line), ("scaled", rays)):
            lower = losses.index[(losses[both] < line[both].iloc[-1]).all(axis=1) & (losses.index < 1)]
            row |= {f"{name}_low": lower.min(), f"{name}_high": lower.max()}
        mixed = table.loc[table["c_s"] > 0, both]
        rows.append({**row, "scaled_alike": (mixed < line[both].iloc[-1]).all(axis=1).any()})
    return pd.DataFrame(rows)


def wide(table: pd.DataFrame, columns: Mapping[str, str]) -> pd.DataFrame:
    """Format `summaries` for display. columns: `GAINS` or `MAGNITUDES`."""
    return table.filter(list(columns)).rename(columns=columns)


def finished_landscapes(bench: Workbench, target: str) -> dict[str, pd.DataFrame]:
    """The landscapes of a target with its `dynamics.chosen_sources` on the first fold, by source; none where STEPH is
    not finished on it with the study's seed. Nothing is trained."""
    run = bench.run_of(target, "steph", 0)
    if bench.record(run) is None:
        return {}
    names = dynamics.chosen_sources(dynamics.dynamics(bench, [run]))["source"]
    return {name: landscape(bench, pair(bench, target, name, run.fold)) for name in names}
