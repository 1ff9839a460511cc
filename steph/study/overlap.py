"""No patient twice: nobody whom a run is tested on has trained a model that takes part in it."""

from collections.abc import Iterable, Sequence

from steph import Refused
from steph.data.twice import remedy
from steph.files.tables import shortened
from steph.study.runs import Run, Workbench


def trained_on(bench: Workbench, run: Run) -> set[tuple[str, int]]:
    """Data sets and folds whose training patients trained a run's model or one that it builds on."""
    names = list(bench.study.datasets) if bench.trains_for_all(run) else [run.dataset]
    own = {(name, run.fold) for name in names}
    return own.union(*(trained_on(bench, needed) for needed in bench.prerequisites(run).values()))


def refuse_overlap(bench: Workbench, runs: Iterable[Run]) -> None:
    """Raise `Refused`, naming them, where patients whom a run is tested on, in its fold or as external patients, have
    trained a model that it merges, transfers or trains on."""
    asked = set()
    for run in runs:
        data = bench.dataset(run.dataset)
        for name, fold in sorted(trained_on(bench, run)):
            question = run.dataset, run.fold, name, fold
            if question not in asked:
                asked.add(question)
                external = data.external.cohort.slides_of if data.external else ()
                tested = [*data.splits.test(run.fold), *external]
                refuse_trained(bench, f"{run}", run.dataset, tested, name, fold)


def refuse_trained(bench: Workbench, what: str, dataset: str, tested: Sequence[str], name: str, fold: int) -> None:
    """Raise `Refused`, naming them, where patients of a data set whom `what` tests trained the model of data set `name`
    and a fold."""
    trained = set(bench.dataset(name).splits.train(fold))
    if shared := [patient for patient in tested if patient in trained]:
        raise Refused(
            f"{what}: {len(shared)} of the {len(tested)} patients that it is tested on have trained the model of "
            f"{name}, fold {fold}, which it builds on: {shortened(shared)}. What it predicts for them is no "
            f"prediction. {remedy(name, dataset)}."
        )
