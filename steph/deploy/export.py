"""Export: a finished run as a model folder (`steph.deploy.model_folder`) that predicts without the study.

Before anything is written, the model that the folder would give is built and asked about every patient of the data set:
what it says of the test patients must be what the study recorded, and its risks for the training patients become the
scale that percentiles are told on.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from steph import Refused
from steph.analysis.performance.discrimination import intervals, resampled
from steph.analysis.performance.predictions import out_of_fold
from steph.data.dataset import Dataset
from steph.data.manifest import Network
from steph.deploy.model_folder import (
    Config,
    Dropped,
    Inputs,
    Score,
    Training,
    build,
    fill,
    tensors_of,
    write_model,
)
from steph.files.atomic import refuse_taken
from steph.files.progress import track
from steph.files.records import Record
from steph.merging.steph import STEPH, keep_sources
from steph.methods.registry import method, title
from steph.mil import Model
from steph.mil.state import load_into
from steph.study.runs import STAGE, TARGET, Run, Workbench
from steph.training.device import Compute, check_device, parameter_dtype, single_thread
from steph.training.engine import loader, predict

TOLERANCE = {"fp64": 1e-6, "fp32": 1e-3, "tf32": 0.05, "bf16": 0.2}
"""How far a risk, the sum of 32 probabilities, may be from the recorded one where device or libraries differ."""


@dataclass(frozen=True, eq=False)
class _Said:
    """What a model says of patients: their risks, by patient; the sources that any of them has in use."""

    risk: pd.Series
    used: set[str]


def export(bench: Workbench, run: Run, out: Path, drop_unused: bool = False, device: str = "cpu") -> Config:
    """Write a finished run's model to the new folder `out`, whole or not at all, and return its configuration.

    drop_unused: leave out the sources that no patient of the data set, training or test, has in use.
    Raises `Refused` for a run that is not finished, a model of a kind that a folder cannot hold, predictions that are
    not the recorded ones, sources to be dropped of a model that weighs none, and where `out` is taken.
    """
    refuse_taken(out)
    check_device(device)
    study, dtype = bench.study, parameter_dtype(run.precision)
    study.entry(run.dataset)
    state, record = bench.state(run), bench.record(run)
    assert record is not None
    original = bench.untrained(run).to(dtype)
    load_into(original, state)
    architecture = original.architecture()
    tensors: Mapping[str, Tensor] = tensors_of(original)
    if drop_unused and original.merging is not original:
        raise Refused(f"{title(run.method)} weighs no sources that could be dropped: leave out --drop-unused.")

    def ask(label: str) -> _Said:
        model = fill(build(architecture, study.features.dim, study.network).to(dtype), tensors)
        return _asked(model, bench.dataset(run.dataset), run, bench.compute(run, device), label)

    said, dropped = ask("predict for all patients"), None
    differs = _differs(record, said.risk, run)
    if drop_unused:
        names = architecture["sources"]
        kept = [name for name in names if name in said.used] or names[:1]
        architecture, tensors = keep_sources(architecture, tensors, kept)
        before, said = said, ask(f"again with {len(kept)} of {len(names)} sources")
        dropped = Dropped(
            sources=[name for name in names if name not in kept],
            patients=len(said.risk),
            max_change_in_risk=float((said.risk - before.risk).abs().max()),
            ranks_changed=int((said.risk.rank() != before.risk.rank()).sum()),
        )
    config = _config(bench, run, record, architecture, said, dropped, differs)
    write_model(out, config, tensors, card(config))
    return config


@torch.no_grad()
def _asked(model: Model, data: Dataset, run: Run, compute: Compute, label: str) -> _Said:
    """What a model says of the patients that train and test a run, one by one."""
    risks, used = {}, set()
    with single_thread():
        for patient in track([*data.splits.train(run.fold), *data.splits.test(run.fold)], f"{run}: {label}"):
            table = predict(model, data, [patient], compute)
            risks[patient] = float(table["risk"].iloc[0])
            if isinstance(model, STEPH):
                w, _, selected = model.coefficients(loader(model, data, [patient], compute)([patient]))
                used |= {model.source_names[i] for i in selected.tolist() if w[i] > 0}  # 0 takes a place, adds nothing
    return _Said(pd.Series(risks), used)


def _differs(record: Record, risk: pd.Series, run: Run) -> float:
    """Largest difference from the recorded risks. Raises `Refused` where that is more than rounding."""
    table = pd.read_csv(record.file("predictions.csv"), dtype={"patient_id": str}, float_precision="round_trip")
    found = float((table.set_index("patient_id")["risk"] - risk[table["patient_id"]]).abs().max())
    if not found <= TOLERANCE[run.precision]:
        raise Refused(
            f"{run}: the model to be exported gives a test patient a risk that is {found:.3g} from the one in "
            f"{record.path}; nothing was written. Run it again on this machine, or export it where it was run."
        )
    return found


def _config(
    bench: Workbench,
    run: Run,
    record: Record,
    architecture: dict[str, Any],
    said: _Said,
    dropped: Dropped | None,
    differs: float,
) -> Config:
    study, data = bench.study, bench.dataset(run.dataset)
    inputs = study.features.model_dump(exclude={"folders"})
    return Config(
        study=study.name,
        study_title=study.title,
        synthetic=study.synthetic is not None,
        dataset=run.dataset,
        projects=study.entry(run.dataset).projects,
        method=run.method,
        title=title(run.method),
        description=method(run.method).description,
        fold=run.fold,
        seed=run.seed,
        precision=run.precision,
        device=record.info["device"],
        run=record.info["key"],
        finished=record.info["finished"],
        versions=record.info["versions"],
        endpoint=study.endpoint,
        inputs=Inputs(**inputs, max_patches=study.recipe.max_patches, sample_seed=data.seed),
        network=study.network,
        architecture=architecture,
        sources=[name for name in bench.prerequisites(run) if name not in (TARGET, STAGE)],
        training=_training(data, run.fold, said.risk, study.network),
        scores=_scores(bench, run),
        dropped=dropped,
        differs=differs,
        files={},
    )


def _training(data: Dataset, fold: int, risk: pd.Series, network: Network) -> Training:
    from lifelines import KaplanMeierFitter

    labels = data.labels(data.splits.train(fold))
    longest = float(labels["time_days"].max())
    ends = network.bin_width_days * np.arange(1, network.n_bins + 1)
    curve = KaplanMeierFitter().fit(labels["time_days"], labels["event"])
    return Training(
        patients=len(labels),
        events=int(labels["event"].sum()),
        longest_follow_up_days=longest,
        risks=sorted(risk[labels["patient_id"]].tolist()),
        observed=curve.survival_function_at_times(ends[ends <= longest]).tolist(),
    )


def _scores(bench: Workbench, run: Run) -> list[Score]:
    """C-index of the model on the patients of its own test fold, and that of the method over all finished folds."""
    others = [Run(run.dataset, run.method, fold, run.seed, run.precision) for fold in range(bench.study.n_folds)]
    finished = [other for other in others if bench.record(other) is not None]
    scores = []
    for runs in [[run], finished] if len(finished) > 1 else [[run]]:
        table = out_of_fold(bench, runs, some_folds=True)
        found = intervals(resampled(table)).iloc[0]
        value, low, high = (None if np.isnan(found[name]) else float(found[name]) for name in ("value", "low", "high"))
        folds, events = [each.fold for each in runs], int(table["event"].sum())
        scores.append(Score(folds=folds, patients=len(table), events=events, c_index=value, low=low, high=high))
    return scores


# ------------------------------------------------------------------------------------------------ the card


def card(config: Config) -> str:
    """The model card, in Markdown."""
    c, t, i = config, config.training, config.inputs
    made_up = "> **Synthetic.** It was trained on made-up patients and says nothing about cancer or about anybody.\n\n"
    stamp = made_up if c.synthetic else ""
    sources = f"Other cancers' models that went into it: {', '.join(c.sources)}." if c.sources else ""
    end = c.network.bin_width_days * c.network.n_bins
    sampled = f" Of larger bags, {i.max_patches:,} patches are read." if i.max_patches else ""
    return f"""# {c.title} for {c.dataset}

{stamp}**Research only. Not a medical device: no decision about a patient may rest on it.**

{c.description[:1].upper()}{c.description[1:]}. Study `{c.study}` ({c.study_title}), fold {c.fold}, seed {c.seed}.
{sources}

## Use

```bash
steph predict --model {_shell_name(c)} --features slide.h5 --out report
```

## What it reads

Patch features of **{i.encoder}**, {i.dim} numbers for each patch of {i.patch_size_px} by {i.patch_size_px} pixels at
{i.magnification:g}x; all slides of a patient together.{sampled} Features of another encoder mean something else, also
where they are as wide.

## What it says

A risk (higher is worse), its percentile among the training patients, and the probability of surviving each of
{c.network.n_bins} intervals of {c.network.bin_width_days:g} {c.endpoint.unit}, {end:g} {c.endpoint.unit} in all. The
event is {c.endpoint.name}: {c.endpoint.description}.

## Whom it was trained on

{t.patients} patients of {c.dataset} ({", ".join(c.projects)}), {t.events} with an event, followed for at most
{t.longest_follow_up_days:g} {c.endpoint.unit}. What it says of later times is extrapolation. Percentiles are among
these patients, whom the model has seen: new patients' may crowd less towards the ends.

## How well it ranks patients it has not seen

| patients | of test fold | events | C-index (95 % interval) |
|---|---|---|---|
{"".join(map(_score_row, c.scores))}
0.5 is chance. Intervals are of other test patients, for the same models; where there are several folds, each was ranked
by a model of its own. No hospital, scanner or population but those of its data set were tried.

## Limits

- It was not tested on another centre, and not for any group of patients by itself.
- The risk ranks patients; that a survival curve is right in height was not shown here.
- Attention tells which patches were read most. It does not tell that they cause anything.

## Made from

Run `{c.run}`, finished {c.finished} on {c.device} in {c.precision}, with {_versions(c)}. The model reproduces the
study's risks for the test patients {_reproduced(c)}.{_dropped(c)}
`config.json` holds checksums of itself and of `model.safetensors`; this page may be edited.
"""


def _shell_name(config: Config) -> str:
    return "".join(x if x.isalnum() or x in "-_" else "-" for x in f"{config.method}-{config.dataset}".lower())


def _score_row(score: Score) -> str:
    value = "undefined" if score.c_index is None else f"{score.c_index:.3f}"
    between = "" if score.low is None else f" ({score.low:.3f} to {score.high:.3f})"
    return f"| {score.patients} | {', '.join(map(str, score.folds))} | {score.events} | {value}{between} |\n"


def _versions(config: Config) -> str:
    return ", ".join(f"{name} {config.versions[name]}" for name in ("steph", "torch") if name in config.versions)


def _reproduced(config: Config) -> str:
    return "to the last bit" if config.differs == 0 else f"to within {config.differs:.2g}"


def _dropped(config: Config) -> str:
    d = config.dropped
    return "" if d is None else " " + told(d)


def told(d: Dropped) -> str:
    """What was dropped and what that changed, in words."""
    if not d.sources:
        return "Every source is in use for some patient: none was dropped."
    return (
        f"Sources that no patient has in use were dropped: {', '.join(d.sources)}. Over {d.patients} patients the risk "
        f"changes by at most {d.max_change_in_risk:.2g}, and {d.ranks_changed} patients change rank."
    )
