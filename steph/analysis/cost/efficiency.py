"""What methods cost against how well they predict: Fig. 2, and a hypernetwork that reads a sample of the patches."""

import numpy as np
import pandas as pd

from steph import Refused
from steph.analysis.cost.operations import prediction_products, printed_gflops, reads
from steph.analysis.cost.planning import patients
from steph.analysis.performance.estimates import Estimate
from steph.analysis.performance.statistics import compare
from steph.data.manifest import Study
from steph.methods.registry import METHODS, title
from steph.study.paper import AVERAGE, paper_c_index
from steph.study.runs import Workbench
from steph.study.tables import on_common_folds

PARADIGMS = ("vanilla", "roupkt", "steph")
"""The learning paradigms that Fig. 2 compares: cancer-specific, transfer of representations, merging."""
BESIDE = ("model_average", "hypernetwork_only", "steph_subsampled", "joint")
"""What this book puts beside them."""


def performance_and_cost(results: pd.DataFrame, counted: pd.DataFrame, value: str) -> pd.DataFrame:
    """What Fig. 2 shows of a study, a row per method: method, c_index (mean over data sets), gflops, networks.

    results: of the methods, on the data sets and folds that all of them have. counted: `operations`. value: the
    C-index of test folds or of external patients. Raises `Refused` where there is none.
    """
    common = on_common_folds(results, list(results["method"].unique()))
    if common.empty or common[value].isna().any():
        raise Refused(f"the methods have no data set and fold in common where each has a {value}.")
    means = common.groupby(["method", "dataset"])[value].mean().groupby("method").mean()
    costs = counted.set_index("method")
    names = [name for name in results["method"].unique() if name in costs.index]
    table = pd.DataFrame({"c_index": means[names], "gflops": costs.loc[names, "products"] / 1e9})
    return table.assign(networks=costs.loc[names, "networks"]).rename_axis("method").reset_index()


def paper_performance_and_cost(counted: pd.DataFrame) -> pd.DataFrame:
    """What the paper's Fig. 2 shows, as `performance_and_cost`: averages of Table 1, GFLOPs of Table S4. ROUPKT's stand
    in no table; they are counted here."""
    names, costs = [*PARADIGMS, "model_average"], counted.set_index("method")
    table = pd.DataFrame({"method": names, "c_index": [float(paper_c_index(name)[AVERAGE]) for name in names]})
    gflops = table["method"].map(printed_gflops()).fillna(table["method"].map(costs["layers"]) / 1e9)
    return table.assign(gflops=gflops, networks=table["method"].map(costs["networks"]))


def sampling_methods(study: Study, largest: int) -> list[str]:
    """STEPH and its variants whose hypernetwork reads a sample, where that is fewer patches than the largest bag has:
    for others it is STEPH itself."""
    sampled = [name for name, entry in METHODS.items() if "sample_patches" in (*entry.settings, *entry.options)]
    return ["steph", *(name for name in sampled if (reads(name, study) or largest) < largest)]


def bag_sizes(bench: Workbench) -> np.ndarray:
    """Patches of every patient's bag, of all data sets."""
    return np.concatenate([patients(bench, name).patches for name in bench.study.datasets])


def sampling_scores(results: pd.DataFrame, study: Study, sizes: np.ndarray, value: str) -> pd.DataFrame:
    """What a sample costs in C-index in a study, a row per method (`sampling_methods`) that was run: method, reads
    (patches at most), share (of all patches, that are read), × Vanilla (operations of a prediction on a bag of mean
    size), C-index (mean over data sets), − STEPH (`steph.analysis.performance.statistics.compare`), low and high (its
    95 % interval).

    results: of finished runs. sizes: `bag_sizes`. value: the C-index of test folds or of external patients. Raises
    `Refused` where methods have no data set and fold in common.
    """
    largest, mean = int(sizes.max()), round(float(sizes.mean()))
    names = [name for name in sampling_methods(study, largest) if name in set(results["method"])]
    common = on_common_folds(results, names)
    # Somebody may have run one cancer on more folds than the others.
    common = common[common.groupby("fold")["dataset"].transform("nunique") == common["dataset"].nunique()]
    vanilla, rows = prediction_products("vanilla", study, mean), []
    for name in names:
        most = reads(name, study) or largest
        gain = compare(common, name, "steph", value).gain if name != "steph" else Estimate(0.0)
        rows.append({
            "method": title(name),
            "reads": most,
            "share": np.minimum(sizes, most).sum() / sizes.sum(),
            "× Vanilla (operations)": prediction_products(name, study, mean) / vanilla,
            "C-index": common[common["method"] == name].groupby("dataset")[value].mean().mean(),
            "− STEPH": gain.value,
            "low": gain.low,
            "high": gain.high,
        })  # fmt: skip
    return pd.DataFrame(rows)
