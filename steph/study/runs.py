"""Runs: what each is, what it stands on, where its record lies.

A run is one method on one data set, fold and seed. Its key hashes what decides its result: configuration, data, code
and the keys of the runs it builds on. A finished run is found by its key; a changed one has another.
"""

from __future__ import annotations

import ast
import inspect
import symtable
import textwrap
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import pandas as pd
from torch import nn

from steph import Refused
from steph.data.dataset import Dataset, open_dataset
from steph.data.joint import JointDataset
from steph.data.manifest import Study, load_study, unknown
from steph.files.records import (
    NUMERIC,
    Record,
    code_fingerprint,
    fingerprint,
    read_record,
    without_docstrings,
    write_record,
)
from steph.methods.registry import METHODS, Ingredients, Method, known_method, method
from steph.mil import NETWORKS
from steph.mil.state import ModelState, load_into, load_state, save_state, state_fingerprint, state_of
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


class Workbench:
    """A study with its data opened and its keys known; what the functions below work with."""

    def __init__(self, study: Study | str | Path) -> None:
        self.study = study if isinstance(study, Study) else load_study(study)
        self._datasets: dict[str, Dataset] = {}
        self._keys: dict[Run, str] = {}

    def dataset(self, name: str) -> Dataset:
        """A data set, opened once (and made first, in a synthetic study)."""
        if name not in self._datasets:
            self.study.entry(name)
            self._datasets[name] = open_dataset(self.study, name)
        return self._datasets[name]

    def upstream(self, run: Run) -> dict[str, Run]:
        """The runs that must be finished first: the target's model of the same fold, the sources' of fold 0, an earlier
        stage or the joint model. Models that are merged are trained with the study's own seed, so that seeds of a run
        can be compared on the same models."""
        wanted = method(run.method)
        base = replace(run, method=wanted.base, seed=self.study.seed)
        found = {TARGET: base} if wanted.needs_target else {}
        if wanted.after:
            found[STAGE] = replace(run, method=wanted.after)
        if wanted.joint and not self._trains_for_all(run):
            found[STAGE] = replace(run, dataset=next(iter(self.study.datasets)))
        if wanted.needs_sources:
            names = [wanted.only] if wanted.only else self.study.sources_of(run.dataset)
            found |= {name: replace(base, dataset=name, fold=SOURCE_FOLD) for name in names}
        return found

    def key(self, run: Run) -> str:
        """Hash of what decides the result of a run."""
        if run not in self._keys:
            wanted, study = method(run.method), self.study
            decides = {
                "run": asdict(run),
                "options": {k: repr(v) for k, v in sorted(wanted.options.items())},
                "data": self._data_fingerprint(run.dataset),
                "dimensions": [study.features.dim, study.network.model_dump(), study.steph.model_dump()],
                "recipe": study.recipe.model_dump(),
                "null": [study.seed, wanted.network],
                "code": code_of(wanted),
                "upstream": {name: self.key(first) for name, first in self.upstream(run).items()},
            }
            if self._trains_for_all(run):
                decides["joint"] = {name: self.dataset(name).fingerprint for name in study.datasets}
            self._keys[run] = fingerprint(decides)
        return self._keys[run]

    def _trains_for_all(self, run: Run) -> bool:
        """Is this the run that trains the joint model of its fold and seed?"""
        return method(run.method).joint and run.dataset == next(iter(self.study.datasets))

    def training_set(self, run: Run) -> tuple[Dataset | JointDataset, list[str]]:
        """The data that a run trains on, and the patients of it."""
        if self._trains_for_all(run):
            union = JointDataset([self.dataset(name) for name in self.study.datasets])
            return union, union.train(run.fold)
        data = self.dataset(run.dataset)
        return data, data.splits.train(run.fold)

    def _data_fingerprint(self, name: str) -> list[str]:
        data = self.dataset(name)
        return [data.fingerprint, data.external.fingerprint if data.external else ""]

    def folder(self, run: Run) -> Path:
        """Where a run's record lies."""
        name = f"fold{run.fold}-seed{run.seed}-{self.key(run)}"
        return self.study.build / "runs" / run.dataset / run.method / name

    def record(self, run: Run) -> Record | None:
        """The finished record of a run, None where there is none."""
        return read_record(self.folder(run))

    @cached_property
    def _null_folder(self) -> Path:
        return self.study.build / "null_models"

    def null_state(self, network: str) -> ModelState:
        """M_0: one untrained network for all data sets and folds, made once and kept on disk."""
        study = self.study
        key = fingerprint([network, study.features.dim, study.network.model_dump(), study.seed])
        folder = self._null_folder / f"{network}-{key}"
        found = read_record(folder)
        if found is None:
            seed_everything(study.seed)
            state = state_of(NETWORKS[network](study.features.dim, study.network))
            state.origin = state_fingerprint(state)
            info = {"network": network, "seed": study.seed, "fingerprint": state.origin}
            found = write_record(folder, {"model.safetensors": lambda path: save_state(state, path)}, info)
        return load_state(found.file("model.safetensors"))

    def state(self, run: Run) -> ModelState:
        """The parameters that a finished run trained. Raises `Refused` where it is not finished."""
        found = self.record(run)
        if found is None:
            raise Refused(
                f"{run} is not finished. Run it: steph study run --study {self.study.address} --dataset {run.dataset} "
                f"--method {run.method} --fold {run.fold} --seed {run.seed}"
            )
        return load_state(found.file("model.safetensors"))

    def untrained(self, run: Run, device: str = "cpu") -> nn.Module:
        """The model of a run as its method builds it, before training, on the models it merges."""
        wanted, data, done = method(run.method), self.dataset(run.dataset), self.record(run)
        states = {name: self.state(first) for name, first in self.upstream(run).items()}
        ingredients = Ingredients(
            study=self.study,
            data=data,
            patients=data.splits.train(run.fold),
            network_name=wanted.network,
            null_state=self.null_state(wanted.network),
            target_state=states.pop(TARGET, None),
            stage_state=states.pop(STAGE, None),
            source_states=states,
            known=done.info.get("facts", {}) if done else {},
            seed=run.seed,
            device=device,
            precision=run.precision,
        )
        seed_everything(run.seed)
        return wanted.build(ingredients, **wanted.options)

    def model(self, run: Run) -> nn.Module:
        """The model of a finished run, in evaluation mode."""
        model = self.untrained(run)
        load_into(model, self.state(run))
        return model.eval()


def plan(
    study: Study,
    datasets: Sequence[str] | None = None,
    methods: Sequence[str] | None = None,
    folds: Sequence[int] | None = None,
    seeds: Sequence[int] | None = None,
    precision: str = "fp32",
) -> list[Run]:
    """The runs of a choice of data sets, methods, folds and seeds.

    None takes all: of methods those that the book shows, without settings of a sweep that ask for more sources than the
    study has; of folds every one, or as many as the study's `book_folds` gives a method; of seeds the study's own.

    Raises `Refused` for a name or fold that the study does not have.
    """
    kinds = {m.group for m in METHODS.values()} | set(METHODS)
    for kind in study.book_folds:
        if kind not in kinds:
            raise Refused(unknown("group or method", kind, sorted(kinds), f"book_folds of study {study.name}"))
    if methods is None:
        some = next(iter(study.datasets))
        methods = [n for n, m in METHODS.items() if m.in_book and not (m.group == "sweep" and m.refusal(study, some))]

    def folds_of(name: str) -> Sequence[int]:
        if folds is not None:
            return folds
        few = study.book_folds.get(name) or study.book_folds.get(method(name).group) or study.n_folds
        return range(min(few, study.n_folds))

    return [
        Run(dataset, name, fold, seed, precision)
        for dataset in datasets or list(study.datasets)
        for name in methods
        for fold in folds_of(name)
        for seed in (seeds or [study.seed])
    ]


def stages(bench: Workbench, runs: Iterable[Run]) -> dict[Run, int]:
    """Runs and all that they build on, each behind what it builds on, and the stage of each: 0 for what builds on
    nothing, else one more than the last of what it builds on. Of two runs of a stage, neither builds on the other."""
    found: dict[Run, int] = {}

    def stage(run: Run) -> int:
        if run not in found:
            found[run] = 1 + max([stage(first) for first in bench.upstream(run).values()], default=-1)
        return found[run]

    for run in runs:
        stage(run)
    return found


def results(study: Study | str | Path | Workbench, current_only: bool = True) -> pd.DataFrame:
    """Every finished run of a study, a row each: dataset, method, fold, seed, precision, c_index, problem, loss,
    n_test, events_test, external_c_index, seconds, device, key, path, folds (of each cross-validation), current.

    current: the key is the one that today's data, code and configuration give; runs of other keys are left out.
    """
    bench = study if isinstance(study, Workbench) else Workbench(study)
    rows = []
    for path in sorted((bench.study.build / "runs").glob("*/*/*/run.json")):
        found = read_record(path.parent)
        if found is None:  # deleted meanwhile
            continue
        try:
            row = {**row_of(found), "folds": bench.study.folds}
            run = Run(**{k: row[k] for k in Run.__dataclass_fields__})
            hash(run)  # what is no plain value has none
            known = run.dataset in bench.study.datasets and known_method(run.method)
        except (KeyError, TypeError, AttributeError) as error:
            raise Refused(f"{path} is no record of a run ({error!r}). Delete {path.parent} and run again.") from None
        row["current"] = known and bench.key(run) == row["key"]
        rows.append(row)
    table = pd.DataFrame(rows)
    return table[table["current"]].reset_index(drop=True) if current_only and len(table) else table


def row_of(found: Record | None) -> dict[str, Any]:
    """A record as a row of `results`."""
    assert found is not None
    info = found.info
    return {
        **info["run"], **info["metrics"], "seconds": info["seconds"], "device": info["device"], "key": info["key"],
        "path": str(found.path),
    }  # fmt: skip


def code_of(entry: Method) -> str:
    """Hash of the code that decides a method's numbers, docstrings left out: its builder with the functions of the same
    module that it calls, and whole modules: those of what they name elsewhere, the network's, the engine's.

    Raises `Refused` for a builder defined in a notebook that uses a class or a value of the notebook: their changes
    would not be seen.
    """
    functions: dict[str, str] = {}
    waiting = [entry.build]
    modules = {"steph.training.engine", "steph.survival", f"steph.mil.{entry.network}", *entry.code}
    while waiting:
        build = waiting.pop()
        functions[build.__name__], names = _source_of(build)
        if build.__module__ == "__main__":
            _refuse_loose(build)
        for found in (build.__globals__.get(name) for name in names):
            home = getattr(found, "__module__", None) or ""
            if inspect.isfunction(found) and home == build.__module__ and found.__name__ not in functions:
                waiting.append(found)
            elif home.startswith(NUMERIC):
                modules.add(home)
    return fingerprint([functions, code_fingerprint(*sorted(modules))])


def _refuse_loose(build: Callable[..., Any]) -> None:
    """Refuse classes and values of a notebook that a function defined there uses."""
    waiting, names = [symtable.symtable(textwrap.dedent(inspect.getsource(build)), "notebook", "exec")], set()
    while waiting:
        scope = waiting.pop()
        waiting += scope.get_children()
        names |= {s.get_name() for s in scope.get_symbols() if s.is_global() and scope.get_type() != "module"}
    for name in sorted(names):
        found = build.__globals__.get(name)
        if inspect.isclass(found) and found.__module__ == "__main__":
            raise Refused(
                f"{build.__name__} uses the class {name} of this notebook: define it inside {build.__name__}."
            )
        if not (found is None or callable(found) or inspect.ismodule(found)):
            raise Refused(
                f"{build.__name__} uses {name}, a value of this notebook: hand it over as an option of the method "
                f"(options={{{name!r}: ...}}), so that runs with another value are other runs."
            )


@cache
def _source_of(function: Callable[..., Any]) -> tuple[str, list[str]]:
    """A function's code without docstrings, and the names in it."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    names = [node.id for node in ast.walk(tree) if isinstance(node, ast.Name)]
    return ast.dump(without_docstrings(tree)), names
