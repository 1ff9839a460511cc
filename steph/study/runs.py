"""Runs: what each is, what it stands on, where its record lies.

A run is one method on one data set, fold and seed. Its key hashes what decides its result: configuration, data, code
and the keys of the runs it builds on. A finished run is found by its key; a changed one has another.
"""

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import pandas as pd

from steph import Refused
from steph.data.dataset import Dataset, dataset_fingerprint, open_dataset
from steph.data.joint import JointDataset
from steph.data.manifest import Study, load_study, refuse_unknown
from steph.data.patients import PatientData
from steph.files.records import Record, fingerprint, read_record, write_record
from steph.methods import METHODS, Inputs, Method, known_method, method
from steph.mil import Model, new_network
from steph.mil.state import ModelState, load_into, load_state, save_state, state_fingerprint, state_of
from steph.study import health
from steph.study.keys import method_code
from steph.training.device import Compute, precision_for
from steph.training.engine import seed_everything

SOURCE_FOLD = 0
"""The fold whose model stands for a source cancer (as in the release)."""
TARGET, STAGE = "(target)", "(stage)"
"""Roles of runs that come first, beside the sources' names."""


@dataclass(frozen=True)
class Run:
    """One method on one data set, fold and seed."""

    dataset: str
    method: str
    fold: int
    seed: int
    precision: str = "fp32"

    def __str__(self) -> str:
        return f"{self.dataset}/{self.method}/fold{self.fold}-seed{self.seed}"

    @property
    def entry(self) -> Method:
        """The method's entry in the registry. Raises `Refused` for a name that has none."""
        return method(self.method)


class Workbench:
    """A study with its data opened and its keys known, and how it is computed; what the functions below work with.

    device, precision: by name; "auto" goes by the device. What is finished in another precision is another run.
    """

    def __init__(self, study: Study | str | Path, device: str = "cpu", precision: str = "auto") -> None:
        self.study = study if isinstance(study, Study) else load_study(study)
        self.compute = Compute(device, precision_for(precision, device), self.study.recipe.max_patches)
        self._datasets: dict[str, Dataset] = {}
        self._keys: dict[Run, str] = {}
        self._fingerprints: dict[str, str] = {}

    def run_of(self, dataset: str, method: str, fold: int, seed: int | None = None) -> Run:
        """A run in the workbench's precision. seed: None is the study's."""
        return Run(dataset, method, fold, self.study.seed if seed is None else seed, self.compute.precision)

    def dataset(self, name: str) -> Dataset:
        """A data set, opened once (and made first, in a synthetic study)."""
        if name not in self._datasets:
            self.study.entry(name)
            self._datasets[name] = open_dataset(self.study, name)
        return self._datasets[name]

    def prerequisites(self, run: Run) -> dict[str, Run]:
        """The runs that must be finished first: the target's model of the same fold, the sources' of fold 0 (the
        target's own from other seeds: of the same fold), an earlier stage or the joint model. Models that are merged
        are trained with the study's own seed, so that seeds of a run can be compared on the same models."""
        entry = run.entry
        base = replace(run, method=entry.base, seed=self.study.seed)
        needed = {TARGET: base} if entry.needs_target else {}
        if entry.after:
            needed[STAGE] = replace(run, method=entry.after)
        if entry.joint and not self.trains_for_all(run):
            needed[STAGE] = replace(run, dataset=next(iter(self.study.datasets)))
        for name, (dataset, seed) in entry.sources(self.study, run.dataset).items():
            fold = run.fold if dataset == run.dataset else SOURCE_FOLD
            needed[name] = replace(base, dataset=dataset, seed=seed, fold=fold)
        return needed

    def key(self, run: Run) -> str:
        """Hash of what decides the result of a run. Nothing is made or written for it."""
        if run not in self._keys:
            entry, study = run.entry, self.study
            inputs = {
                "run": asdict(run),
                "options": {k: repr(v) for k, v in sorted(entry.options.items())},
                "settings": entry.settings_of(study),
                "data": self._fingerprint(run.dataset),
                "dimensions": [study.features.dim, study.network.model_dump()],
                "recipe": study.recipe.model_dump(),
                "null": [study.seed, entry.network],
                "code": method_code(entry),
                "prerequisites": {name: self.key(needed) for name, needed in self.prerequisites(run).items()},
            }
            if self.trains_for_all(run):
                inputs["joint"] = {name: self._fingerprint(name) for name in study.datasets}
            self._keys[run] = fingerprint(inputs)
        return self._keys[run]

    def _fingerprint(self, name: str) -> str:
        if name not in self._fingerprints:
            self._fingerprints[name] = dataset_fingerprint(self.study, name)
        return self._fingerprints[name]

    def trains_for_all(self, run: Run) -> bool:
        """Is this the run that trains the joint model of its fold and seed?"""
        return run.entry.joint and run.dataset == next(iter(self.study.datasets))

    def training_set(self, run: Run) -> tuple[PatientData, list[str]]:
        """The data that a run trains on, and the patients of it."""
        if self.trains_for_all(run):
            union = JointDataset([self.dataset(name) for name in self.study.datasets])
            return union, union.train(run.fold)
        data = self.dataset(run.dataset)
        return data, data.splits.train(run.fold)

    def compute_of(self, run: Run) -> Compute:
        """How a run is computed: in its own precision."""
        return replace(self.compute, precision=run.precision)

    def folder(self, run: Run) -> Path:
        """Where a run's record lies."""
        name = f"fold{run.fold}-seed{run.seed}-{self.key(run)}"
        return self.study.build / "runs" / run.dataset / run.method / name

    def record(self, run: Run) -> Record | None:
        """The finished record of a run, None where there is none."""
        return read_record(self.folder(run))

    def null_state(self, network: str) -> ModelState:
        """M_0: one untrained network for all data sets and folds, made once and kept on disk."""
        study = self.study
        key = fingerprint([network, study.features.dim, study.network.model_dump(), study.seed])
        folder = study.build / "null_models" / f"{network}-{key}"
        record = read_record(folder)
        if record is None:
            seed_everything(study.seed)
            state = state_of(new_network(network, study.features.dim, study.network))
            state.origin = state_fingerprint(state)
            info = {"network": network, "seed": study.seed, "fingerprint": state.origin}
            record = write_record(folder, {"model.safetensors": lambda path: save_state(state, path)}, info)
        return load_state(record.file("model.safetensors"))

    def finished(self, run: Run) -> Record:
        """The record of a run. Raises `Refused`, with the command that makes it, where it is not finished."""
        self.study.check_fold(run.fold)
        record = self.record(run)
        if record is None:
            raise Refused(
                f"{run} is not finished. Run it: steph study run --study {self.study.address} --dataset {run.dataset} "
                f"--method {run.method} --fold {run.fold} --seed {run.seed}"
            )
        return record

    def state(self, run: Run) -> ModelState:
        """The parameters that a finished run trained. Raises `Refused` where it is not finished."""
        return load_state(self.finished(run).file("model.safetensors"))

    def untrained(self, run: Run) -> Model:
        """The model of a run as its method builds it, before training, on the models it merges."""
        entry, study, data, record = run.entry, self.study, self.dataset(run.dataset), self.record(run)
        states = {name: self.state(needed) for name, needed in self.prerequisites(run).items()}
        inputs = Inputs(
            data=data,
            patients=data.splits.train(run.fold),
            network_name=entry.network,
            dim=study.features.dim,
            dimensions=study.network,
            recipe=study.recipe,
            settings=entry.settings_of(study, len(data.cohort)),
            null_state=self.null_state(entry.network),
            target_state=states.pop(TARGET, None),
            stage_state=states.pop(STAGE, None),
            source_states=states,
            facts=record.info.get("facts", {}) if record else {},
            seed=run.seed,
            study_seed=study.seed,
            compute=self.compute_of(run),
        )
        seed_everything(run.seed)
        return entry.build(inputs, **entry.options)

    def model(self, run: Run) -> Model:
        """The model of a finished run, in evaluation mode."""
        model = self.untrained(run)
        load_into(model, self.state(run))
        return model.eval()


def plan(
    bench: Workbench,
    datasets: Sequence[str] | None = None,
    methods: Sequence[str] | None = None,
    folds: Sequence[int] | None = None,
    seeds: Sequence[int] | None = None,
) -> list[Run]:
    """The runs of a choice of data sets, methods, folds and seeds, in the workbench's precision.

    None takes all: of data sets the study's targets; of methods those that the book shows, without settings of a sweep
    that ask for more sources than the study has; of folds every one, or as many as the study's `book_folds` gives a
    method; of seeds the study's own. A study of one cancer leaves out what needs other cancers.

    Raises `Refused` for a name or fold that the study does not have.
    """
    study, kinds = bench.study, sorted({m.group for m in METHODS.values()} | set(METHODS))
    refuse_unknown("group or method", study.book_folds, kinds, f"book_folds of study {study.name}")
    if methods is None:
        some = next(iter(study.datasets))
        left_out = {n for n, m in METHODS.items() if m.group == "sweep" or len(study.datasets) == 1}
        methods = [n for n, m in METHODS.items() if m.in_book and not (n in left_out and m.refusal(study, some))]

    def folds_of(name: str) -> Sequence[int]:
        if folds is not None:
            return folds
        few = study.book_folds.get(name) or study.book_folds.get(method(name).group) or study.n_folds
        return range(min(few, study.n_folds))

    return [
        bench.run_of(dataset, name, fold, seed)
        for dataset in datasets or study.target_names
        for name in methods
        for fold in folds_of(name)
        for seed in seeds or [study.seed]
    ]


def without_coords(bench: Workbench, runs: Sequence[Run]) -> dict[Run, str]:
    """Runs whose network needs coordinates that slides of theirs, or of runs below, lack; why, in a sentence each."""
    dimensions, lacking = (bench.study.features.dim, bench.study.network), dict[Run, str]()
    needing = {name for name in {run.entry.network for run in runs} if new_network(name, *dimensions).needs_coords}
    for run in (run for run in stages(bench, runs) if run.entry.network in needing):
        data_sets = {run.dataset, *(below.dataset for below in bench.prerequisites(run).values())}
        if bare := [name for name in sorted(data_sets) if bench.dataset(name).store.without_coords]:
            lacking[run] = f"{run.entry.network} needs coordinates, which slides of {', '.join(bare)} lack"
    return lacking


def stages(bench: Workbench, runs: Iterable[Run]) -> dict[Run, int]:
    """Runs and all that they build on, each behind what it builds on, and the stage of each: 0 for what builds on
    nothing, else one more than the last of what it builds on. Of two runs of a stage, neither builds on the other."""
    stage_of: dict[Run, int] = {}

    def stage(run: Run) -> int:
        if run not in stage_of:
            stage_of[run] = 1 + max(map(stage, bench.prerequisites(run).values()), default=-1)
        return stage_of[run]

    for run in runs:
        stage(run)
    return stage_of


def results(study: Study | str | Path | Workbench) -> pd.DataFrame:
    """Every finished run of a study, a row each: dataset, method, fold, seed, precision, c_index, problem, loss,
    n_test, events_test, external_c_index, what tells whether the model is alive (`steph.study.health.MEASURES`),
    seconds, device, key, path, folds (of each cross-validation). Runs of other data, code or configuration than
    today's, by their keys, are left out.
    """
    bench = study if isinstance(study, Workbench) else Workbench(study)
    rows = []
    for path in sorted((bench.study.build / "runs").glob("*/*/*/run.json")):
        record = read_record(path.parent)
        if record is None:  # deleted meanwhile
            continue
        try:
            run, row = Run(**record.info["run"]), row_of(bench, record)
            hash(run)  # what is no plain value has none
            known = run.dataset in bench.study.datasets and known_method(run.method)
        except (KeyError, TypeError, AttributeError) as error:
            raise Refused(f"{path} is no record of a run ({error!r}). Delete {path.parent} and run again.") from None
        if known and bench.key(run) == row["key"]:
            rows.append(row)
    return pd.DataFrame(rows)


def row_of(bench: Workbench, record: Record) -> dict[str, Any]:
    """A record as a row of `results`."""
    info = record.info
    told = {name: info[name] for name in ("seconds", "device", "key")}
    measured = dict.fromkeys(health.MEASURES) | info["metrics"]
    return {**info["run"], **measured, **told, "path": str(record.path), "folds": bench.study.folds}
