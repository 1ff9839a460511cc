"""Attention maps (the paper's Appendix D.7, Fig. S4): which patches a model pools from, patch by patch and in numbers.

A target's own model M_t attends alike to a patch whatever the patient; STEPH merges another model M_t* for each. The
paper shows two slides and says that STEPH attends more to the tumour and its border. Here all test patients are looked
at; where the tissue is known (synthetic studies) it is also measured whether what the paper says is so.

Attention is of a patient's bag, all slides together: it sums to 1 over them. Features are read a patient at a time; a
bag of 200,000 patches 1,536 wide takes some 2 GB, for itself and for the hypernetwork, which reads all of it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
import pandas as pd
import torch
from torch import nn

from steph import Refused
from steph.analysis.mixing.dynamics import rank_correlation
from steph.analysis.performance.estimates import Estimate, mean_of, with_interval
from steph.analysis.performance.predictions import out_of_fold
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
AGREEMENT = {
    "effective patches": ("effective", ".1f"),
    "of the bag": ("effective_share", ".0%"),
    f"top {TOP:.0%} in common": ("overlap", ".0%"),
    "rank correlation": ("correlation", "+.2f"),
}
ON_TUMOUR = {
    "AUC for tumour": ("auc", ".2f"),
    f"AUC − {title_of_method(OWN)}": ("auc_gain", "+.2f"),
    "tumour, × even": ("times_tumour", ".2f"),
    "border, × even": ("times_border", ".2f"),
}
"""Columns of tables (`wide`): of `measured` which, and their format."""


def bag_of(model: nn.Module, data: PatientData, patient: str, compute: Compute) -> RaggedBatch:
    """A patient's bag for a model, or several in one module, which are made ready to predict on its device. Patches
    have the precision of parameters, and coordinates where a model needs them."""
    model.to(compute.device, compute.parameter_dtype).eval()
    return loader(model, data, [patient], compute.exact)([patient])


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


@torch.no_grad()
def mixture(model: Model, batch: RaggedBatch, target: str) -> pd.DataFrame:
    """What STEPH merges for one bag (a batch of one): source, w, lambda, kept (among the K), coefficient (of the
    source's task vector in M_t*, w (1 - lambda) where kept). The first row is the target's own task vector, the sum of
    w lambda over those kept. Raises `Refused` for a model that does not merge by patient."""
    merging = model.merging
    if not isinstance(merging, STEPH):
        raise Refused(f"{type(model).__name__} does not merge models patient by patient; steph does.")
    w, lam, selected = merging.coefficients(batch)
    return pd.DataFrame(
        {
            "source": [target, *merging.source_names],
            "w": [np.nan, *w.tolist()],
            "lambda": [np.nan, *lam.tolist()],
            "kept": [True, *(i in selected for i in range(len(w)))],
            "coefficient": mixture_coefficients(w[None], lam[None], selected[None])[0].tolist(),
        }
    )


def places(data: Dataset, patient: str, max_patches: int | None = None) -> pd.DataFrame:
    """The patches of a patient's bag, in its order: patient_id, slide_id, patch (its place among the slide's patches,
    from 0), x, y (level-0 pixels of its upper left corner; missing where the slide's file had none)."""
    slides = data.slides(patient)
    sizes = [data.store.sizes[slide] for slide in slides]
    table = pd.DataFrame(data.store.coords_of(slides), columns=["x", "y"]).astype("Int64")
    table.loc[(table == NO_COORDS).all(axis=1)] = pd.NA
    table.insert(0, "patient_id", patient)
    table.insert(1, "slide_id", pd.CategoricalIndex(np.repeat(slides, sizes), slides))
    table.insert(2, "patch", np.concatenate([np.arange(size) for size in sizes]))
    if max_patches is None or len(table) <= max_patches:
        return table
    return table.iloc[sampled(len(table), max_patches, data.seed, patient)].reset_index(drop=True)


def patch_size(x: np.ndarray, y: np.ndarray) -> int | None:
    """Edge of one slide's square patches in level-0 pixels, from their corners: the most frequent gap between
    neighbours of a row or of a column, the smaller of equally frequent ones.

    The smallest gap of all would be misled where a tool starts a new grid at each piece of tissue. Where patches
    overlap this is the step from one to the next. None where no two patches share a row or column.
    """
    gaps = []
    for line, along in ((y, x), (x, y)):
        order = np.lexsort((along, line))
        step = np.diff(along[order])
        gaps.append(step[(np.diff(line[order]) == 0) & (step > 0)])
    values, counts = np.unique(np.concatenate(gaps), return_counts=True)
    return int(values[counts.argmax()]) if len(values) else None


def with_attention(patches: pd.DataFrame, attention: np.ndarray) -> pd.DataFrame:
    """A bag's patches (N rows, with slide_id) with their attention (N,), its rank (1: the most attended of the bag) and
    percentile (among the patches of its slide, 0 to 1, ties at their mean); all missing where attention is."""
    table = patches.assign(attention=attention)
    table["rank"] = table["attention"].rank(method="first", ascending=False).astype("Int64")
    by_slide = table.groupby("slide_id", observed=True)["attention"]
    table["percentile"] = (by_slide.rank() - 0.5) / by_slide.transform("size")
    return table


def attention_map(model: Model, data: Dataset, patient: str, compute: Compute | None = None) -> pd.DataFrame:
    """A model's attention to each patch of a patient: `places` with the columns of `with_attention`.

    compute: as the model was trained. Works with and without coordinates. Raises `Refused` for an unknown patient, and
    for a model that has no attention, or needs coordinates that are not there.
    """
    compute = compute or Compute()
    attention = attention_of(model, bag_of(model, data, patient, compute))
    return with_attention(places(data, patient, compute.max_patches), attention).astype({"rank": int})


def beside(maps: Mapping[str, pd.DataFrame]) -> pd.DataFrame:
    """Maps (`attention_map`) of one patient under two models, by name, side by side: the patches' places, then
    attention_NAME, rank_NAME, percentile_NAME of each, and difference, the second's percentile less the first's."""
    (first, one), (second, _) = maps.items()
    columns = ["attention", "rank", "percentile"]
    of_models = [table[columns].add_suffix(f"_{name}") for name, table in maps.items()]
    table = pd.concat([one.drop(columns=columns), *of_models], axis=1)
    return table.assign(difference=table[f"percentile_{second}"] - table[f"percentile_{first}"])


def runs(bench: Workbench, targets: Sequence[str], folds: Sequence[int], seed: int) -> list[Run]:
    """STEPH on some targets, in each fold beside the very M_t that it merges (of the study's own seed); in a synthetic
    study also those of `OTHERS` that are finished on all of these, so that nothing is trained for them."""
    study = bench.study
    for name in targets:
        study.entry(name)
    merging = plan(bench, targets, [MERGED], folds, [seed])
    chosen = [*(replace(run, method=OWN, seed=study.seed) for run in merging), *merging]
    for name in OTHERS if study.synthetic else ():
        of_method = [replace(run, method=name) for run in merging]
        if all(bench.record(run) for run in of_method):
            chosen += of_method
    return sorted(chosen, key=lambda run: (targets.index(run.dataset), run.fold))


def finished_runs(bench: Workbench, folds: Sequence[int], seed: int) -> list[Run]:
    """`runs` on every data set of a synthetic study where M_t and STEPH are finished on these folds. None in a real
    study, where it is not known what they should look at."""
    names = bench.study.datasets if bench.study.synthetic else ()
    of_names = {name: runs(bench, [name], folds, seed) for name in names}
    finished = [name for name, of_name in of_names.items() if all(bench.record(run) for run in of_name)]
    return runs(bench, finished, folds, seed) if finished else []


def patients_to_show(bench: Workbench, runs: Sequence[Run], names: Sequence[str] | None = None) -> pd.DataFrame:
    """Test patients to look at, with their predictions from the records: fold, patient_id, time_days, event,
    risk_vanilla, risk_steph, place (1: STEPH's highest risk in the fold), of (how many), n_slides, n_patches.

    names: which, each in the fold that tests it; None takes two of the first fold, STEPH's highest and lowest risk.
    Raises `Refused` for a name that none of the folds tests, and for runs that are not finished.
    """
    data, folds = bench.dataset(runs[0].dataset), dict.fromkeys(run.fold for run in runs)
    predicted = out_of_fold(bench, [run for run in runs if run.method in (OWN, MERGED)]).astype({"event": int})
    table = predicted.pivot(index=["fold", "patient_id", "time_days", "event"], columns="method", values="risk")
    table = table[[OWN, MERGED]].add_prefix("risk_").rename_axis(columns=None).reset_index()
    risk = table.groupby("fold")[f"risk_{MERGED}"]
    table["place"], table["of"] = risk.rank(method="first", ascending=False).astype(int), risk.transform("size")
    tested = table.sort_values(["fold", "place"]).drop_duplicates("patient_id").set_index("patient_id", drop=False)
    if names is None:
        names = list(tested[tested["fold"] == runs[0].fold].iloc[[0, -1]]["patient_id"].unique())
    for name in names:
        if name not in tested.index:
            other = next((i for i in range(data.splits.n_folds) if name in data.splits.test(i)), None)
            raise Refused(
                f"patient {name} is not tested in fold(s) {', '.join(map(str, folds))}: "
                + (f"{data.name} has no such patient" if other is None else f"give folds = [{other}], which tests it")
                + f". One that is: {tested.index[0]}."
            )
    slides = [len(data.slides(name)) for name in names]
    return tested.loc[list(names)].assign(n_slides=slides, n_patches=data.n_patches(names)).reset_index(drop=True)


def of_patients(
    bench: Workbench, runs: Sequence[Run], patients: pd.DataFrame
) -> tuple[dict[str, pd.DataFrame], pd.DataFrame]:
    """What there is to show of some patients (`patients_to_show`): their maps under M_t and STEPH (`beside`, with the
    tumour where it is known) by patient, and STEPH's `mixture` of each in one table, with patient_id."""
    by_cell = {(run.fold, run.method): run for run in runs}
    dataset, compute = runs[0].dataset, bench.compute_of(runs[0])
    data, known, maps, mixtures = bench.dataset(dataset), planted(bench.study, dataset), {}, {}
    for fold, patient in zip(patients["fold"], patients["patient_id"], strict=True):
        models = {method: bench.model(by_cell[fold, method]) for method in (OWN, MERGED)}
        pair = {method: attention_map(model, data, patient, compute) for method, model in models.items()}
        maps[patient] = with_planted(beside(pair), known)
        merging = models[MERGED]
        mixtures[patient] = mixture(merging, bag_of(merging, data, patient, compute), dataset)
    return maps, pd.concat(mixtures, names=["patient_id", None]).reset_index("patient_id").reset_index(drop=True)


def top_patches(maps: Mapping[str, pd.DataFrame], n: int = 5) -> pd.DataFrame:
    """The n most attended patches of each patient (`of_patients`) under M_t or STEPH, by the rank under STEPH:
    patient_id, slide_id, x, y, then for each model times_NAME (attention over an even share, 1 / N) and rank_NAME;
    tumour where it is known."""
    columns = [f"{what}_{name}" for name in (OWN, MERGED) for what in ("times", "rank")]
    parts = []
    for table in maps.values():
        times = {f"times_{name}": table[f"attention_{name}"] * len(table) for name in (OWN, MERGED)}
        top = table.assign(**times)[table[[f"rank_{OWN}", f"rank_{MERGED}"]].min(axis=1) <= n]
        top = top.sort_values(f"rank_{MERGED}").astype({"slide_id": str})
        parts.append(top.filter(["patient_id", "slide_id", "x", "y", *columns, "tumour"]))
    return pd.concat(parts, ignore_index=True)


def planted(study: Study, dataset: str) -> dict[str, pd.DataFrame]:
    """What is known of each patient's patches: slide_id, x, y, tumour (bool), zone (a key of `ZONES`). Nothing in a
    real study, where nobody has drawn the tumour."""
    if study.synthetic is None:
        return {}
    known = truth(study, dataset)
    x, y, tumour = (known[name].to_numpy() for name in ("x", "y", "tumour"))
    zone = np.empty(len(known), dtype=object)
    for rows in known.groupby("slide_id", sort=False).indices.values():
        zone[rows] = zones(x[rows], y[rows], tumour[rows])
    columns = ["slide_id", "x", "y", "tumour", "zone"]
    return {str(patient): part[columns] for patient, part in known.assign(zone=zone).groupby("patient_id")}


def zones(x: np.ndarray, y: np.ndarray, tumour: np.ndarray) -> np.ndarray:
    """Where each patch of one slide (N,) lies to the tumour's border, as keys of `ZONES`. At the border is a patch that
    shares an edge with one of the other kind; where tissue ends there is no border."""
    from scipy.ndimage import binary_dilation

    size = patch_size(x, y) or 1
    column, row = ((values - values.min()) // size for values in (x, y))
    near = []
    for kind in (tumour, ~tumour):
        cells = np.zeros((column.max() + 1, row.max() + 1), dtype=bool)
        cells[column[kind], row[kind]] = True
        near.append(binary_dilation(cells)[column, row])
    near_tumour, near_other = near
    return np.where(tumour, np.where(near_other, "edge", "inside"), np.where(near_tumour, "beside", "away"))


def with_planted(table: pd.DataFrame, known: Mapping[str, pd.DataFrame]) -> pd.DataFrame:
    """A patient's table of patches with tumour and zone of each, where they are known (`planted`). Raises `Refused`
    where the store holds other patches than were drawn."""
    if not known:
        return table
    patient, corner = table["patient_id"].iloc[0], ["slide_id", "x", "y"]
    drawn = table[corner].astype({"slide_id": str}).merge(known[patient], on=corner, how="left")
    if missing := int(drawn["zone"].isna().sum()):
        raise Refused(
            f"patient {patient}: {missing} patches of the store do not lie where they were drawn. Delete the study's "
            "data folder and it is made again."
        )
    return table.assign(tumour=drawn["tumour"].to_numpy(bool), zone=drawn["zone"].to_numpy())


def auc(values: np.ndarray, positive: np.ndarray) -> float:
    """Chance that a patch of the positive ones has a higher value than one of the others, ties half; NaN where there
    are none of either."""
    from scipy.stats import mannwhitneyu

    first, second = values[positive], values[~positive]
    if not len(first) or not len(second):
        return float("nan")
    return float(mannwhitneyu(first, second).statistic / (len(first) * len(second)))


def numbers(attention: Mapping[str, np.ndarray], patches: pd.DataFrame) -> pd.DataFrame:
    """What can be said of a patient's attention under several models, a row each; the first is what the others are
    compared with.

    attention: (N,) by method. patches: the bag's, in the same order; with tumour and zone where they are known.
    Returns method, effective (patches: exp of the attention's entropy, N if all count the same, 1 if one has it all),
    effective_share (of N), overlap (most attended tenth in common with the first's), chance (of the same for one that
    knows nothing), correlation (of ranks, with the first); where the tissue is known, auc (of attention, for tumour
    patches), auc_gain (over the first) and, for each of `ZONES`, the whole tumour and the border, times_ZONE: attention
    over an even share, missing where there is none of it.
    """
    from scipy.special import entr

    members: dict[str, np.ndarray] = {}
    if "tumour" in patches:
        members = {name: (patches["zone"] == name).to_numpy() for name in ZONES}
        members |= {"tumour": patches["tumour"].to_numpy(), "border": members["edge"] | members["beside"]}
    first = next(iter(attention.values()))
    n, n_top = len(first), max(1, round(TOP * len(first)))
    rows = []
    for method, values in attention.items():
        top_of_first, top = (np.argsort(-either, kind="stable")[:n_top] for either in (first, values))
        effective = float(np.exp(entr(values).sum()))
        row = {
            "method": method,
            "effective": effective,
            "effective_share": effective / n,
            "overlap": np.isin(top, top_of_first).mean(),
            "chance": n_top / n,
            "correlation": rank_correlation(pd.Series(first), pd.Series(values)),
        }
        if members:
            row["auc"] = auc(values, members["tumour"])
            row["auc_gain"] = row["auc"] - auc(first, members["tumour"])
        for name, inside in members.items():
            row[f"times_{name}"] = values[inside].sum() / inside.mean() if inside.any() else np.nan
        rows.append(row)
    return pd.DataFrame(rows)


def measured(bench: Workbench, runs: Sequence[Run]) -> pd.DataFrame:
    """`numbers` of all test patients of the folds of some runs, and of the untrained network, with dataset, fold and
    patient_id; empty for no runs. Computed once for the runs of each data set."""
    by_dataset = [[run for run in runs if run.dataset == name] for name in dict.fromkeys(run.dataset for run in runs)]
    tables = [_of_dataset(bench, of_dataset) for of_dataset in by_dataset]
    return pd.concat(tables, ignore_index=True) if tables else pd.DataFrame()


def _of_dataset(bench: Workbench, runs: Sequence[Run]) -> pd.DataFrame:
    def compute() -> pd.DataFrame:
        study, dataset, how, tables = bench.study, runs[0].dataset, bench.compute_of(runs[0]), []
        data, known = bench.dataset(dataset), planted(study, dataset)
        for fold in dict.fromkeys(run.fold for run in runs):
            models = {run.method: bench.model(run) for run in runs if run.fold == fold}
            models[UNTRAINED] = new_network("abmil", study.features.dim, study.network)
            load_into(models[UNTRAINED], bench.null_state("abmil"))
            together = nn.ModuleList(models.values())
            for patient in track(data.splits.test(fold), f"attention, {dataset}, fold {fold}"):
                bag = bag_of(together, data, patient, how)
                patches = with_planted(places(data, patient, how.max_patches), known)
                table = numbers({method: attention_of(model, bag) for method, model in models.items()}, patches)
                tables.append(table.assign(dataset=dataset, fold=fold, patient_id=patient))
        return pd.concat(tables, ignore_index=True)

    with single_thread():
        return cached_table(bench, "attention", {str(run): bench.key(run) for run in runs}, compute)


def title(method: str) -> str:
    """A method's name as tables show it."""
    return "Untrained (M₀)" if method == UNTRAINED else title_of_method(method)


def by_method(table: pd.DataFrame, value: str, unit: Sequence[str] = PATIENT) -> pd.DataFrame:
    """Means over patients (or other units) of a column of `measured` with 95 % intervals: method, mean, low, high."""
    of_methods = _by_unit(table, value, unit)
    means = {method: mean_of(of_methods[method]) for method in table["method"].unique()}
    rows = [(method, mean.value, mean.low, mean.high) for method, mean in means.items()]
    return pd.DataFrame(rows, columns=["method", "mean", "low", "high"])


def gain(table: pd.DataFrame, value: str, over: str = OWN, unit: Sequence[str] = PATIENT) -> Estimate:
    """Mean over patients (or other units) of what STEPH has more than another method in a column of `measured`, with
    its 95 % interval. unit: ["dataset"] for the tables of several data sets."""
    of_methods = _by_unit(table, value, unit)
    return mean_of(of_methods[MERGED] - of_methods[over])


def _by_unit(table: pd.DataFrame, value: str, unit: Sequence[str]) -> pd.DataFrame:
    return table.groupby([*unit, "method"], sort=False)[value].mean().unstack("method")


def wide(table: pd.DataFrame, columns: Mapping[str, tuple[str, str]], unit: Sequence[str] = PATIENT) -> pd.DataFrame:
    """Format `measured` for display, a row per method: means over patients (or other units) with 95 % intervals.
    columns: `AGREEMENT` or `ON_TUMOUR`. What compares a model with M_t is left out for M_t itself."""
    shown = pd.DataFrame({"method": [title(method) for method in table["method"].unique()]})
    for heading, (value, form) in columns.items():
        compares = value in ("overlap", "correlation", "auc_gain")
        shown[heading] = [
            "" if row.method == OWN and compares else with_interval(row.mean, row.low, row.high, form=form)
            for row in by_method(table, value, unit).itertuples()
        ]
    return shown
