"""Is a mixture of task vectors the task vector of mixed training? Appendix B of the paper, looked at in numbers.

The paper argues: task vectors are sums of gradients (Eq. 6), so ``tau_mix = lambda tau_t + (1 - lambda) tau_s`` is a
sum of mixed gradients over all pairs of patients (Eq. 8), and that approximates the gradients of training on mixed bag
features (Eqs. 9, 10). Here the trainings in question are carried out side by side on a small problem, by plain gradient
descent from one M_0:

- M_t and M_s on their own data, with tau_mix their mixture;
- on "mixed losses", ``lambda L(x_t, y_t) + (1 - lambda) L(x_s, y_s)``: what Eq. 8 is the first step of;
- on "mixed features", as Eq. 10 has it: the head reads ``lambda h_t + (1 - lambda) h_s``, and the label is mixed alike.
  The likelihood of discrete survival is a sum over the intervals of (event, at risk) times logarithms, linear in the
  label as cross-entropy is in one-hot classes: the loss under a mixed label is the mixture of the losses under each,
  ``lambda NLL(y_t) + (1 - lambda) NLL(y_s)``, both at the mixed feature.

All of them see the same patients in the same order: in each step a batch of the target's and one of the source's, and
the mixed trainings every pair (i, j) of the two batches, the double sum of Eq. 8. Losses are means over patients or
pairs. (With Eq. 6's sums in place of means, Eq. 8 holds only for sets of the same size.) There is no dropout, weight
decay or momentum, all parameters are trained, head included, and all is in double precision: at step one vectors are to
agree to rounding. Networks are small, patients a sample: this tells how the argument fares, not how good STEPH is.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor
from torch.func import functional_call, vmap
from torch.nn import functional as F

from steph import Refused
from steph.data.bags import RaggedBatch
from steph.data.dataset import Dataset
from steph.data.manifest import Study
from steph.merging.task_vectors import Layout
from steph.mil.abmil import ABMIL
from steph.mil.base import Encoder
from steph.study.cache import cached_table
from steph.study.runs import Run, Workbench
from steph.survival import concordance_index, nll_loss, risk_score, targets
from steph.training.device import Compute, single_thread
from steph.training.engine import groups_of, loader, seed_everything

LENGTHS = (1, 2, 5, 10, 20, 50, 100, 200)
"""Steps of training after which vectors are compared."""
LAMBDAS = (0.25, 0.5, 0.75)
RATE = 0.5
BATCH = 16  # patients of each data set in a step
DIM_IN, DIM_EMB, DIM_ATTN = 32, 32, 24  # at most
MAX_PATIENTS, MAX_TESTED, MAX_PATCHES = 256, 300, 16  # per data set, per data set, per bag
LOSSES, FEATURES = "mixed losses", "mixed features"
MIXTURE, TARGET_ALONE, SOURCE_ALONE, OTHER_BATCHES = "mixture", "target alone", "source alone", "other batches"
CANDIDATES = (MIXTURE, TARGET_ALONE, SOURCE_ALONE, OTHER_BATCHES)

Labels = tuple[Tensor, Tensor]
"""Bins (N,) and events (N,) bool."""


@dataclass(frozen=True, eq=False)
class Patients:
    """Bags with their labels: bins (N,), event (N,) bool, time_days (N,)."""

    bags: RaggedBatch
    bins: Tensor
    event: Tensor
    time_days: np.ndarray

    def __len__(self) -> int:
        return len(self.bags)

    def some(self, chosen: Sequence[int] | np.ndarray) -> Patients:
        """The patients at these places."""
        bags = RaggedBatch.from_bags([self.bags.bag(int(i)) for i in chosen])
        return Patients(bags, *self.labels(chosen), self.time_days[np.asarray(chosen)])

    def labels(self, chosen: Sequence[int] | np.ndarray) -> Labels:
        """The labels of the patients at these places."""
        index = torch.as_tensor(np.asarray(chosen), device=self.bins.device)
        return self.bins[index], self.event[index]


@dataclass(frozen=True, eq=False)
class Problem:
    """A network with M_0's parameters, patients of target and source to train on, the target's to test on. alpha: the
    loss' (`steph.survival.nll_loss`)."""

    network: ABMIL
    target: Patients
    source: Patients
    test: Patients
    alpha: float

    @property
    def layout(self) -> Layout:
        """Where each parameter stands in a flat vector."""
        return Layout.of(dict(self.network.named_parameters()))

    @property
    def null(self) -> Tensor:
        """M_0 as a flat vector (P,)."""
        return self.layout.flatten({k: v.detach() for k, v in self.network.named_parameters()})


def bag_features(problem: Problem, weights: Mapping[str, Tensor], bags: RaggedBatch) -> Tensor:
    """Features (G, B, dim_emb) of B bags under each of G sets of parameters, ``weights[name]`` (G, ...)."""
    encoder = Encoder(problem.network)
    named = {f"network.{name}": value for name, value in weights.items()}
    return vmap(lambda parameters: functional_call(encoder, parameters, (bags,)))(named)


def predict_bins(weights: Mapping[str, Tensor], features: Tensor) -> Tensor:
    """Logits of the hazards (G, B, T) of features (G, B, dim_emb) by each of G heads."""
    return torch.baddbmm(weights["head.bias"].unsqueeze(1), features, weights["head.weight"].transpose(1, 2))


@torch.no_grad()
def logits_of(problem: Problem, flat: Tensor, patients: Patients) -> Tensor:
    """Logits of the hazards (G, N, T) of patients under G models, flat (G, P)."""
    weights = problem.layout.views(flat)
    groups = [patients.some(places).bags for places in groups_of(range(len(patients)), BATCH)]
    return torch.cat([predict_bins(weights, bag_features(problem, weights, bags)) for bags in groups], dim=1)


def gradients(
    problem: Problem, flat: Tensor, shares: Tensor, on_features: Tensor, target: Patients, source: Patients
) -> Tensor:
    """Gradient (G, P) of the mixed loss of each of G models, flat (G, P), on a batch of each data set.

    shares: (G,), lambda. on_features: (G,) bool, whether a model is trained on mixed features, where the loss is the
    mean over every pair (i, j) of the two batches, or on mixed losses. With lambda 1 both are the loss on the target
    alone, with 0 on the source alone.
    """
    flat = flat.detach().requires_grad_()
    weights = problem.layout.views(flat)
    both = RaggedBatch.from_bags([patients.bags.bag(i) for patients in (target, source) for i in range(len(patients))])
    h_t, h_s = bag_features(problem, weights, both).split([len(target), len(source)], dim=1)
    i, j = (index.flatten() for index in np.indices((len(target), len(source))))
    loss = flat.new_zeros(())
    for mixes_features in (False, True):
        models = (on_features == mixes_features).nonzero().squeeze(1)
        share, heads = shares[models], {name: weights[name][models] for name in ("head.weight", "head.bias")}
        if mixes_features:
            part = share.view(-1, 1, 1, 1)
            mixed = part * h_t[models].unsqueeze(2) + (1 - part) * h_s[models].unsqueeze(1)  # (G, b_t, b_s, dim_emb)
            logits = predict_bins(heads, mixed.flatten(1, 2))  # (G, b_t * b_s, T)
            of_target, of_source = (logits, *target.labels(i)), (logits, *source.labels(j))
        else:
            of_target = predict_bins(heads, h_t[models]), target.bins, target.event
            of_source = predict_bins(heads, h_s[models]), source.bins, source.event
        mixed_loss = share * _nll(*of_target, problem.alpha) + (1 - share) * _nll(*of_source, problem.alpha)
        loss = loss + mixed_loss.sum()
    return torch.autograd.grad(loss, flat)[0]


def _nll(logits: Tensor, bins: Tensor, event: Tensor, alpha: float) -> Tensor:
    """Mean loss (G,) from logits (G, B, T) of B patients."""
    g, b, _ = logits.shape
    hazards = torch.sigmoid(logits).flatten(0, 1)
    return nll_loss(hazards, bins.repeat(g), event.repeat(g), alpha, reduction="none").view(g, b).mean(1)


def train(
    problem: Problem,
    shares: Sequence[float],
    on_features: Sequence[bool],
    lengths: Sequence[int],
    seed: int,
    rate: float,
) -> dict[int, Tensor]:
    """Task vectors (G, P) of G models after each of `lengths` steps of plain gradient descent, by length.

    All start from M_0 and see the same batches: each data set's patients in an order drawn anew for each of its epochs,
    by `seed`; what remains of an epoch is dropped. Raises `Refused` where a model diverges.
    """
    lam = problem.null.new_tensor(list(shares))
    kinds = torch.tensor(list(on_features), device=lam.device)
    start = problem.null.expand(len(lam), -1)
    flat, vectors = start.clone(), {}
    batches = [
        _batches(len(p), np.random.default_rng([seed, i])) for i, p in enumerate((problem.target, problem.source))
    ]
    for step in range(1, max(lengths) + 1):
        batch = problem.target.some(next(batches[0])), problem.source.some(next(batches[1]))
        flat = flat - rate * gradients(problem, flat, lam, kinds, *batch)
        if step in lengths:
            if not torch.isfinite(flat).all():
                raise Refused(
                    f"plain gradient descent diverged within {step} steps at rate {rate}; take a smaller one."
                )
            vectors[step] = flat - start
    return vectors


def _batches(n: int, shuffler: np.random.Generator) -> Iterator[np.ndarray]:
    """Places of a batch's patients, without end: epoch after epoch, each in an order of its own."""
    size = min(BATCH, n)
    while True:
        yield from shuffler.permutation(n)[: n // size * size].reshape(-1, size)


def evaluate(problem: Problem, flat: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Test loss (alpha 0, as it is reported elsewhere) and C-index of G models, flat (G, P), each (G,)."""
    test, logits = problem.test, logits_of(problem, flat, problem.test)
    event = test.event.cpu().numpy()
    scores = [concordance_index(test.time_days, event, risk_score(torch.sigmoid(z)).cpu().numpy()) for z in logits]
    return _nll(logits, test.bins, test.event, alpha=0.0).cpu().numpy(), np.array(scores)


def compare(
    problem: Problem,
    lengths: Sequence[int],
    lambdas: Sequence[float],
    seeds: Sequence[int],
    rate: float = RATE,
) -> pd.DataFrame:
    """How near mixtures of task vectors are to the task vectors of mixed training, a row per seed, steps, lambda,
    reference (`LOSSES`, `FEATURES`) and candidate (`CANDIDATES`).

    cosine, ratio (norm of the candidate's over the reference's), distance (norm of their difference over the
    reference's), moved (norm of the reference's over M_0's), and test loss and C-index on the target: nll, c_index of
    the candidate, nll_reference, c_index_reference. seeds: of the order of batches. The candidate "other batches" is
    the same training under the next seed: how far two such trainings lie apart anyway; there is none with one seed.
    """
    m = len(lambdas)
    shares, on_features = [1.0, 0.0, *lambdas, *lambdas], [False] * (2 + m) + [True] * m
    rows = []
    with single_thread():
        by_seed = [train(problem, shares, on_features, lengths, seed, rate) for seed in seeds]
        for at, steps in product(range(len(seeds)), lengths):
            others = by_seed[(at + 1) % len(seeds)][steps] if len(seeds) > 1 else None
            compared = _rows(problem, by_seed[at][steps], others, lambdas)
            rows += [{"seed": seeds[at], "steps": steps, **row} for row in compared]
    return pd.DataFrame(rows)


def _rows(problem: Problem, tau: Tensor, others: Tensor | None, lambdas: Sequence[float]) -> list[dict[str, Any]]:
    """The rows of one seed and length. tau, others: (G, P) in the order of `compare`."""
    m, null = len(lambdas), problem.null
    vectors: dict[Any, Tensor] = {TARGET_ALONE: tau[0], SOURCE_ALONE: tau[1]}
    for k, share in enumerate(lambdas):
        vectors[MIXTURE, share] = share * tau[0] + (1 - share) * tau[1]
        for reference, place in ((LOSSES, 2 + k), (FEATURES, 2 + m + k)):
            vectors[reference, share] = tau[place]
            if others is not None:
                vectors[OTHER_BATCHES, reference, share] = others[place]
    losses, scores = evaluate(problem, null + torch.stack(list(vectors.values())))
    tested = {name: (losses[i], scores[i]) for i, name in enumerate(vectors)}
    rows = []
    for share, reference in product(lambdas, (LOSSES, FEATURES)):
        nll_reference, c_index_reference = tested[reference, share]
        target, norm = vectors[reference, share], vectors[reference, share].norm()
        names = {
            MIXTURE: (MIXTURE, share), TARGET_ALONE: TARGET_ALONE, SOURCE_ALONE: SOURCE_ALONE,
            OTHER_BATCHES: (OTHER_BATCHES, reference, share),
        }  # fmt: skip
        for candidate, name in names.items():
            if name not in vectors:
                continue
            nll, c_index = tested[name]
            rows.append(
                {
                    "lambda": share,
                    "reference": reference,
                    "candidate": candidate,
                    "cosine": float(F.cosine_similarity(vectors[name], target, dim=0, eps=0)),
                    "ratio": float(vectors[name].norm() / norm),
                    "distance": float((vectors[name] - target).norm() / norm),
                    "moved": float(norm / null.norm()),
                    "nll": nll,
                    "c_index": c_index,
                    "nll_reference": nll_reference,
                    "c_index_reference": c_index_reference,
                }
            )
    return rows


# ------------------------------------------------------------------------------------- Eq. 9's premise

CONVEX = "dL/dŷ is convex in ŷ, the label given"
EQ_9 = "Eq. 9: the same with mixed labels"
EQ_10 = "Eq. 10: for the gradient of the parameters"
SPREAD = 3.0  # of random logits


def premise(problem: Problem, models: Mapping[str, Tensor], n_pairs: int = 4096, seed: int = 0) -> pd.DataFrame:
    """In which share of the components the inequalities behind Eq. 10 hold, at predictions of models and at logits
    drawn at random. A row per place and statement.

    models: by name, flat (P,). Pairs (i, j) of the target's and the source's patients and lambda in [0, 1] are drawn;
    the random logits are Gaussian, of standard deviation `SPREAD`, with the labels of these pairs.

    - `CONVEX`: lambda g(a, y) + (1 - lambda) g(b, y) >= g(lambda a + (1 - lambda) b, y), with g = dL/dŷ, ŷ the logits.
      With hazards sigma(ŷ), a component of g is sigma(ŷ_u) plus a constant: convex below ŷ_u = 0, hazards under one
      half, concave above. The label is the target patient's.
    - `EQ_9`: lambda g(a, y_t) + (1 - lambda) g(b, y_s) >= g(mixed ŷ, mixed y). Convexity in ŷ does not give it: g is
      linear in the label, its coefficient depends on ŷ, and such a product is not convex in both.
    - `EQ_10`: the same for the gradient with respect to the parameters, the mean over all pairs of a batch, lambda 0.5.
      The derivatives of ŷ with respect to parameters have both signs, so Eq. 9 does not give it either.

    Components that are 0 on both sides (intervals after the label's) are left out. Returns place, statement, holds (a
    share), components, gap (norm of the difference of the two sides over the left side's: 0 where "approximately" is
    "exactly"), above_half (the share of hazards above one half in the intervals that count; NaN for Eq. 10).
    """
    shuffler = np.random.default_rng([seed, 9])
    target, source = problem.target, problem.source
    i, j = (shuffler.integers(len(patients), size=n_pairs) for patients in (target, source))
    share = torch.from_numpy(shuffler.random((n_pairs, 1))).to(problem.null)
    labels = target.labels(i), source.labels(j)
    rows = []
    with single_thread():
        for name, flat in models.items():
            z_t, z_s = (logits_of(problem, flat.unsqueeze(0), patients)[0] for patients in (target, source))
            rows += _inequalities(name, z_t[i], z_s[j], *labels, share, problem.alpha)
            rows.append(_of_parameters(problem, name, flat, seed))
        drawn = torch.from_numpy(shuffler.normal(scale=SPREAD, size=(2, *z_t[i].shape))).to(problem.null)
        rows += _inequalities("random logits", drawn[0], drawn[1], *labels, share, problem.alpha)
    return pd.DataFrame(rows)


def _inequalities(
    place: str, a: Tensor, b: Tensor, y_t: Labels, y_s: Labels, share: Tensor, alpha: float
) -> list[dict[str, Any]]:
    def g(logits: Tensor, label: Labels) -> Tensor:
        logits = logits.detach().requires_grad_()
        loss = nll_loss(torch.sigmoid(logits), *label, alpha, reduction="sum")
        return torch.autograd.grad(loss, logits)[0]

    mixed = share * a + (1 - share) * b
    sides = {
        CONVEX: (share * g(a, y_t) + (1 - share) * g(b, y_t), g(mixed, y_t)),
        EQ_9: (share * g(a, y_t) + (1 - share) * g(b, y_s), share * g(mixed, y_t) + (1 - share) * g(mixed, y_s)),
    }
    rows = []
    for statement, (left, right) in sides.items():
        counts = (left != 0) | (right != 0)
        hazards = torch.sigmoid(torch.stack([a, b]))[:, counts]
        rows.append({"place": place, "statement": statement, **_holding(left, right)})
        rows[-1]["above_half"] = float((hazards > 0.5).double().mean())
    return rows


def _of_parameters(problem: Problem, place: str, flat: Tensor, seed: int) -> dict[str, Any]:
    shuffler = np.random.default_rng([seed, 10])
    chosen = [p.some(next(_batches(len(p), shuffler))) for p in (problem.target, problem.source)]
    half, kinds = flat.new_full((2,), 0.5), torch.tensor([False, True], device=flat.device)
    left, right = gradients(problem, flat.expand(2, -1), half, kinds, *chosen)
    return {"place": place, "statement": EQ_10, **_holding(left, right), "above_half": float("nan")}


def _holding(left: Tensor, right: Tensor) -> dict[str, Any]:
    counts = (left != 0) | (right != 0)
    slack = 1e-12 * torch.maximum(left.abs(), right.abs())
    return {
        "holds": float((left - right >= -slack)[counts].double().mean()),
        "components": int(counts.sum()),
        "gap": float((left - right).norm() / left.norm()),
    }


# ------------------------------------------------------------------------------------------- of a study


def small_problem(bench: Workbench, pair: Run, device: str = "cpu") -> Problem:
    """The small problem of a pair (`steph.analysis.mixing.pairs.pair`): at most `MAX_PATIENTS` training patients of the
    target's fold and of the source's fold 0, at most `MAX_TESTED` of the target's external or else test patients, drawn
    by the study's seed, with at most `MAX_PATCHES` patches each, and ABMIL with at most `DIM_EMB` and `DIM_ATTN` units,
    its M_0 drawn by the same seed. Features of more than `DIM_IN` numbers are projected onto so many random directions
    and scaled to a mean square of 1, so that one rate suits all.

    Raises `Refused` for patients of whom no C-index can be told.
    """
    study, data, source_data = bench.study, bench.dataset(pair.dataset), bench.dataset(str(pair.entry.only))
    test_data, tested = data, data.splits.test(pair.fold)
    if data.external is not None:
        test_data, tested = data.external, list(data.external.cohort.patients["patient_id"])
    n = study.network
    small = {"dim_emb": min(n.dim_emb, DIM_EMB), "dim_attn": min(n.dim_attn, DIM_ATTN), "n_bins": n.n_bins}
    seed_everything(study.seed)
    network = ABMIL(min(study.features.dim, DIM_IN), **small, dropout=0.0).to(device, torch.float64).eval()
    loaded = [
        _load(study, network, data, data.splits.train(pair.fold), MAX_PATIENTS, device),
        _load(study, network, source_data, source_data.splits.train(0), MAX_PATIENTS, device),
        _load(study, network, test_data, tested, MAX_TESTED, device),
    ]
    of_target, of_source, test = _narrowed(loaded, study.seed)
    concordance_index(test.time_days, test.event.cpu().numpy(), np.zeros(len(test)))  # refuses what has no pairs
    return Problem(network, of_target, of_source, test, study.recipe.alpha)


def _narrowed(parts: list[Patients], seed: int) -> list[Patients]:
    """The patients with features of at most `DIM_IN` numbers; the first set's decide the scale of all."""
    dim = parts[0].bags.features.shape[1]
    if dim <= DIM_IN:
        return parts
    drawn = torch.randn(dim, DIM_IN, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    narrow = [part.bags.features @ drawn.to(part.bags.features) for part in parts]
    scale = narrow[0].square().mean().sqrt()
    return [
        replace(part, bags=RaggedBatch(features / scale, part.bags.offsets))
        for part, features in zip(parts, narrow, strict=True)
    ]


def _load(study: Study, network: ABMIL, data: Dataset, patients: Sequence[str], most: int, device: str) -> Patients:
    if len(patients) > most:
        places = np.sort(np.random.default_rng(study.seed).choice(len(patients), most, replace=False))
        patients = [patients[i] for i in places]
    labels = data.labels(patients)
    bags = loader(network, data, patients, Compute(device, "fp64", MAX_PATCHES))(patients)
    bins, event = targets(labels, study.network.n_bins, study.network.bin_width_days, device)
    return Patients(bags, bins, event, labels["time_days"].to_numpy())


def lengths(study: Study) -> list[int]:
    """Those of `LENGTHS` that a study's recipe gives room for: 10 steps to an epoch, at least two lengths."""
    return [steps for steps in LENGTHS if steps <= max(10 * study.recipe.epochs, LENGTHS[1])]


def of_pair(bench: Workbench, pair: Run, seeds: Sequence[int], device: str = "cpu") -> pd.DataFrame:
    """`compare` on the `small_problem` of a pair, over `lengths`. Computed once."""
    settings: dict[str, Any] = {"seeds": list(seeds), "lengths": lengths(bench.study), "lambdas": LAMBDAS, "rate": RATE}
    return cached_table(
        bench,
        "vicinal",
        _inputs(bench, pair) | settings,
        lambda: compare(small_problem(bench, pair, device), **settings),
    )


def premise_of_pair(bench: Workbench, pair: Run, seed: int, device: str = "cpu") -> pd.DataFrame:
    """`premise` on the `small_problem` of a pair, at M_0 and at the M_t of the longest of `lengths`. Computed once."""
    steps = max(lengths(bench.study))

    def compute() -> pd.DataFrame:
        problem = small_problem(bench, pair, device)
        with single_thread():
            tau = train(problem, [1.0], [False], [steps], seed, RATE)[steps][0]
        return premise(problem, {"M_0": problem.null, "M_t": problem.null + tau}, seed=seed)

    inputs = _inputs(bench, pair) | {"seed": seed, "steps": steps}
    return cached_table(bench, "vicinal_premise", inputs, compute)


def _inputs(bench: Workbench, pair: Run) -> dict[str, Any]:
    """The patients, features and settings that the small problem of a pair follows from."""
    study, data, source = bench.study, bench.dataset(pair.dataset), str(pair.entry.only)
    return {
        "target": [pair.dataset, data.fingerprint, data.external.fingerprint if data.external else ""],
        "source": [source, bench.dataset(source).fingerprint],
        "fold": pair.fold,
        "study": [study.seed, study.features.dim, study.network.model_dump(mode="json"), study.recipe.alpha],
    }


def summary(table: pd.DataFrame) -> pd.DataFrame:
    """Means over seeds of `compare`'s numbers, a row per steps, lambda, reference and candidate, with nll_gap and
    c_index_gap, candidate less reference; of cosine, distance, nll, c_index and the gaps also the least and the largest
    (..._min, ..._max)."""
    gaps = {f"{name}_gap": table[name] - table[f"{name}_reference"] for name in ("nll", "c_index")}
    grouped = table.assign(**gaps).groupby(["steps", "lambda", "reference", "candidate"], sort=False)
    means = grouped.mean(numeric_only=True).drop(columns="seed")
    for name in ("cosine", "distance", "nll", "c_index", *gaps):
        means[f"{name}_min"], means[f"{name}_max"] = grouped[name].min(), grouped[name].max()
    return means.reset_index()


def take_away(summary: pd.DataFrame, premise: pd.DataFrame) -> list[str]:
    """Appendix B in words, from `summary` and `premise`: list items. lambda is the one nearest to 0.5."""
    lambdas = summary["lambda"].unique()
    rows = summary[summary["lambda"] == lambdas[np.abs(lambdas - 0.5).argmin()]]
    shortest, longest = (rows[rows["steps"] == steps] for steps in (rows["steps"].min(), rows["steps"].max()))
    first, last = (part.set_index(["reference", "candidate"]).to_dict("index") for part in (shortest, longest))
    steps = int(longest["steps"].iloc[0])
    losses, features = last[LOSSES, MIXTURE], last[FEATURES, MIXTURE]
    nearer = max(last[FEATURES, name]["cosine"] for name in (TARGET_ALONE, SOURCE_ALONE))
    reordered = ""
    if (FEATURES, OTHER_BATCHES) in last:
        reordered = (
            f", and mixed features with its patients in another order {last[FEATURES, OTHER_BATCHES]['cosine']:.2f}"
        )
    tested = [
        f"{name} {row[f'nll{end}']:.3f}, {row[f'c_index{end}']:.3f}"
        for name, row, end in (
            ("M_t", last[LOSSES, TARGET_ALONE], ""),
            ("the mixture", losses, ""),
            ("mixed losses", losses, "_reference"),
            ("mixed features", features, "_reference"),
        )
    ]
    holds = premise.pivot(index="place", columns="statement", values="holds").dropna(subset=EQ_10)
    shares = [
        f"at {place} in {100 * row[CONVEX]:.0f} % of the components, Eq. 9 in {100 * row[EQ_9]:.0f} %, Eq. 10 in "
        f"{100 * row[EQ_10]:.0f} %"
        for place, row in holds.iterrows()
    ]
    return [
        f"- After {shortest['steps'].iloc[0]} step the mixture is, up to a relative distance of "
        f"{first[LOSSES, MIXTURE]['distance']:.0e}, the task vector of training on mixed losses (Eq. 8), and "
        f"{first[FEATURES, MIXTURE]['distance']:.2f} from that of mixed features; after {steps} steps it is "
        f"{losses['distance']:.2f} and {features['distance']:.2f} away (cosine {losses['cosine']:.2f} and "
        f"{features['cosine']:.2f}).",
        f"- Beside it, the better of the two task vectors alone has a cosine of {nearer:.2f} with mixed features"
        f"{reordered}.",
        f"- On new patients of the target after {steps} steps (loss, C-index): {'; '.join(tested)}.",
        f"- The convexity that Eq. 9 asks for holds {'; '.join(shares)}.",
    ]
