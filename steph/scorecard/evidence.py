"""The evidence that claims are judged on, gathered from records and kept analyses."""

from __future__ import annotations

import pandas as pd

from steph.analysis.cost import operations, timing
from steph.analysis.mixing import attention, dynamics, landscape, sar, trajectory
from steph.analysis.performance import cohort_tables
from steph.scorecard.rules import Evidence
from steph.study.runs import Workbench

PAPER_TARGETS = ("BRCA", "BLCA")
"""The cancers of the paper's landscapes (Figs. 4, 6, S3; S5)."""


def gather(bench: Workbench, results: pd.DataFrame, device: str = "cpu", precision: str = "fp32") -> Evidence:
    """What a study has to say. results: of one seed, as `run_all` gives them.

    Nothing is trained. Analyses of models that are finished are made where they are missing; only epochs on real
    patients are not timed on a processor, which takes hours: the chapter 07_efficiency does.
    """
    study, datasets = bench.study, list(bench.study.datasets)
    first = PAPER_TARGETS[0] if PAPER_TARGETS[0] in datasets else datasets[0]
    epochs = timing.epoch_runs(study, first, 0, study.seed, precision)
    timed = study.synthetic is not None or device != "cpu"
    return Evidence(
        study,
        results,
        cohort=cohort_tables.cohort_numbers([bench.dataset(name) for name in datasets]),
        dynamics=dynamics.by_target(bench, dynamics.finished_runs(bench, datasets, precision=precision)),
        landscapes={
            target: landscape.finished_landscapes(bench, target, precision=precision)
            for target in PAPER_TARGETS
            if target in datasets
        },
        trajectories=trajectory.ends(
            bench, dynamics.finished_runs(bench, [first], precision=precision, single_source=True)
        ),
        alignment=_alignment(bench, precision),
        operations=operations.counted(bench),
        epochs=timing.epoch_times(bench, epochs, device) if timed else None,
        attention=attention.measured(bench, attention.finished_runs(bench, [0], study.seed, precision), device),
    )


def _alignment(bench: Workbench, precision: str) -> pd.DataFrame | None:
    by_target = sar.finished_models(bench, 0, precision)
    return sar.attention_against_embedding(sar.every_pair(bench, by_target, bench.study.seed)) if by_target else None
