"""Which models can be mixed, a target's with those of its sources, as STEPH takes them; and the patients to test on."""

from collections.abc import Sequence

from steph import Refused
from steph.data.dataset import Dataset
from steph.data.manifest import Study, refuse_unknown
from steph.study.runs import TARGET, Run, Workbench


def check_sources(study: Study, target: str, sources: Sequence[str], fold: int) -> None:
    """Raise `Refused` for a data set or fold that the study does not have, and for sources that are none of the
    target's, repeated or missing."""
    study.entry(target)
    study.check_fold(fold)
    refuse_unknown("source", sources, study.sources_of(target), f"study {study.name}, target {target}")
    if not sources or len(set(sources)) < len(sources):
        raise Refused(f"sources {list(sources)} of {target}: give at least one, and each once.")


def pair(bench: Workbench, target: str, source: str, fold: int) -> Run:
    """STEPH with this source only: its prerequisites are the two models of the pair. Raises as `check_sources`."""
    check_sources(bench.study, target, [source], fold)
    return bench.run_of(target, f"steph@{source}", fold)


def models(bench: Workbench, target: str, sources: Sequence[str], fold: int) -> dict[str, Run]:
    """The runs that trained the models which are mixed, by role: `TARGET` (of this fold) and each of the sources (of
    fold 0). Raises as `check_sources`."""
    check_sources(bench.study, target, sources, fold)
    runs = bench.prerequisites(bench.run_of(target, "steph", fold))
    return {role: runs[role] for role in (TARGET, *sources)}


def patient_sets(bench: Workbench, run: Run) -> dict[str, tuple[Dataset, list[str]]]:
    """The target's patients: "train" and "test", of the run's fold, and, where there are others, "external"."""
    data = bench.dataset(run.dataset)
    sets = {"train": (data, data.splits.train(run.fold)), "test": (data, data.splits.test(run.fold))}
    if data.external is not None:
        sets["external"] = data.external, list(data.external.cohort.patients["patient_id"])
    return sets
