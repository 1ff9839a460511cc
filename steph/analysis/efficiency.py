"""What methods cost: parameters that are trained (Table S4), seconds of an epoch (Tables S6, S7)."""

from __future__ import annotations

from collections.abc import Iterable

import pandas as pd
import torch

from steph import Refused
from steph.data.manifest import Network, StephSettings, Study
from steph.hypernetwork import STEPH
from steph.methods import METHODS
from steph.mil import NETWORKS
from steph.results import paper_table, title
from steph.runs import Run, Workbench

PAPER_DIM, PAPER_SOURCES = 1536, 12
"""Width of UNI2-h's features, and the other cancers of the paper."""


def learnable_parameters(study: Study | None = None) -> dict[str, int]:
    """Trained numbers of each method of Table S4, counted on the models: at the paper's dimensions, or at a study's."""
    dim, network, settings, m = PAPER_DIM, Network(), StephSettings(), PAPER_SOURCES
    if study is not None:
        dim, network, settings, m = study.features.dim, study.network, study.steph, len(study.datasets) - 1
    counts = {}
    with torch.device("meta"):  # shapes alone: nothing is computed
        for name, method in METHODS.items():
            if "table_s4" not in method.table:
                continue
            model = NETWORKS[method.network](dim, network)
            if method.needs_sources:
                state = model.state_dict()
                pool = {f"source {i}": state for i in range(m)}
                model = STEPH(state, state, pool, top_k=None, dim_hidden=settings.dim_hidden, network=model)
            counts[name] = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return counts


def parameter_table(study: Study) -> pd.DataFrame:
    """Table S4's parameters to look at: counted at the paper's dimensions, printed, counted at the study's."""
    counted, here = learnable_parameters(), learnable_parameters(study)
    printed = paper_table("table_s4").set_index("method")["learnable_params_m"]
    rows = [
        {
            "method": title(name),
            "counted (M)": n / 1e6,
            "Table S4 (M)": printed[METHODS[name].table["table_s4"]],
            "in this study": here[name],
        }
        for name, n in counted.items()
    ]
    return pd.DataFrame(rows)


def epoch_seconds(bench: Workbench, runs: Iterable[Run]) -> pd.DataFrame:
    """Seconds of a training epoch, a row per method: method, mean, std over epochs, epochs, device. An epoch's first
    run through the data is left out; a method that trains nothing takes none. Raises `Refused` for an unfinished run.

    Runs share a machine and take what time they get: this compares methods, it is no benchmark.
    """
    seconds: dict[str, list[float]] = {}
    devices: dict[str, set[str]] = {}
    for run in runs:
        found = bench.record(run)
        if found is None:
            raise Refused(f"{run} is not finished; run it first.")
        path = found.file("history.csv")
        history = pd.read_csv(path) if path.stat().st_size > 1 else pd.DataFrame()
        seconds.setdefault(run.method, []).extend(history["seconds"].iloc[1:] if len(history) else [])
        devices.setdefault(run.method, set()).add(found.info["device"])
    rows = []
    for name, own in seconds.items():
        times = pd.Series(own, dtype=float)
        mean, std = (times.mean(), times.std()) if own else (0.0, 0.0)
        rows.append((name, mean, std, len(own), ", ".join(sorted(devices[name]))))
    return pd.DataFrame(rows, columns=["method", "mean", "std", "epochs", "device"])
