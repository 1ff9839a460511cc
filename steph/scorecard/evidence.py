"""The evidence that claims are judged on, gathered from records and kept analyses."""

import shlex

import pandas as pd

from steph import Refused
from steph.analysis.cost import operations, timing
from steph.analysis.mixing import attention, dynamics, landscape, sar, trajectory
from steph.analysis.performance import cohort_tables
from steph.scorecard.rules import Evidence
from steph.study.runs import Run, Workbench, plan

PAPER_TARGETS = ("BRCA", "BLCA")
"""The cancers of the paper's landscapes (Figs. 4, 6, S3; S5)."""


def planned(bench: Workbench) -> list[Run]:
    """The study's whole plan, which the scorecard stands on. Raises `Refused` where runs of it on real patients are not
    finished: hours of training are not begun by opening a page."""
    runs = plan(bench)
    missing = [run for run in runs if bench.record(run) is None]
    if missing and bench.study.synthetic is None:
        option = f"--study {shlex.quote(bench.study.address)}"
        raise Refused(
            f"the scorecard stands on the study's whole plan, and {len(missing)} of its {len(runs)} runs are missing. "
            f"`steph study plan {option}` says what they take, `steph study run {option}` carries them out."
        )
    return runs


def gather(bench: Workbench, results: pd.DataFrame) -> Evidence:
    """What a study has to say. results: of one seed, as `run_all` gives them.

    Nothing is trained. Analyses of models that are finished are made where they are missing; only epochs on real
    patients are not timed on a processor, which takes hours: the chapter 07_efficiency does.
    """
    study, datasets = bench.study, list(bench.study.datasets)
    targets = [name for name in PAPER_TARGETS if name in datasets]
    first = [*targets, *datasets][0]
    models = sar.finished_models(bench, 0)
    alone = dynamics.finished_runs(bench, [first], single_source=True)
    timed = study.synthetic is not None or bench.compute.device != "cpu"
    epochs = timing.epoch_runs(bench, first, 0, study.seed) if timed else []
    return Evidence(
        study,
        results,
        cohort=cohort_tables.cohort_numbers([bench.dataset(name) for name in datasets]),
        dynamics=dynamics.by_target(bench, dynamics.finished_runs(bench, datasets)),
        landscapes={name: landscape.finished_landscapes(bench, name) for name in targets},
        trajectories=trajectory.ends(bench, alone),
        alignment=sar.attention_against_embedding(sar.every_pair(bench, models, study.seed)) if models else None,
        operations=operations.counted(bench),
        epochs=timing.epoch_times(bench, epochs) if epochs else None,
        attention=attention.measured(bench, attention.finished_runs(bench, [0], study.seed)),
    )
