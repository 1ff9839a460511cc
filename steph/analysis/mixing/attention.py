"""Attention maps (the paper's Appendix D.7, Fig. S4): which patches a model pools from, patch by patch and in numbers.

A target's own model M_t attends alike to a patch whatever the patient; STEPH merges another model M_t* for each. The
paper shows two slides and says that STEPH attends more to the tumour and its border. Here both are looked at for every
test patient; where the tissue is known (synthetic studies) it is also measured whether what they say is so.

Attention is of a patient's bag, all slides together: it sums to 1 over them. Features are read a patient at a time; a
bag of 200,000 patches 1,536 wide takes some 2 GB, for itself and for the hypernetwork, which reads all of it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

import numpy as np
import pandas as pd
import torch
from torch import nn

from steph import Refused
from steph.analysis.mixing.dynamics import rank_correlation
from steph.analysis.performance.estimates import Estimate, mean_of, with_interval
from steph.data.bags import RaggedBatch, sampled
from steph.data.dataset import Dataset
from steph.data.manifest import Study
from steph.data.patients import PatientData
from steph.data.store import NO_COORDS
from steph.data.synthetic import truth
from steph.files.progress import track
from steph.merging.steph import STEPH, mixture_coefficients
from steph.methods.registry import title as title_of_method
from steph.mil import Model, new_network
from steph.mil.state import load_into
from steph.study.cache import cached_table
from steph.study.runs import Run, Workbench, plan
from steph.training.device import Compute, single_thread
from steph.training.engine import loader

OWN, MERGED = "vanilla", "steph"
OTHERS = ("model_average", "adamerging", "joint", "steph_random_sources")
"""What else is looked at where it is finished: other ways to merge or to share, and STEPH on noise as the control."""
UNTRAINED = "untrained"
"""M_0, which all of them start from."""
PATIENT = ("fold", "patient_id")
TOP = 0.1  # the most attended share of a bag that two models are compared on
ZONES = {
    "inside": "tumour, inside",
    "edge": "tumour, at its border",
    "beside": "other tissue, at the border",
    "away": "other tissue, away",
}


# ------------------------------------------------------------------------------------------------ one patient


def places(data: Dataset, patient: str, max_patches: int | None = None) -> pd.DataFrame:
    """The patches of a patient's bag, in its order: patient_id, slide_id, patch (its place among the slide's patches,
    from 0), x, y (level-0 pixels of its upper left corner; missing where the slide's file had none)."""
    slides = data.slides(patient)
    sizes = [data.store.sizes[slide] for slide in slides]
    n = sum(sizes)
    taken = np.arange(n) if max_patches is None or n <= max_patches else sampled(n, max_patches, data.seed, patient)
    coords = data.store.coords_of(slides)[taken]
    table = pd.DataFrame(
        {
            "patient_id": patient,
            "slide_id": pd.Categorical(np.repeat(slides, sizes)[taken], categories=slides),
            "patch": np.concatenate([np.arange(size) for size in sizes])[taken],
        }
    )
    known = (coords != NO_COORDS).any(axis=1)
    for axis, name in enumerate("xy"):
        table[name] = pd.array(coords[:, axis], dtype="Int64")
        table.loc[~known, name] = pd.NA
    return table


def refuse_without_places(table: pd.DataFrame) -> None:
    """Raise `Refused` where a table of patches (`places`) cannot be drawn, because slides have no coordinates."""
    without = list(table.loc[table["x"].isna(), "slide_id"].astype(str).unique())
    if without:
        raise Refused(
            f"no attention map of patient {table['patient_id'].iloc[0]}: the feature store holds no coordinates of "
            f"{len(without)} of the {table['slide_id'].nunique()} slide(s), first {without[0]}. Pack feature files "
            "that hold `coords` (h5; a .pt has none). Numbers that need no place are computed all the same."
        )


def patch_size(x: np.ndarray, y: np.ndarray) -> int | None:
    """Edge of one slide's square patches in level-0 pixels, from their corners: the most frequent gap between
    neighbours of a row or of a column, the smaller of equally frequent ones.

    The smallest gap of all would be misled where a tool starts a new grid at each piece of tissue. Where patches
    overlap this is the step from one to the next. None where no two patches share a row or column.
    """
    gaps = [np.empty(0, dtype=np.int64)]
    for line, along in ((y, x), (x, y)):
        order = np.lexsort((along, line))
        step = np.diff(along[order])
        gaps.append(step[(np.diff(line[order]) == 0) & (step > 0)])
    values, counts = np.unique(np.concatenate(gaps), return_counts=True)
    return int(values[counts.argmax()]) if len(values) else None


@torch.no_grad()
def attention_of(model: Model, batch: RaggedBatch) -> np.ndarray:
    """Attention (N,) of a model over the patches of one bag (a batch of one), in double precision, summing to 1. A
    merging model is first merged for this bag. Raises `Refused` for a model that pools without attention."""
    network = model.pooling_network(batch)
    if network is None:
        raise Refused(
            f"{type(model).__name__} does not pool patches by an attention of its own, so it has no attention map. "
            "Choose a method whose network has one, such as vanilla, model_average or steph."
        )
    attention = network.attention(batch).double().cpu().numpy()
    return attention / attention.sum()


def attention_map(model: Model, data: Dataset, patient: str, compute: Compute | None = None) -> pd.DataFrame:
    """A model's attention to each patch of a patient: `places` and attention (sums to 1 over the bag), rank (1: the
    most attended of the bag), percentile (among the patches of its slide, 0 to 1, ties at their mean).

    compute: as the model was trained. Works with and without coordinates. Raises `Refused` for an unknown patient, and
    for a model that has no attention, or needs coordinates that are not there.
    """
    compute = compute or Compute()
    batch = bag_of(model, data, patient, compute)
    attention = attention_of(model.to(compute.device, compute.parameter_dtype).eval(), batch)
    return with_attention(places(data, patient, compute.max_patches), attention).astype({"rank": int})


def with_attention(patches: pd.DataFrame, attention: np.ndarray) -> pd.DataFrame:
    """A bag's patches (N rows, with slide_id) with their attention (N,), and its rank and percentile as `attention_map`
    gives them; missing where attention is."""
    table = patches.assign(attention=attention)
    table["rank"] = table["attention"].rank(method="first", ascending=False).astype("Int64")
    by_slide = table.groupby("slide_id", observed=True)["attention"]
    table["percentile"] = (by_slide.rank() - 0.5) / by_slide.transform("size")
    return table


def bag_of(model: nn.Module, data: PatientData, patient: str, compute: Compute) -> RaggedBatch:
    """A patient's bag for a model, or several in one module: in the precision of parameters, with coordinates where one
    of them needs them."""
    return loader(model, data, [patient], compute.exact)([patient])


def beside(maps: Mapping[str, pd.DataFrame]) -> pd.DataFrame:
    """Maps (`attention_map`) of one patient under two models, by name, side by side: the patches' places, then
    attention_NAME, rank_NAME, percentile_NAME of each, and difference, the second's percentile less the first's."""
    (first, one), (second, other) = maps.items()
    table = one.drop(columns=["attention", "rank", "percentile"])
    for name, found in ((first, one), (second, other)):
        for column in ("attention", "rank", "percentile"):
            table[f"{column}_{name}"] = found[column]
    return table.assign(difference=table[f"percentile_{second}"] - table[f"percentile_{first}"])


def top_patches(maps: Mapping[str, pd.DataFrame], n: int = 5) -> pd.DataFrame:
    """The n most attended patches of each patient, by patient, under either of the models of `beside`, by the second's
    rank: patient_id, slide_id, x, y, then for each model times_NAME (attention over an even share, 1 / N) and
    rank_NAME; tumour where it is known."""
    tables = []
    for table in maps.values():
        names = [column.removeprefix("rank_") for column in table.columns if column.startswith("rank_")]
        times = {f"times_{name}": table[f"attention_{name}"] * len(table) for name in names}
        chosen = (table[[f"rank_{name}" for name in names]] <= n).any(axis=1)
        columns = [column for name in names for column in (f"times_{name}", f"rank_{name}")]
        part = table.assign(**times)[chosen].sort_values(f"rank_{names[-1]}").astype({"slide_id": str})
        tables.append(part.filter(["patient_id", "slide_id", "x", "y", *columns, "tumour"]))
    return pd.concat(tables, ignore_index=True)


def mixture(model: Model, data: Dataset, patient: str, compute: Compute | None = None) -> pd.DataFrame:
    """`mixture_of` a patient of a data set; compute: as the model was trained."""
    compute = compute or Compute()
    model.to(compute.device, compute.parameter_dtype).eval()
    return mixture_of(model, bag_of(model, data, patient, compute), data.name)


@torch.no_grad()
def mixture_of(model: Model, batch: RaggedBatch, target: str) -> pd.DataFrame:
    """What STEPH merges for one bag (a batch of one): source, w, lambda, kept (among the K), coefficient (of the
    source's task vector in M_t*, w (1 - lambda) where kept). The first row is the target's own task vector, the sum of
    w lambda over those kept. Raises `Refused` for a model that does not merge by patient."""
    merging = model.merging
    if not isinstance(merging, STEPH):
        raise Refused(f"{type(model).__name__} does not merge models patient by patient; steph does.")
    w, lam, selected = merging.coefficients(batch)
    coefficients = mixture_coefficients(w[None], lam[None], selected[None])[0]
    names, kept = merging.source_names, set(selected.tolist())
    return pd.DataFrame(
        {
            "source": [target, *names],
            "w": [np.nan, *w.tolist()],
            "lambda": [np.nan, *lam.tolist()],
            "kept": [True, *(i in kept for i in range(len(names)))],
            "coefficient": coefficients.tolist(),
        }
    )


# ------------------------------------------------------------------------------------------------ runs and patients


def runs(
    study: Study, dataset: str, folds: Sequence[int], seed: int, precision: str = "fp32", others: Iterable[str] = ()
) -> list[Run]:
    """STEPH and others on a target, in each fold beside the very M_t that STEPH merges (of the study's own seed)."""
    study.entry(dataset)
    merging = plan(study, [dataset], [MERGED, *others], folds, [seed], precision)
    own = [replace(run, method=OWN, seed=study.seed) for run in merging if run.method == MERGED]
    return sorted([*own, *merging], key=lambda run: run.fold)


def finished_others(
    bench: Workbench, dataset: str, folds: Sequence[int], seed: int, precision: str = "fp32"
) -> list[str]:
    """Those of `OTHERS` whose runs on all these folds are finished, and can be looked at without training anything."""
    return [
        name
        for name in OTHERS
        if all(bench.record(Run(dataset, name, fold, seed, precision)) is not None for fold in folds)
    ]


def finished_runs(bench: Workbench, folds: Sequence[int], seed: int, precision: str = "fp32") -> list[Run]:
    """`runs` of every data set of a synthetic study where both models are finished on these folds, with those of
    `OTHERS` that are finished on all of them. None in a real study, where it is not known what they should look at."""
    study = bench.study
    finished = [
        name
        for name in (study.datasets if study.synthetic else ())
        if all(bench.record(run) is not None for run in runs(study, name, folds, seed, precision))
    ]
    by_dataset = [finished_others(bench, name, folds, seed, precision) for name in finished]
    others = [name for name in OTHERS if all(name in names for names in by_dataset)]
    return [run for name in finished for run in runs(study, name, folds, seed, precision, others)]


def patients_to_show(bench: Workbench, runs: Iterable[Run], names: Sequence[str] | None = None) -> pd.DataFrame:
    """Test patients to look at, with their predictions from the records: fold, patient_id, time_days, event, n_slides,
    n_patches, risk_vanilla, risk_steph, place (1: STEPH's highest risk in the fold) and of (how many).

    names: which, each in the fold that tests it; None takes two of the first fold, STEPH's highest and lowest risk.
    Raises `Refused` for a name that none of the folds tests, and for runs that are not finished.
    """
    by_fold: dict[int, dict[str, Run]] = {}
    for run in runs:
        by_fold.setdefault(run.fold, {})[run.method] = run
        data = bench.dataset(run.dataset)
    tables = [_predicted(bench, by_method[OWN], by_method[MERGED]) for by_method in by_fold.values()]
    if names is None:
        table = tables[0].iloc[[0, -1]].drop_duplicates()
    else:
        table = pd.concat(tables).drop_duplicates("patient_id").set_index("patient_id", drop=False)
        for name in names:
            if name not in table.index:
                fold = next((i for i in range(data.splits.n_folds) if name in data.splits.test(i)), None)
                raise Refused(
                    f"patient {name} is not tested in fold(s) {', '.join(map(str, by_fold))}: "
                    + (f"{data.name} has no such patient" if fold is None else f"give folds = [{fold}], which tests it")
                    + f". One that is: {table.index[0]}."
                )
        table = table.loc[list(names)]
    counts = {"n_slides": [len(data.slides(patient)) for patient in table["patient_id"]]}
    return table.assign(**counts, n_patches=data.n_patches(list(table["patient_id"]))).reset_index(drop=True)


def _predicted(bench: Workbench, own: Run, merged: Run) -> pd.DataFrame:
    """Both models' predictions for a fold's test patients, by falling risk under STEPH."""
    files = (bench.finished(run).file("predictions.csv") for run in (own, merged))
    of_own, of_merged = (pd.read_csv(file, dtype={"patient_id": str}) for file in files)
    both = of_own[["patient_id", "time_days", "event", "risk"]].merge(
        of_merged[["patient_id", "risk"]], on="patient_id", suffixes=(f"_{OWN}", f"_{MERGED}")
    )
    both = both.sort_values(f"risk_{MERGED}", ascending=False, kind="stable")
    both.insert(0, "fold", own.fold)
    return both.assign(place=np.arange(1, len(both) + 1), of=len(both))


def of_patients(
    bench: Workbench, runs: Iterable[Run], patients: pd.DataFrame, device: str = "cpu"
) -> tuple[dict[str, pd.DataFrame], pd.DataFrame]:
    """What there is to show of some patients (`patients_to_show`): their maps under M_t and STEPH (`beside`, with the
    tumour where it is known) by patient, and STEPH's `mixture` of each in one table, with patient_id."""
    by_cell = {(run.fold, run.method): run for run in runs}
    maps, mixtures = {}, []
    for fold, patient in zip(patients["fold"], patients["patient_id"], strict=True):
        own, merged = (by_cell[fold, method] for method in (OWN, MERGED))
        where = bench.dataset(merged.dataset), patient, bench.compute(merged, device)
        model = bench.model(merged)
        pair = {OWN: attention_map(bench.model(own), *where), MERGED: attention_map(model, *where)}
        maps[patient] = with_planted(beside(pair), planted(bench.study, merged.dataset))
        mixtures.append(mixture(model, *where).assign(patient_id=patient))
    table = pd.concat(mixtures, ignore_index=True)
    return maps, table[["patient_id", *table.columns.drop("patient_id")]]


# ------------------------------------------------------------------------------------------------ known tissue


def planted(study: Study, dataset: str) -> pd.DataFrame | None:
    """What is known of each patch, by slide_id, x, y: tumour (bool), zone (a key of `ZONES`); None in a real study,
    where nobody has drawn the tumour."""
    if study.synthetic is None:
        return None
    known = truth(study, dataset)[["slide_id", "x", "y", "tumour"]]
    x, y, tumour = (known[name].to_numpy() for name in ("x", "y", "tumour"))
    zone = np.empty(len(known), dtype=object)
    for rows in known.groupby("slide_id", sort=False).indices.values():
        zone[rows] = zones(x[rows], y[rows], tumour[rows])
    return known.assign(zone=zone).set_index(["slide_id", "x", "y"])


def zones(x: np.ndarray, y: np.ndarray, tumour: np.ndarray) -> np.ndarray:
    """Where each patch of one slide (N,) lies to the tumour's border, as keys of `ZONES`. At the border is a patch that
    shares an edge with one of the other kind; where tissue ends there is no border."""
    size = patch_size(x, y) or 1
    column, row = (((values - values.min()) // size) + 1 for values in (x, y))
    shape = (int(column.max()) + 2, int(row.max()) + 2)
    near = []
    for kind in (True, False):
        cells = np.zeros(shape, dtype=bool)
        cells[column[tumour == kind], row[tumour == kind]] = True
        steps = ((-1, 0), (1, 0), (0, -1), (0, 1))
        near.append(np.any([cells[column + dx, row + dy] for dx, dy in steps], axis=0))
    near_tumour, near_other = near
    return np.where(tumour, np.where(near_other, "edge", "inside"), np.where(near_tumour, "beside", "away"))


def with_planted(table: pd.DataFrame, known: pd.DataFrame | None) -> pd.DataFrame:
    """A table of patches with tumour and zone of each, where they are known (`planted`). Raises `Refused` where the
    store holds other patches than were drawn."""
    if known is None:
        return table
    where = pd.MultiIndex.from_arrays([table["slide_id"].astype(str), *(table[axis].to_numpy(int) for axis in "xy")])
    rows = known.index.get_indexer(where)
    if (rows < 0).any():
        raise Refused(
            f"patient {table['patient_id'].iloc[0]}: {(rows < 0).sum()} patches of the store do not lie where they "
            "were drawn. Delete the study's data folder and it is made again."
        )
    return table.assign(tumour=known["tumour"].to_numpy()[rows], zone=known["zone"].to_numpy()[rows])


# ------------------------------------------------------------------------------------------------ in numbers


def effective_patches(attention: np.ndarray) -> float:
    """How many patches a model pools from: exp of the entropy of its attention (N,). N if all count the same, 1 if one
    patch has it all."""
    from scipy.special import entr

    return float(np.exp(entr(attention).sum()))


def top_overlap(first: np.ndarray, second: np.ndarray) -> float:
    """How many of the most attended patches (`TOP` of N, at least one) two attentions have in common, 0 to 1. By chance
    it would be `TOP`, or what that is of N."""
    n = max(1, round(TOP * len(first)))
    tops = [set(np.argsort(-attention, kind="stable")[:n].tolist()) for attention in (first, second)]
    return len(tops[0] & tops[1]) / n


def auc(values: np.ndarray, positive: np.ndarray) -> float:
    """Chance that a patch of the positive ones has a higher value than one of the others, ties half; NaN where there
    are none of either."""
    from scipy.stats import rankdata

    n, rest = int(positive.sum()), int((~positive).sum())
    if n == 0 or rest == 0:
        return float("nan")
    return float((rankdata(values)[positive].sum() - n * (n + 1) / 2) / (n * rest))


def numbers(attention: Mapping[str, np.ndarray], patches: pd.DataFrame) -> pd.DataFrame:
    """What can be said of a patient's attention under several models, a row each; the first is what the others are
    compared with.

    attention: (N,) by method. patches: the bag's, in the same order; with tumour and zone where they are known.
    Returns method, n_patches, entropy, effective (patches), effective_share (of n_patches), overlap (top tenth in
    common with the first's), chance (of the same for one that knows nothing), correlation (of ranks, with the first);
    where the tissue is known, auc (of attention, for tumour patches) and, for each of `ZONES` and the whole tumour and
    border, attention_ZONE and patches_ZONE, its share of the attention and of the patches.
    """
    where: dict[str, np.ndarray] = {}
    if "tumour" in patches:
        where = {name: (patches["zone"] == name).to_numpy() for name in ZONES}
        where |= {"tumour": patches["tumour"].to_numpy(), "border": where["edge"] | where["beside"]}
    reference = next(iter(attention.values()))
    rows = []
    for method, values in attention.items():
        n, effective = len(values), effective_patches(values)
        row = {
            "method": method,
            "n_patches": n,
            "entropy": float(np.log(effective)),
            "effective": effective,
            "effective_share": effective / n,
            "overlap": top_overlap(reference, values),
            "chance": max(1, round(TOP * n)) / n,
            "correlation": rank_correlation(pd.Series(reference), pd.Series(values)),
        }
        if where:
            row["auc"] = auc(values, where["tumour"])
        for name, inside in where.items():
            row |= {f"attention_{name}": values[inside].sum(), f"patches_{name}": inside.mean()}
        rows.append(row)
    return pd.DataFrame(rows)


def measured(bench: Workbench, runs: Iterable[Run], device: str = "cpu") -> pd.DataFrame:
    """`numbers` of all test patients of the folds of some runs, and of the untrained network: dataset, fold,
    patient_id, then those columns; empty for no runs. Computed once for the runs of each data set."""
    by_dataset: dict[str, list[Run]] = {}
    for run in runs:
        by_dataset.setdefault(run.dataset, []).append(run)
    tables = []
    for of_dataset in by_dataset.values():
        inputs = {str(run): bench.key(run) for run in of_dataset}
        tables.append(cached_table(bench, "attention", inputs, lambda runs=of_dataset: _measured(bench, runs, device)))  # type: ignore[misc]
    return pd.concat(tables, ignore_index=True) if tables else pd.DataFrame()


def _measured(bench: Workbench, runs: list[Run], device: str) -> pd.DataFrame:
    study, dataset, compute = bench.study, runs[0].dataset, bench.compute(runs[0], device)
    data, known, tables = bench.dataset(dataset), planted(study, dataset), []
    with single_thread():
        for fold in dict.fromkeys(run.fold for run in runs):
            models = {run.method: bench.model(run) for run in runs if run.fold == fold}
            models[UNTRAINED] = new_network("abmil", study.features.dim, study.network)
            load_into(models[UNTRAINED], bench.null_state("abmil"))
            together = nn.ModuleList(models.values()).to(device, compute.parameter_dtype).eval()
            for patient in track(data.splits.test(fold), f"attention, {dataset}, fold {fold}"):
                bag = bag_of(together, data, patient, compute)
                patches = with_planted(places(data, patient, compute.max_patches), known)
                table = numbers({method: attention_of(model, bag) for method, model in models.items()}, patches)
                tables.append(table.assign(dataset=dataset, fold=fold, patient_id=patient))
    table = pd.concat(tables, ignore_index=True)
    first = ["dataset", "fold", "patient_id"]
    return table[[*first, *table.columns.difference(first, sort=False)]]


# ------------------------------------------------------------------------------------------------ over patients


def title(method: str) -> str:
    """A method's name as tables show it."""
    return "Untrained (M₀)" if method == UNTRAINED else title_of_method(method)


def times_even(table: pd.DataFrame, zone: str) -> pd.Series:
    """Attention that a zone gets, over an even share: 1 where its patches get no more than any; missing for patients
    who have none of it."""
    patches = table[f"patches_{zone}"]
    return table[f"attention_{zone}"] / patches.where(patches > 0)


def by_method(table: pd.DataFrame, values: pd.Series, unit: Sequence[str] = PATIENT) -> pd.DataFrame:
    """Means over patients (or other units) of a value that belongs to the rows of `measured`: method, mean, low, high,
    n, and gain over M_t, unit by unit, with gain_low and gain_high."""
    wide = _by_unit(table, values, unit)
    rows = []
    for method in wide.columns:
        mean, gain = mean_of(wide[method]), mean_of(wide[method] - wide[OWN])
        n = int(wide[method].notna().sum())
        rows.append((method, mean.value, mean.low, mean.high, n, gain.value, gain.low, gain.high))
    columns = ["method", "mean", "low", "high", "n", "gain", "gain_low", "gain_high"]
    return pd.DataFrame(rows, columns=columns)


def gain(table: pd.DataFrame, values: pd.Series, over: str = OWN, unit: Sequence[str] = PATIENT) -> Estimate:
    """Mean over patients (or other units) of what STEPH has more than another method of a value that belongs to the
    rows of `measured`, with its 95 % interval. unit: ["dataset"] for the tables of several data sets."""
    wide = _by_unit(table, values, unit)
    return mean_of(wide[MERGED] - wide[over])


def _by_unit(table: pd.DataFrame, values: pd.Series, unit: Sequence[str]) -> pd.DataFrame:
    """A row per unit and a column per method, in the table's order."""
    means = table.assign(value=values).groupby([*unit, "method"], sort=False)["value"].mean().unstack("method")
    return means[table["method"].unique()]


def agreement_table(table: pd.DataFrame) -> pd.DataFrame:
    """Format `measured` for display, a row per method: how many patches it pools from, of how many, and how alike that
    is to M_t. Means over patients with 95 % intervals."""
    columns = {
        "effective patches": ("mean", table["effective"], ".1f"),
        "of the bag": ("mean", table["effective_share"], ".0%"),
        f"top {TOP:.0%} in common": ("like", table["overlap"], ".0%"),
        "rank correlation": ("like", table["correlation"], "+.2f"),
    }
    return _wide(table, columns, PATIENT)


def tumour_table(table: pd.DataFrame, unit: Sequence[str] = PATIENT) -> pd.DataFrame:
    """Format `measured` of known tissue for display, a row per method: AUC of attention for tumour patches, what it
    gains over M_t, and the attention on the tumour and on its border, over an even share. Means over patients (or other
    units) with 95 % intervals."""
    columns = {
        "AUC for tumour": ("mean", table["auc"], ".2f"),
        f"AUC − {title(OWN)}": ("gain", table["auc"], "+.2f"),
        "tumour, × even": ("mean", times_even(table, "tumour"), ".2f"),
        "border, × even": ("mean", times_even(table, "border"), ".2f"),
    }
    return _wide(table, columns, unit)


def _wide(table: pd.DataFrame, columns: Mapping[str, tuple[str, pd.Series, str]], unit: Sequence[str]) -> pd.DataFrame:
    """Columns of text, a row per method: of each column what it shows, a value of the rows of `measured`, and its
    format. It shows its "mean", the "gain" over M_t, or the mean of what is "like" M_t; the last two not for M_t."""
    methods = list(table["method"].unique())
    wide = pd.DataFrame({"method": [title(method) for method in methods]})
    for name, (what, values, form) in columns.items():
        rows = by_method(table, values, unit)
        numbers = rows[["gain", "gain_low", "gain_high"] if what == "gain" else ["mean", "low", "high"]].to_numpy()
        wide[name] = [
            "" if method == OWN and what != "mean" else with_interval(*row, form=form)
            for method, row in zip(methods, numbers, strict=True)
        ]
    return wide
