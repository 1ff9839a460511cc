"""Export: a finished run as a model folder (`steph.deploy.model_folder`) that predicts without the study.

Before anything is written, the model that the folder would give is built and asked about every patient of the data set:
what it says of the test patients must be what the study recorded, and its risks for the training patients become the
scale that percentiles are told on.
"""

import shlex
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from torch import Tensor

from steph import Refused
from steph.analysis.mixing.attention import bag_of, mixture
from steph.analysis.performance.discrimination import intervals, resampled
from steph.analysis.performance.predictions import out_of_fold
from steph.analysis.performance.time_dependent import kaplan_meier
from steph.data.dataset import Dataset
from steph.data.manifest import Network
from steph.deploy.model_folder import Config, Dropped, Inputs, Score, Training, build, fill, tensors_of, write_model
from steph.deploy.predict import sources_in_use
from steph.files.atomic import refuse_taken
from steph.files.progress import track
from steph.files.templates import render
from steph.merging.steph import keep_sources
from steph.mil.state import load_into
from steph.study import health
from steph.study.runs import STAGE, TARGET, Run, Workbench, row_of
from steph.training.device import Compute, check_device, single_thread
from steph.training.engine import predict

TOLERANCE = {"fp64": 1e-6, "fp32": 1e-3, "tf32": 0.05, "bf16": 0.2}
"""How far a risk, the sum of 32 probabilities, may be from the recorded one where device or libraries differ."""


def export(bench: Workbench, run: Run, out: Path, drop_unused: bool = False) -> Config:
    """Write a finished run's model to the new folder `out`, whole or not at all, and return its configuration.

    drop_unused: leave out the sources that no patient of the data set, training or test, has in use.
    Raises `Refused` for a run that is not finished, a model of a kind that a folder cannot hold, predictions that are
    not the recorded ones, sources to be dropped of a model that weighs none, and where `out` is taken.
    """
    refuse_taken(out)
    check_device(bench.compute.device)
    record, compute = bench.finished(run), bench.compute_of(run)
    trained = bench.untrained(run).to(compute.parameter_dtype)
    load_into(trained, bench.state(run))
    architecture, tensors, dropped = trained.architecture(), tensors_of(trained), None
    if drop_unused and trained.merging is not trained:
        raise Refused(f"{run.entry.title} weighs no sources that could be dropped: leave out --drop-unused.")
    risk, in_use = _ask(bench, run, compute, architecture, tensors)
    recorded = out_of_fold(bench, [run]).set_index("patient_id")["risk"]
    difference = float((recorded - risk[recorded.index]).abs().max())
    if not difference <= TOLERANCE[run.precision]:
        raise Refused(
            f"{run}: the model to be exported gives a test patient a risk that is {difference:.3g} from the one in "
            f"{record.path}; nothing was written. Run it again on this machine, or export it where it was run."
        )
    if drop_unused:
        sources, before = architecture["sources"], risk
        remaining = [name for name in sources if name in in_use] or sources[:1]
        architecture, tensors = keep_sources(architecture, tensors, remaining)
        risk, _ = _ask(bench, run, compute, architecture, tensors)
        dropped = Dropped(
            sources=[name for name in sources if name not in remaining],
            patients=len(risk),
            max_change_in_risk=float((risk - before).abs().max()),
            ranks_changed=int((risk.rank() != before.rank()).sum()),
        )
    study, data = bench.study, bench.dataset(run.dataset)
    config = Config(
        **asdict(run),
        study=study.name,
        study_title=study.title,
        synthetic=study.synthetic is not None,
        projects=study.entry(run.dataset).projects,
        title=run.entry.title,
        description=run.entry.description,
        device=record.info["device"],
        run=record.info["key"],
        finished=record.info["finished"],
        versions=record.info["versions"],
        endpoint=study.endpoint,
        inputs=Inputs(**study.features.model_dump(), max_patches=study.recipe.max_patches, sample_seed=data.seed),
        network=study.network,
        architecture=architecture,
        sources=[name for name in bench.prerequisites(run) if name not in (TARGET, STAGE)],
        training=_training(data, run.fold, risk, study.network),
        scores=_scores(bench, run),
        dropped=dropped,
        differs=difference,
        warnings=health.notes(pd.DataFrame([row_of(bench, record)])),
        files={},
    )
    card = render("steph.deploy", "card.md", c=config, folder=shlex.quote(out.name))
    write_model(out, config, tensors, card)
    return config


def _ask(
    bench: Workbench, run: Run, compute: Compute, architecture: Mapping[str, Any], tensors: Mapping[str, Tensor]
) -> tuple[pd.Series, set[str]]:
    """What the folder's model would say of the patients that train and test a run, one by one: their risks, by patient,
    and the sources that any of them has in use."""
    study, data = bench.study, bench.dataset(run.dataset)
    model = fill(build(architecture, study.features.dim, study.network).to(compute.parameter_dtype), tensors)
    risk, in_use = {}, set[str]()
    patients = [*data.splits.train(run.fold), *data.splits.test(run.fold)]
    with single_thread():
        for patient in track(patients, f"{run}: predict for all patients"):
            risk[patient] = float(predict(model, data, [patient], compute)["risk"].iloc[0])
            if model.merging is model:
                merged = mixture(model, bag_of(model, data, patient, compute), run.dataset)
                in_use.update(sources_in_use(merged)["source"])
    return pd.Series(risk), in_use


def _training(data: Dataset, fold: int, risk: pd.Series, network: Network) -> Training:
    labels = data.labels(data.splits.train(fold))
    longest = float(labels["time_days"].max())
    ends = network.bin_width_days * np.arange(1, network.n_bins + 1)
    return Training(
        patients=len(labels),
        events=int(labels["event"].sum()),
        longest_follow_up_days=longest,
        risks=sorted(risk[labels["patient_id"]].tolist()),
        observed=kaplan_meier(labels["time_days"], labels["event"])(ends[ends <= longest]).tolist(),
    )


def _scores(bench: Workbench, run: Run) -> list[Score]:
    """C-index of the model on the patients of its own test fold, and that of the method over all finished folds."""
    finished = [other for k in range(bench.study.n_folds) if bench.record(other := replace(run, fold=k))]
    scores = []
    for runs in [[run], finished] if len(finished) > 1 else [[run]]:
        table = out_of_fold(bench, runs)
        estimate = intervals(resampled(table)).iloc[0]
        value, low, high = (None if np.isnan(x) else float(x) for x in estimate[["value", "low", "high"]])
        folds, events = [of_fold.fold for of_fold in runs], int(table["event"].sum())
        scores.append(Score(folds=folds, patients=len(table), events=events, c_index=value, low=low, high=high))
    return scores
