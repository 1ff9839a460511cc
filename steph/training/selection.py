"""Choosing a setting of a merged model by cross-validation inside a fold's training patients.

The paper says that it chose gamma so; nobody has released how. The rule here: nobody whom a setting is judged on was
seen by any model that is merged. So the target's own model, which the other patients of the fold trained, is trained
anew in every inner fold; other cancers' models never saw the target's patients and are taken as they are.
"""

from collections.abc import Callable, Iterator, Sequence

import pandas as pd

from steph.data.cohort import Cohort
from steph.data.dataset import Dataset
from steph.data.manifest import Network, Recipe
from steph.data.splits import make_splits
from steph.mil.base import Model
from steph.mil.state import ModelState, state_of
from steph.survival import concordance_index
from steph.training.device import Compute
from steph.training.engine import fit, predict, seed_everything

INNER_FOLDS = 3


def inner_folds(dataset: Dataset, patients: Sequence[str], seed: int) -> Iterator[tuple[list[str], list[str]]]:
    """Who trains and who judges in each of `INNER_FOLDS` folds of these patients. Raises `Refused` where there are
    fewer events than folds."""
    slides = dataset.cohort.slides
    table = make_splits(Cohort(dataset.name, slides[slides["patient_id"].isin(list(patients))]), INNER_FOLDS, seed)
    fold_of = dict(zip(table["patient_id"], table["fold"], strict=True))
    for fold in range(INNER_FOLDS):
        yield [p for p in patients if fold_of[p] != fold], [p for p in patients if fold_of[p] == fold]


def grid_search(
    values: Sequence[float],
    target: Callable[[], Model],
    merged: Callable[[ModelState, float], Model],
    dataset: Dataset,
    patients: Sequence[str],
    recipe: Recipe,
    network: Network,
    seed: int,
    compute: Compute,
) -> pd.DataFrame:
    """C-index of each value of a setting in `INNER_FOLDS` inner folds of these patients: value, fold, c_index.

    target: makes the target's own network, untrained. merged: makes the merged model from its trained parameters and
    a value. Everything is trained by the study's recipe under `seed`, so it costs INNER_FOLDS * (1 + number of values)
    trainings, each on (1 - 1 / INNER_FOLDS) of the patients: for three folds and five values, 12 times one training.
    Raises `Refused` where an inner fold has no event or no pair to compare.
    """
    rows = []
    for fold, (train, judge) in enumerate(inner_folds(dataset, patients, seed)):
        seed_everything(seed)
        own = target()
        fit(own, dataset, train, recipe, network, seed, compute)
        for value in values:
            seed_everything(seed)
            model = merged(state_of(own), value)
            fit(model, dataset, train, recipe, network, seed, compute)
            table = predict(model, dataset, judge, compute)
            c_index = concordance_index(table["time_days"], table["event"], table["risk"])
            rows.append({"value": value, "fold": fold, "c_index": c_index})
    return pd.DataFrame(rows)


def best_value(scores: pd.DataFrame) -> float:
    """The value of highest mean C-index over the inner folds; the first of equals."""
    means = scores.groupby("value", sort=False)["c_index"].mean()
    return float(means.index[int(means.to_numpy().argmax())])
