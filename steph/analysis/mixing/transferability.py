"""Transferability: how well does each cancer's model rank the patients of every other cancer, and what goes with it?

Matrices here have a row per source (whose model) and a column per target (whose patients).
"""

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
import torch
from torch import nn

from steph.analysis.mixing import dynamics
from steph.analysis.performance import discrimination
from steph.data.dataset import Dataset
from steph.merging.task_vectors import Layout, encoder_part, task_vector
from steph.mil.base import Model
from steph.study.cache import cached_table
from steph.study.execute import c_index
from steph.study.overlap import refuse_trained
from steph.study.runs import SOURCE_FOLD, Run, Workbench
from steph.survival import risk_score
from steph.training.device import Compute, single_thread
from steph.training.engine import loader


def source_runs(bench: Workbench) -> dict[str, Run]:
    """By data set, the run whose model stands for it as a source."""
    return {name: bench.run_of(name, "vanilla", SOURCE_FOLD) for name in bench.study.datasets}


def transferred(bench: Workbench, targets: Sequence[str]) -> pd.DataFrame:
    """C-index of every other cancer's model on all patients of each target, none of whom it has seen: source, target,
    c_index, n, events, problem (why it has none).

    Each bag is read once for all models; each target's table is computed once. The models (`source_runs`) must be
    finished; one that is not is refused, and so is one that a patient of the target has trained.
    """
    tables = [_on_target(bench, target) for target in targets]
    table = pd.concat(tables, ignore_index=True).fillna({"problem": ""})
    return table[["source", "target", "c_index", "n", "events", "problem"]]


def _on_target(bench: Workbench, target: str) -> pd.DataFrame:
    study, data = bench.study, bench.dataset(target)
    runs = {name: run for name, run in source_runs(bench).items() if name in study.sources_of(target)}
    for name in runs:
        refuse_trained(bench, f"{name} on {target}", target, list(data.cohort.slides_of), name, SOURCE_FOLD)
    inputs = {
        "models": {name: bench.key(run) for name, run in runs.items()}, "data": data.fingerprint,
        "max_patches": study.recipe.max_patches,
    }  # fmt: skip

    def compute() -> pd.DataFrame:
        return c_indices({name: bench.model(run) for name, run in runs.items()}, data, bench.compute)

    return cached_table(bench, f"transferred-{target}", inputs, compute).assign(target=target)


@torch.no_grad()
def c_indices(models: Mapping[str, Model], data: Dataset, compute: Compute) -> pd.DataFrame:
    """C-index of each model on all patients of a data set: source (the model's name), c_index, n, events, problem."""
    patients = list(data.cohort.patients["patient_id"])
    together = nn.ModuleList(models.values()).to(compute.device, compute.parameter_dtype).eval()
    batch_of, risks = loader(together, data, patients, compute), []
    with single_thread():
        for patient in patients:
            bag = batch_of([patient])
            risks.append([risk_score(torch.sigmoid(model(bag)).double().cpu()).item() for model in together])
    labels, rows = data.labels(patients), []
    for source, risk in zip(models, np.transpose(risks), strict=True):
        numbers = {"source": source, "n": len(labels), "events": int(labels["event"].sum())}
        rows.append(numbers | c_index(labels.assign(risk=risk)))
    return pd.DataFrame(rows)


def matrix(table: pd.DataFrame, own: pd.DataFrame, names: Sequence[str]) -> pd.DataFrame:
    """`transferred` as a matrix (sources, targets); on the diagonal, each cancer's own models on the patients that they
    were not trained on (`predictions.out_of_fold` of vanilla), over pairs within folds. NaN where undefined."""
    wide = table.pivot(index="source", columns="target", values="c_index")
    wide = wide.reindex(index=list(names), columns=list(dict.fromkeys(table["target"])))
    for target in wide.columns:
        pairs = discrimination.pairs_of(own[own["dataset"] == target])
        wide.loc[target, target] = pairs.c_index(np.ones(len(pairs.stratum)))[0]
    return wide.rename_axis(index="source", columns="target")


def task_vector_cosine(bench: Workbench) -> pd.DataFrame:
    """Cosine of the angle between the task vectors of each two cancers' encoders, of the models of `source_runs`."""
    null, names = bench.null_state("abmil"), list(bench.study.datasets)
    layout = Layout.of(encoder_part(null))
    states = [bench.state(run) for run in source_runs(bench).values()]
    vectors = torch.stack([layout.flatten(task_vector(state, null)).double() for state in states])
    vectors /= vectors.norm(dim=1, keepdim=True)
    return pd.DataFrame((vectors @ vectors.T).numpy(), index=names, columns=names)


def final_shares(courses: Mapping[str, pd.DataFrame], names: Sequence[str]) -> pd.DataFrame:
    """Final share w (1 - lambda) of each source (row) in STEPH for each target (column), mean over starts, of
    `steph.analysis.mixing.dynamics.by_target`; NaN on the diagonal and for sources that a course lacks."""
    columns = {target: dynamics.final_shares(course).mean(axis=1) for target, course in courses.items()}
    return pd.DataFrame(columns).reindex(index=list(names))


def goes_with(table: pd.DataFrame, other: pd.DataFrame, n: int = 1999) -> tuple[float, float, int]:
    """Do the sources that transfer well to a target have large values in another matrix? The rank correlation over the
    sources of a target, mean over targets; its p-value (two-sided); on how many targets it stands.

    The p-value asks how often names of cancers, exchanged at random in the other matrix, give a mean as far from 0
    (n exchanges; Mantel's test). It is NaN where not every target is a source as well, in both matrices.
    """
    names, targets = list(table.index), [t for t in table.columns if t in other.columns]
    first, second = (_ranked(m.reindex(index=names, columns=targets)) for m in (table, other))
    both = first.any(axis=0) & second.any(axis=0)
    n_targets = int(both.sum())
    if n_targets == 0:
        return np.nan, np.nan, 0
    correlation = float((first * second).sum() / n_targets)
    if targets != names or n_targets < len(targets):
        return correlation, np.nan, n_targets
    rng = np.random.default_rng(0)
    shuffled = (rng.permutation(len(names)) for _ in range(n))
    drawn = np.array([(first * second[np.ix_(order, order)]).sum() / n_targets for order in shuffled])
    # A hair's breadth, so that the same value from another order of summation counts as reached.
    p = (1 + np.count_nonzero(np.abs(drawn) >= abs(correlation) - 1e-12)) / (1 + n)
    return correlation, float(p), n_targets


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
    others = table.mask(_diagonal(table)).dropna(axis=1, how="all")
    own = table.where(_diagonal(table))[others.columns].max()
    columns = {"own": own, "best": others.max(), "source": others.idxmax(), "mean": others.mean()}
    return pd.DataFrame(columns).rename_axis("target").reset_index()


def _ranked(table: pd.DataFrame) -> np.ndarray:
    """Ranks within each column, without the diagonal, to mean 0 and length 1: the product of two columns is Spearman's
    correlation. A column that is constant or lacks a value is 0 throughout."""
    others = table.mask(_diagonal(table))
    complete = (table.notna() | _diagonal(table)).all() & (others.max() - others.min() > 1e-12)
    ranks = others.rank() - others.rank().mean()
    return (ranks / np.sqrt((ranks**2).sum())).loc[:, complete].reindex(columns=table.columns).fillna(0).to_numpy()


def _diagonal(table: pd.DataFrame) -> np.ndarray:
    """Where a matrix has a cancer's own models."""
    return np.equal.outer(table.index.to_numpy(), table.columns.to_numpy())
