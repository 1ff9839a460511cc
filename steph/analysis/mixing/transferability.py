"""Transferability: how well does each cancer's model rank the patients of every other cancer, and what goes with it?

Matrices here have a row per source (whose model) and a column per target (whose patients).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

from steph import Refused
from steph.analysis.mixing.dynamics import at_the_end, rank_correlation
from steph.analysis.performance import discrimination
from steph.data.dataset import Dataset
from steph.merging.task_vectors import Layout, task_vector
from steph.mil.base import network_needing_coords
from steph.study.cache import cached_table
from steph.study.runs import SOURCE_FOLD, Run, Workbench
from steph.survival import concordance_index, risk_score
from steph.training.device import parameter_dtype, single_thread


def source_runs(bench: Workbench, precision: str = "fp32") -> dict[str, Run]:
    """By data set, the run whose model stands for it as a source."""
    seed = bench.study.seed
    return {name: Run(name, "vanilla", SOURCE_FOLD, seed, precision) for name in bench.study.datasets}


def transferred(bench: Workbench, targets: Sequence[str], precision: str = "fp32", device: str = "cpu") -> pd.DataFrame:
    """C-index of every other cancer's model on all patients of each target, none of whom it has seen: source, target,
    c_index, n, events, problem (why it has none).

    Each bag is read once for all models; what is found is kept, target by target. The models must be finished
    (`source_runs`); one that is not is refused.
    """
    runs = source_runs(bench, precision)
    tables = []
    for target in targets:
        sources = bench.study.sources_of(target)
        decides = {
            "models": {name: bench.key(runs[name]) for name in sources}, "data": bench.dataset(target).fingerprint,
            "max_patches": bench.study.recipe.max_patches,
        }  # fmt: skip
        table = cached_table(
            bench,
            f"transferred-{target}",
            decides,
            lambda target=target, sources=sources: _on_target(  # type: ignore[misc]
                bench.dataset(target), {s: bench.model(runs[s]) for s in sources}, bench, precision, device
            ),
        )
        tables.append(table.assign(target=target))
    table = pd.concat(tables, ignore_index=True)
    return table.assign(problem=table["problem"].fillna(""))[["source", "target", "c_index", "n", "events", "problem"]]


def _on_target(
    data: Dataset, models: Mapping[str, nn.Module], bench: Workbench, precision: str, device: str
) -> pd.DataFrame:
    patients = list(data.cohort.patients["patient_id"])
    risks = risks_of(models, data, patients, device, precision, bench.study.recipe.max_patches)
    labels = data.labels(patients)
    rows = []
    for source in models:
        row = {"source": source, "n": len(labels), "events": int(labels["event"].sum()), "c_index": None, "problem": ""}
        try:
            row["c_index"] = concordance_index(labels["time_days"], labels["event"], risks[source])
        except Refused as reason:
            row["problem"] = str(reason)
        rows.append(row)
    return pd.DataFrame(rows)


@torch.no_grad()
def risks_of(
    models: Mapping[str, nn.Module],
    data: Dataset,
    patients: Sequence[str],
    device: str = "cpu",
    precision: str = "fp32",
    max_patches: int | None = None,
) -> pd.DataFrame:
    """Risk of each patient (row) under each model (column). A bag is read once, and one at a time."""
    dtype = parameter_dtype(precision)
    for model in models.values():
        model.to(device, dtype).eval()
    coords = any(network_needing_coords(model) for model in models.values())
    rows = []
    with single_thread():
        for patient in patients:
            bag = data.batch([patient], device, dtype, coords, max_patches)
            logits = [torch.sigmoid(model(bag)).double().cpu() for model in models.values()]
            rows.append(risk_score(torch.cat(logits)).numpy())
    return pd.DataFrame(rows, index=list(patients), columns=list(models))


def matrix(table: pd.DataFrame, own: pd.DataFrame, names: Sequence[str]) -> pd.DataFrame:
    """`transferred` as a matrix (sources, targets); on the diagonal, each cancer's own models on the patients that they
    were not trained on (`predictions.out_of_fold` of vanilla), over pairs within folds. NaN where undefined."""
    wide = table.pivot(index="source", columns="target", values="c_index")
    wide = wide.reindex(index=list(names), columns=list(dict.fromkeys(table["target"])))
    for target in wide.columns:
        pairs = discrimination.pairs_of(own[own["dataset"] == target])
        wide.loc[target, target] = pairs.c_index(np.ones(len(pairs.stratum)))[0]
    return wide.rename_axis(index="source", columns="target")


def task_vector_cosine(bench: Workbench, precision: str = "fp32") -> pd.DataFrame:
    """Cosine of the angle between the task vectors of each two cancers' encoders, of the models of `source_runs`."""
    null = bench.null_state("abmil")
    layout = Layout.of(null, without="head.")
    flat: dict[str, Tensor] = {}
    for name, run in source_runs(bench, precision).items():
        tau = layout.flatten(task_vector(bench.state(run), null)).double()
        flat[name] = tau / tau.norm()
    vectors = torch.stack(list(flat.values()))
    return pd.DataFrame((vectors @ vectors.T).numpy(), index=list(flat), columns=list(flat))


def final_weights(courses: Mapping[str, pd.DataFrame], names: Sequence[str]) -> pd.DataFrame:
    """Final w of each source (row) in STEPH for each target (column), mean over starts, of
    `steph.analysis.mixing.dynamics.of_finished`; NaN on the diagonal and for sources that a course lacks."""
    columns = {target: at_the_end(course).groupby("source")["w"].mean() for target, course in courses.items()}
    return pd.DataFrame(columns).reindex(index=list(names))


def asymmetry(table: pd.DataFrame) -> tuple[float, float]:
    """Of a square matrix: the mean absolute difference of the two directions of a pair, and the rank correlation of one
    direction with the other over all pairs (both orders, so that it does not matter which is first)."""
    table = table.loc[table.columns]
    values = table.to_numpy(float)
    off = ~np.eye(len(values), dtype=bool) & np.isfinite(values) & np.isfinite(values.T)
    there, back = pd.Series(values[off]), pd.Series(values.T[off])
    return float((there - back).abs().mean()), rank_correlation(there, back)


def goes_with(table: pd.DataFrame, other: pd.DataFrame, n: int = 1999, seed: int = 0) -> tuple[float, float, int]:
    """Do the sources that transfer well to a target have large values in another matrix? The rank correlation over the
    sources of a target, mean over targets; its p-value (two-sided); on how many targets it stands.

    The p-value asks how often names of cancers, exchanged at random in the other matrix, give a mean as far from 0
    (n exchanges; Mantel's test). It is NaN where not every target is a source as well, in both matrices.
    """
    names, targets = list(table.index), [t for t in table.columns if t in other.columns]
    first, second = (_ranked(m.reindex(index=names, columns=targets)) for m in (table, other))
    both = first.any(axis=0) & second.any(axis=0)
    if not both.any():
        return float("nan"), float("nan"), 0
    seen = float((first * second).sum() / both.sum())
    if list(targets) != names or not both.all():
        return seen, float("nan"), int(both.sum())
    rng = np.random.default_rng(seed)
    shuffled = (rng.permutation(len(names)) for _ in range(n))
    drawn = np.array([(first * second[np.ix_(order, order)]).sum() / both.sum() for order in shuffled])
    # A hair's breadth, so that the same value from another order of summation counts as reached.
    p = (1 + np.count_nonzero(np.abs(drawn) >= abs(seen) - 1e-12)) / (1 + n)
    return seen, float(p), int(both.sum())


def relations(table: pd.DataFrame, others: Mapping[str, pd.DataFrame]) -> pd.DataFrame:
    """`goes_with` for several matrices, by what they are: with, correlation, p, targets, problem (why none)."""
    rows = []
    for name, other in others.items():
        correlation, p, targets = goes_with(table, other)
        problem = "" if targets else "no target whose sources all have values, and different ones, in both"
        rows.append((name, correlation, p, targets, problem))
    return pd.DataFrame(rows, columns=["with", "correlation", "p", "targets", "problem"])


def better_elsewhere(table: pd.DataFrame) -> pd.DataFrame:
    """For each target of a matrix, a row: target, own (C-index of its own model), best (of another cancer's), source
    (whose that is), mean (over the other cancers')."""
    rows = []
    for target in table.columns:
        others = table[target].drop(target).dropna()
        if len(others):
            best = str(others.idxmax())
            rows.append((target, table.loc[target, target], others[best], best, others.mean()))
    return pd.DataFrame(rows, columns=["target", "own", "best", "source", "mean"])


def _ranked(table: pd.DataFrame) -> np.ndarray:
    """Ranks within each column, without the diagonal, to mean 0 and length 1: the product of two columns is Spearman's
    correlation. A column that is constant or lacks a value is 0 throughout."""
    ranked = np.zeros(table.shape)
    for j, target in enumerate(table.columns):
        others = table.index != target
        values = table.loc[others, target]
        if values.notna().all() and np.ptp(values) > 1e-12:
            ranks = values.rank().to_numpy()
            ranked[others, j] = (ranks - ranks.mean()) / np.linalg.norm(ranks - ranks.mean())
    return ranked
