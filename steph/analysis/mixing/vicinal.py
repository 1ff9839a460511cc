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
from steph.analysis.mixing.pairs import patient_sets
from steph.data.bags import RaggedBatch
from steph.data.dataset import Dataset
from steph.data.manifest import Study
from steph.merging.task_vectors import Layout
from steph.mil.abmil import ABMIL
from steph.study.cache import cached_table
from steph.study.runs import Run, Workbench
from steph.survival import concordance_index, nll_loss, risk_score, targets
from steph.training.device import single_thread
from steph.training.engine import loader, seed_everything

LENGTHS = (1, 2, 5, 10, 20, 50, 100, 200)
"""Steps of training after which vectors are compared."""
LAMBDAS = (0.25, 0.5, 0.75)
RATE = 0.5
BATCH = 16  # patients of each data set in a step
DIM_IN, DIM_EMB, DIM_ATTN = 32, 32, 24  # at most
MAX_PATIENTS, MAX_TESTED, MAX_PATCHES = 256, 300, 16  # per data set, per data set, per bag
LOSSES, FEATURES = "mixed losses (Eq. 8)", "mixed features (Eq. 10)"
MIXTURE, TARGET_ALONE, SOURCE_ALONE, OTHER_BATCHES = "mixture", "target alone", "source alone", "other batches"
CANDIDATES = (MIXTURE, TARGET_ALONE, SOURCE_ALONE, OTHER_BATCHES)

Training = tuple[float, str]
"""A training: lambda, and what is mixed, `LOSSES` or `FEATURES`. With lambda 1 both are training on the target alone,
with 0 on the source alone."""


@dataclass(frozen=True, eq=False)
class Patients:
    """Bags with their labels: bins (N,), event (N,) bool, time_days (N,)."""

    bags: RaggedBatch
    bins: Tensor
    event: Tensor
    time_days: np.ndarray

    def __len__(self) -> int:
        return len(self.bags)

    def some(self, chosen: np.ndarray) -> "Patients":
        """The patients at these places."""
        bags = RaggedBatch.from_bags([self.bags.bag(int(i)) for i in chosen])
        return Patients(bags, self.bins[chosen], self.event[chosen], self.time_days[chosen])


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

    def logits(self, flat: Tensor, bags: RaggedBatch) -> Tensor:
        """Logits of the hazards (G, N, T) of N bags under G models, flat (G, P)."""
        weights, starts = self.layout.views(flat), range(0, len(bags), BATCH)
        groups = [bags.between(start, min(start + BATCH, len(bags))) for start in starts]
        under_each = vmap(lambda one, group: functional_call(self.network, one, (group,)), in_dims=(0, None))
        return torch.cat([under_each(weights, group) for group in groups], dim=1)


def gradients(
    problem: Problem, flat: Tensor, trainings: Sequence[Training], target: Patients, source: Patients
) -> Tensor:
    """Gradient (G, P) of the mixed loss of each of G trainings, which have come to the models flat (G, P), on a batch
    of each data set: the mean over every pair (i, j) of the two batches."""
    flat = flat.detach().requires_grad_()
    share = flat.new_tensor([lam for lam, _ in trainings]).view(-1, 1, 1)
    mixes_features = torch.tensor([mixed == FEATURES for _, mixed in trainings], device=flat.device).view(-1, 1, 1)
    i, j = (index.flatten() for index in np.indices((len(target), len(source))))
    z_t, z_s = problem.logits(flat, target.bags)[:, i], problem.logits(flat, source.bags)[:, j]  # (G, pairs, T)
    mixed = share * z_t + (1 - share) * z_s  # the head is linear: these are the logits of the mixed feature
    of_target = _nll(torch.where(mixes_features, mixed, z_t), target.bins[i], target.event[i], problem.alpha)
    of_source = _nll(torch.where(mixes_features, mixed, z_s), source.bins[j], source.event[j], problem.alpha)
    loss = share.flatten() * of_target + (1 - share.flatten()) * of_source
    return torch.autograd.grad(loss.sum(), flat)[0]


def _nll(logits: Tensor, bins: Tensor, event: Tensor, alpha: float) -> Tensor:
    """Mean loss (G,) from logits (G, B, T) of B patients."""
    return nll_loss(torch.sigmoid(logits), bins, event, alpha, reduction="none").mean(1)


def train(problem: Problem, trainings: Sequence[Training], lengths: Sequence[int], seed: int) -> dict[int, Tensor]:
    """Task vectors (G, P) of G trainings after each of `lengths` steps of plain gradient descent, by length.

    All start from M_0 and see the same batches: each data set's patients in an order drawn anew for each of its epochs,
    by `seed`; what remains of an epoch is dropped. Raises `Refused` where a model diverges.
    """
    start = problem.null.expand(len(trainings), -1)
    flat, vectors = start, {}
    sets = [(patients, np.random.default_rng([seed, i])) for i, patients in enumerate((problem.target, problem.source))]
    batches = zip(*(_batches(*each) for each in sets), strict=True)
    for step in range(1, max(lengths) + 1):
        flat = flat - RATE * gradients(problem, flat, trainings, *next(batches))
        if step in lengths:
            if not torch.isfinite(flat).all():
                raise Refused(f"plain gradient descent diverged within {step} steps at rate {RATE}.")
            vectors[step] = flat - start
    return vectors


def _batches(patients: Patients, shuffler: np.random.Generator) -> Iterator[Patients]:
    """Batches without end: epoch after epoch, each in an order of its own."""
    n = len(patients)
    size = min(BATCH, n)
    while True:
        yield from map(patients.some, shuffler.permutation(n)[: n // size * size].reshape(-1, size))


def evaluate(problem: Problem, flat: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Test loss (alpha 0, as it is reported elsewhere) and C-index of G models, flat (G, P), each (G,)."""
    test = problem.test
    with torch.no_grad():
        logits = problem.logits(flat, test.bags)
    event, risks = test.event.cpu().numpy(), risk_score(torch.sigmoid(logits)).cpu().numpy()
    scores = [concordance_index(test.time_days, event, risk) for risk in risks]
    return _nll(logits, test.bins, test.event, alpha=0.0).cpu().numpy(), np.array(scores)


def compare(problem: Problem, lengths: Sequence[int], seeds: Sequence[int]) -> pd.DataFrame:
    """How near mixtures of task vectors are to the task vectors of mixed training, a row per seed, steps, lambda,
    reference (`LOSSES`, `FEATURES`) and candidate (`CANDIDATES`).

    cosine, distance (norm of their difference over the reference's), and test loss and C-index on the target: nll,
    c_index of the candidate, nll_reference, c_index_reference. seeds: two at least, of the order of batches. The
    candidate "other batches" is the same training under the next seed: how far two such trainings lie apart anyway.
    """
    alone, mixed = [(1.0, LOSSES), (0.0, LOSSES)], list(product(LAMBDAS, (LOSSES, FEATURES)))
    trainings, rows = [*alone, *mixed], []
    with single_thread():
        by_seed = {seed: train(problem, trainings, lengths, seed) for seed in seeds}
        for (seed, following), steps in product(zip(seeds, [*seeds[1:], seeds[0]], strict=True), lengths):
            tau, others = (dict(zip(trainings, by_seed[s][steps], strict=True)) for s in (seed, following))
            tau_t, tau_s = (tau[training] for training in alone)
            for lam, reference in mixed:
                wanted = tau[lam, reference]
                vectors = torch.stack([lam * tau_t + (1 - lam) * tau_s, tau_t, tau_s, others[lam, reference], wanted])
                nll, c_index = evaluate(problem, problem.null + vectors)
                columns = {
                    "cosine": F.cosine_similarity(vectors, wanted, dim=1, eps=0),
                    "distance": (vectors - wanted).norm(dim=1) / wanted.norm(),
                    "nll": nll,
                    "c_index": c_index,
                }
                table = pd.DataFrame({name: values[:-1] for name, values in columns.items()})
                table = table.assign(seed=seed, steps=steps, reference=reference, candidate=CANDIDATES)
                table["lambda"], table["nll_reference"], table["c_index_reference"] = lam, nll[-1], c_index[-1]
                rows.append(table)
    return pd.concat(rows, ignore_index=True)


def summary(table: pd.DataFrame) -> pd.DataFrame:
    """Means over seeds of `compare`'s numbers, a row per steps, lambda, reference and candidate; of the candidates' own
    also the least and the largest (..._min, ..._max)."""
    grouped = table.groupby(["steps", "lambda", "reference", "candidate"], sort=False)
    means = grouped.mean().drop(columns="seed")
    for name in ("cosine", "distance", "nll", "c_index"):
        means[f"{name}_min"], means[f"{name}_max"] = grouped[name].min(), grouped[name].max()
    return means.reset_index()


CONVEX = "dL/dŷ is convex in ŷ, the label given"
EQ_9 = "Eq. 9: the same with mixed labels"
EQ_10 = "Eq. 10: for the gradient of the parameters"
SPREAD, PAIRS = 3.0, 4096  # of random logits; that are drawn


def premise(problem: Problem, models: Mapping[str, Tensor], seed: int) -> pd.DataFrame:
    """In which share of the components the inequalities behind Eq. 10 hold, at predictions of models and at logits
    drawn at random. A row per place and statement.

    models: by name, flat (P,). `PAIRS` pairs (i, j) of the target's and the source's patients and lambda in [0, 1] are
    drawn; the random logits are Gaussian, of standard deviation `SPREAD`, with the labels of these pairs.

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
    target, source = problem.target, problem.source
    shuffler, of_batches = np.random.default_rng([seed, 9]), np.random.default_rng([seed, 10])
    i, j = (shuffler.integers(len(patients), size=PAIRS) for patients in (target, source))
    share = torch.from_numpy(shuffler.random((PAIRS, 1))).to(problem.null)
    batch = [next(_batches(patients, of_batches)) for patients in (target, source)]

    def g(logits: Tensor, patients: Patients, at: np.ndarray) -> Tensor:
        logits = logits.detach().requires_grad_()
        loss = nll_loss(torch.sigmoid(logits), patients.bins[at], patients.event[at], problem.alpha, reduction="sum")
        return torch.autograd.grad(loss, logits)[0]

    predicted, rows = {}, []
    with single_thread():
        for name, flat in models.items():
            z_t, z_s = (problem.logits(flat[None], patients.bags)[0].detach() for patients in (target, source))
            predicted[name] = torch.stack([z_t[i], z_s[j]])
        drawn = shuffler.normal(scale=SPREAD, size=(2, *z_t[i].shape))
        predicted["random logits"] = torch.from_numpy(drawn).to(problem.null)
        for name, (a, b) in predicted.items():
            mixed = share * a + (1 - share) * b
            left, right, logits = share * g(a, target, i), g(mixed, target, i), torch.stack([a, b])
            right_of_labels = share * right + (1 - share) * g(mixed, source, j)
            statements = {
                CONVEX: _holding(left + (1 - share) * g(b, target, i), right, logits),
                EQ_9: _holding(left + (1 - share) * g(b, source, j), right_of_labels, logits),
            }
            if name in models:
                trainings = [(0.5, LOSSES), (0.5, FEATURES)]
                statements[EQ_10] = _holding(*gradients(problem, models[name].expand(2, -1), trainings, *batch))
            rows += [{"place": name, "statement": statement, **how} for statement, how in statements.items()]
    return pd.DataFrame(rows)


def _holding(left: Tensor, right: Tensor, logits: Tensor | None = None) -> dict[str, Any]:
    """How left >= right holds, component by component, and beside which logits (2, ...)."""
    counts = (left != 0) | (right != 0)
    slack = 1e-12 * torch.maximum(left.abs(), right.abs())
    return {
        "holds": float((left - right >= -slack)[counts].double().mean()),
        "components": int(counts.sum()),
        "gap": float((left - right).norm() / left.norm()),
        "above_half": np.nan if logits is None else float((logits[:, counts] > 0).double().mean()),
    }


def small_problem(bench: Workbench, pair: Run) -> Problem:
    """The small problem of a pair (`steph.analysis.mixing.pairs.pair`): at most `MAX_PATIENTS` training patients of the
    target's fold and of the source's fold 0, at most `MAX_TESTED` of the target's external or else test patients, drawn
    by the study's seed, with at most `MAX_PATCHES` patches each, and ABMIL with at most `DIM_EMB` and `DIM_ATTN` units,
    its M_0 drawn by the same seed. Features of more than `DIM_IN` numbers are projected onto so many random directions
    and scaled to a mean square of 1, so that one rate suits all.

    Raises `Refused` for patients of whom no C-index can be told.
    """
    study, n = bench.study, bench.study.network
    of_target, source = patient_sets(bench, pair), bench.dataset(str(pair.entry.only))
    small = {"dim_emb": min(n.dim_emb, DIM_EMB), "dim_attn": min(n.dim_attn, DIM_ATTN), "n_bins": n.n_bins}
    seed_everything(study.seed)
    compute = replace(bench.compute, precision="fp64", max_patches=MAX_PATCHES)
    network = ABMIL(min(study.features.dim, DIM_IN), **small, dropout=0.0).to(compute.device, compute.dtype).eval()

    def load(data: Dataset, patients: Sequence[str], most: int) -> Patients:
        if len(patients) > most:
            places = np.sort(np.random.default_rng(study.seed).choice(len(patients), most, replace=False))
            patients = [patients[i] for i in places]
        labels, bags = data.labels(patients), loader(network, data, patients, compute)(patients)
        return Patients(
            bags, *targets(labels, n.n_bins, n.bin_width_days, compute.device), labels["time_days"].to_numpy()
        )

    parts = [
        load(*of_target["train"], MAX_PATIENTS),
        load(source, source.splits.train(0), MAX_PATIENTS),
        load(*of_target.get("external", of_target["test"]), MAX_TESTED),
    ]
    if (dim := study.features.dim) > DIM_IN:
        drawn = torch.randn(dim, DIM_IN, generator=torch.Generator().manual_seed(study.seed), dtype=torch.float64)
        narrow = [part.bags.features @ drawn.to(compute.device) for part in parts]
        scale = narrow[0].square().mean().sqrt()
        bags = [RaggedBatch(x / scale, part.bags.offsets) for x, part in zip(narrow, parts, strict=True)]
        parts = [replace(part, bags=narrowed) for part, narrowed in zip(parts, bags, strict=True)]
    target, source_patients, test = parts
    concordance_index(test.time_days, test.event.cpu().numpy(), np.zeros(len(test)))  # refuses what has no pairs
    return Problem(network, target, source_patients, test, study.recipe.alpha)


def lengths(study: Study) -> list[int]:
    """Those of `LENGTHS` that a study's recipe gives room for: 10 steps to an epoch, at least two lengths."""
    return [steps for steps in LENGTHS if steps <= max(10 * study.recipe.epochs, LENGTHS[1])]


def of_pair(bench: Workbench, pair: Run, seeds: Sequence[int]) -> pd.DataFrame:
    """`compare` on the `small_problem` of a pair, over `lengths`. Computed once."""
    steps = lengths(bench.study)
    inputs = {"pair": bench.key(pair), "seeds": list(seeds), "steps": steps}
    return cached_table(bench, "vicinal", inputs, lambda: compare(small_problem(bench, pair), steps, seeds))


def premise_of_pair(bench: Workbench, pair: Run, seed: int) -> pd.DataFrame:
    """`premise` on the `small_problem` of a pair, at M_0 and at the M_t of the longest of `lengths`. Computed once."""
    steps = max(lengths(bench.study))

    def compute() -> pd.DataFrame:
        problem = small_problem(bench, pair)
        with single_thread():
            tau = train(problem, [(1.0, LOSSES)], [steps], seed)[steps][0]
        return premise(problem, {"M_0": problem.null, "M_t": problem.null + tau}, seed)

    return cached_table(bench, "vicinal_premise", {"pair": bench.key(pair), "seed": seed, "steps": steps}, compute)


def take_away(summary: pd.DataFrame, premise: pd.DataFrame) -> list[str]:
    """Appendix B in words, from `summary` and `premise`: list items. lambda is 0.5."""
    rows = summary[summary["lambda"] == 0.5].set_index(["steps", "reference", "candidate"]).to_dict("index")
    start, steps = summary["steps"].min(), summary["steps"].max()
    losses, features = (rows[steps, reference, MIXTURE] for reference in (LOSSES, FEATURES))
    cosines = {name: rows[steps, FEATURES, name]["cosine"] for name in CANDIDATES}
    alone = rows[steps, LOSSES, TARGET_ALONE]
    holds = premise.pivot(index="place", columns="statement", values="holds").dropna()
    shares = [
        f"at {place} in {100 * row[CONVEX]:.0f} % of the components, Eq. 9 in {100 * row[EQ_9]:.0f} %, Eq. 10 in "
        f"{100 * row[EQ_10]:.0f} %"
        for place, row in holds.iterrows()
    ]
    return [
        f"- After {start} step the mixture is, up to a relative distance of "
        f"{rows[start, LOSSES, MIXTURE]['distance']:.0e}, the task vector of training on mixed losses (Eq. 8), and "
        f"{rows[start, FEATURES, MIXTURE]['distance']:.2f} from that of mixed features; after {steps} steps it is "
        f"{losses['distance']:.2f} and {features['distance']:.2f} away (cosine {losses['cosine']:.2f} and "
        f"{features['cosine']:.2f}).",
        f"- Beside it, the better of the two task vectors alone has a cosine of "
        f"{max(cosines[TARGET_ALONE], cosines[SOURCE_ALONE]):.2f} with mixed features, and mixed features with its "
        f"patients in another order {cosines[OTHER_BATCHES]:.2f}.",
        f"- On new patients of the target after {steps} steps (loss, C-index): M_t {alone['nll']:.3f}, "
        f"{alone['c_index']:.3f}; the mixture {losses['nll']:.3f}, {losses['c_index']:.3f}; mixed losses "
        f"{losses['nll_reference']:.3f}, {losses['c_index_reference']:.3f}; mixed features "
        f"{features['nll_reference']:.3f}, {features['c_index_reference']:.3f}.",
        f"- The convexity that Eq. 9 asks for holds {'; '.join(shares)}.",
    ]
