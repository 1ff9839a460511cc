"""Choosing a source for representation transfer: by its C-index on the target's training patients, or by the release's
table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import pandas as pd
from torch import nn

from steph import Refused
from steph.data.dataset import Dataset
from steph.survival import concordance_index
from steph.training.engine import predict

NEAREST = {
    "BLCA": "HNSC", "BRCA": "GBMLGG", "CESC": "STES", "COADREAD": "STES", "GBMLGG": "KIPAN", "HNSC": "BLCA",
    "KIPAN": "GBMLGG", "LIHC": "SARC", "LUNG": "KIPAN", "SARC": "LIHC", "SKCM": "STES", "STES": "CESC", "UCEC": "SARC",
}  # fmt: skip
"""The release's table of the source that transfers best to each target; how it was found is not said."""


def transfer_performance(
    models: Mapping[str, nn.Module],
    dataset: Dataset,
    patients: Sequence[str],
    device: str = "cpu",
    precision: str = "fp32",
    max_patches: int | None = None,
    together: int = 1,
) -> pd.Series:
    """C-index of each source's own model, as it is, on these patients of a target; by source name, in their order.
    How they are predicted, `together` for one, is told by `steph.training.engine.predict`."""
    found = {}
    for name, model in models.items():
        table = predict(model, dataset, patients, device, precision, max_patches, together)
        found[name] = concordance_index(table["time_days"], table["event"], table["risk"])
    return pd.Series(found, name="c_index")


def best_source(performance: pd.Series) -> str:
    """The source of highest C-index (`transfer_performance` on the target's TRAINING patients); the first of equals."""
    if performance.empty:
        raise Refused("no source model to choose from: the pool is empty.")
    return str(performance.index[int(performance.to_numpy().argmax())])


def nearest_source(dataset: str, sources: Sequence[str]) -> str:
    """The source that the release's table names for a target. Raises `Refused` where it names none of the pool."""
    name = NEAREST.get(dataset)
    if name is None:
        raise Refused(f"the release's table of nearest sources has no {dataset}; it has {', '.join(NEAREST)}.")
    if name not in sources:
        raise Refused(
            f"the release's table names {name} as the nearest source of {dataset}, and the pool lacks it: "
            f"{', '.join(sources) or 'it is empty'}. Choose the source by transfer performance instead."
        )
    return name
