"""Results for tests: a table such as `steph.study.execute.results` gives, from values."""

import numpy as np
import pandas as pd

from steph.study.paper import paper_table

DATASETS = list(paper_table("table_s1")["dataset"])


def frame(values: dict[tuple[str, str], list[float | None]], **more: object) -> pd.DataFrame:
    """Results by (data set, method) and fold."""
    rows = [
        {
            "dataset": dataset, "method": method, "fold": fold, "seed": 42, "c_index": value, "external_c_index": None,
            "problem": "" if value is not None else "no comparable pair among 9 patients", "seconds": 1.0,
            "device": "cpu", **more,
        }
        for (dataset, method), own in values.items()
        for fold, value in enumerate(own)
    ]  # fmt: skip
    return pd.DataFrame(rows)


def shifted(gain: float, wobble: float = 0.01, datasets: list[str] = DATASETS, folds: int = 5) -> pd.DataFrame:
    """STEPH `gain` above vanilla on every data set on average, and averaging as far below."""
    noise = np.random.default_rng(0).normal(0, wobble, (len(datasets), folds))
    noise -= noise.mean(axis=1, keepdims=True)
    values = {}
    for dataset, own in zip(datasets, noise, strict=True):
        values[dataset, "vanilla"] = [0.6] * folds
        values[dataset, "model_average"] = list(0.6 - gain + own)
        values[dataset, "steph"] = list(0.6 + gain + own)
        values[dataset, "hypernetwork_only"] = list(0.6 + gain - own)
    return frame(values)


FIRST_PAGE = {
    "controls_say": pd.DataFrame({"sentence": ["Other ways do better.", "No gain is shown."]}),
    "controls_gain_by_start": pd.DataFrame(
        [("1", 0.043, 0.01, 0.07), ("2", 0.012, -0.02, 0.04), ("3", 0.02, 0.0, 0.04), ("mean", 0.025, 0.002, 0.048)],
        columns=["seed", "difference", "low", "high"],
    ).assign(on="external patients", conclusion="better"),
    "scorecard": pd.DataFrame({"verdict": ["reproduced", "x", "x"], "points": ["open"] * 3}),
}
"""The tables of chapters that the first page is made of, by name."""
