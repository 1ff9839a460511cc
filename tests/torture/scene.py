"""Everything that STEPH reads, made once: a finished synthetic study with its model folder, analyses and notebooks, and
a study of real data in miniature."""

from __future__ import annotations

import hashlib
import os
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import nbformat
import numpy as np
import pandas as pd
import torch
import yaml

from steph.book import notebooks
from steph.data.cohort import COLUMNS, cohort_from, read_cohort
from steph.data.dataset import Dataset, open_dataset, pack_dataset
from steph.data.features import find_slides, inspect, read
from steph.data.labels import read_outcomes, read_slides
from steph.data.manifest import load_study
from steph.deploy.checkpoints import read_weights, write_released
from steph.deploy.export import export
from steph.deploy.predict import load_model
from steph.files.records import read_record
from steph.mil.state import load_state, state_fingerprint
from steph.study.cache import cached_table
from steph.study.execute import run_all
from steph.study.runs import Run, Workbench
from tests.helpers.fabricate import fabricate

from .common import manifest

RUN = Run("SARC", "steph", 0, 42)
NOT_FINISHED = "not finished"


@dataclass(frozen=True)
class Site:
    """A file, and what reads it and gives all that was read. personal: people make such files, without a checksum: a
    digit that changed is another valid number, and nobody can know."""

    name: str
    path: Path
    read: Callable[[], Any]
    personal: bool = False


def make(folder: Path) -> None:
    """Make all of it below a folder."""
    os.environ["STEPH_BUILD"] = str(folder / "build")
    os.environ.pop("STEPH_DATA", None)
    torch.set_num_threads(1)
    study = manifest(folder)
    bench = Workbench(study)
    run_all(bench, [RUN], workers=1)
    export(bench, RUN, folder / "model")
    _kept(study)
    path = folder / "notebook.ipynb"
    cells = [
        nbformat.v4.new_code_cell(f"# Parameters\nstudy = {str(study)!r}", metadata={"tags": ["parameters"]}),
        nbformat.v4.new_code_cell("print(study)"),
    ]
    nbformat.write(nbformat.v4.new_notebook(cells=cells), path)
    notebooks.execute(path, {}, folder / "executed.ipynb", progress=False)
    data = bench.dataset("SARC")
    patient = data.splits.test(0)[0]
    with h5py.File(folder / "slide.h5", "w") as file:
        file["features"] = data.store.bag(data.slides(patient))
        file["coords"] = data.store.coords_of(data.slides(patient)).astype(np.int64)
    write_released(bench.state(Run("SARC", "vanilla", 0, 42)), folder / "released.pth")
    _real(folder)


def _real(folder: Path) -> None:
    data = folder / "real"
    rows = [(f"P{i:02}", f"S{i:02}", "LIHC", 100.5 * (i + 1), i % 2) for i in range(12)]
    (data / "labels").mkdir(parents=True)
    pd.DataFrame(rows, columns=COLUMNS).to_csv(data / "labels" / "LIHC.csv", index=False)
    cohort = read_cohort(data / "labels" / "LIHC.csv", "LIHC")
    values = {"extends": "tcga", "name": "real", "data_root": str(data), "folds": 2, "features": {"dim": 6},
              "datasets": {"LIHC": {"projects": ["LIHC"]}}}  # fmt: skip
    (folder / "real.yaml").write_text(yaml.safe_dump(values))
    fabricate(cohort, data / "features", "mahmoodlab", dim=6, mean_patches=20)
    study = load_study(folder / "real.yaml")
    pack_dataset(study, "LIHC", progress=False)
    open_dataset(study, "LIHC")
    released = folder / "authors" / "LIHC"
    released.mkdir(parents=True)
    for k in range(2):
        test = [f"P{i:02}" for i in range(12) if i % 2 == k]
        train = [f"P{i:02}" for i in range(12) if i % 2 != k]
        pd.DataFrame({"train": train, "val": test}).to_csv(released / f"splits_{k}.csv", index=False)
    barcodes = [f"TCGA-AA-A{i:03}" for i in range(12)]
    cdr = pd.DataFrame({"bcr_patient_barcode": barcodes, "type": "LIHC", "DSS": [i % 2 for i in range(12)],
                        "DSS.time": [100 * i + 7 for i in range(12)]})  # fmt: skip
    cdr.to_csv(folder / "cdr.csv", index=False)
    cdr.to_excel(folder / "cdr.xlsx", sheet_name="TCGA-CDR", index=False)
    (folder / "slides.txt").write_text("\n".join(f"{name}-01Z-00-DX1" for name in barcodes))
    torch.save(torch.arange(60, dtype=torch.float32).reshape(10, 6), folder / "slide.pt")


def _kept(study: Path) -> pd.DataFrame:
    return cached_table(Workbench(study), "made", [], _table)


def _table() -> pd.DataFrame:
    return pd.DataFrame({"x": [0.1, 0.2], "y": ["a", "b"]})


def sites(folder: Path) -> list[Site]:
    """Every file that is read, with its reader."""
    os.environ["STEPH_BUILD"] = str(folder / "build")
    torch.set_num_threads(1)
    study, build, real = folder / "torture.yaml", folder / "build" / "torture", folder / "real"
    [run] = (build / "runs").glob("SARC/steph/fold0-*")
    [null] = (build / "null_models").glob("abmil-*")
    [table] = (build / "analyses").glob("made-*")
    model = load_model(folder / "model")

    def record(path: Path) -> Callable[[], Any]:
        def reader() -> Any:
            found = read_record(path)
            if found is None:
                return NOT_FINISHED
            files = [found.file(name) for name in found.info["files"]]
            return found.info, [load_state(f) if f.suffix == ".safetensors" else f.read_text() for f in files]

        return reader

    def predicted() -> Any:
        loaded = load_model(folder / "model")
        found = loaded.predict([folder / "slide.h5"])
        return loaded.config.model_dump(exclude={"files"}), found.risk, found.survival, found.patches

    def slide() -> Any:
        found = model.predict([folder / "slide.h5"])
        return found.risk, found.survival, found.patches

    def cohort() -> Any:
        return read_cohort(real / "labels" / "LIHC.csv", "LIHC").slides

    def authors() -> Any:
        from steph.data.splits import load_splits

        rows = [(f"P{i:02}", f"S{i:02}", "LIHC", 100.5 * (i + 1), i % 2) for i in range(12)]
        return load_splits(cohort_from(pd.DataFrame(rows, columns=COLUMNS), "LIHC", ""), folder / "authors", 2, 0).folds

    def executed() -> Any:
        return notebooks.completion(folder / "executed.ipynb"), (folder / "executed.ipynb").read_bytes()

    def made() -> Any:
        return _content(open_dataset(load_study(study), "SARC"))

    def packed() -> Any:
        return _content(open_dataset(load_study(folder / "real.yaml"), "LIHC"))

    feature_file = next(iter(find_slides([real / "features"]).values()))
    found = [Site(f"run: {path.name}", path, record(run)) for path in sorted(run.iterdir())]
    found += [Site(f"null model: {path.name}", path, record(null)) for path in sorted(null.iterdir())]
    found += [Site(f"analysis: {path.name}", path, lambda: _kept(study)) for path in sorted(table.iterdir())]
    found += [Site(f"model folder: {p.name}", p, predicted) for p in sorted((folder / "model").iterdir())]
    for part in ("", "external/"):
        for kind, end in (("labels", "csv"), ("labels", "csv.sha256"), ("oracle", "csv"), ("stores", "h5")):
            path = build / "data" / part / kind / f"SARC.{end}"
            if part == "" or kind != "oracle":
                found.append(Site(f"made data: {part}{kind}/*.{end}", path, made))
    found += [Site(f"made data: splits/*{end}", build / "data" / "splits" / f"SARC{end}", made)
              for end in (".csv", ".csv.sha256")]  # fmt: skip
    found += [
        Site("executed notebook", folder / "executed.ipynb", executed),
        Site("executed notebook: completion", folder / "executed.json", executed),
        Site("packed store", real / "stores" / "LIHC.h5", packed),
        Site("packed: splits", real / "splits" / "LIHC.csv", packed),
        Site("a person's label table", real / "labels" / "LIHC.csv", cohort, personal=True),
        Site("a person's manifest", folder / "real.yaml", lambda: load_study(folder / "real.yaml"), personal=True),
        Site("a person's notebook", folder / "notebook.ipynb",
             lambda: notebooks.declared(folder / "notebook.ipynb"), personal=True),
        Site("the authors' splits", folder / "authors" / "LIHC" / "splits_0.csv", authors, personal=True),
        Site("the authors' weights", folder / "released.pth",
             lambda: read_weights(folder / "released.pth")[0], personal=True),
        Site("a slide's h5", feature_file, lambda: (read(feature_file), inspect(feature_file)), personal=True),
        Site("a slide's h5, predicted", folder / "slide.h5", slide, personal=True),
        Site("a slide's pt", folder / "slide.pt", lambda: read(folder / "slide.pt"), personal=True),
        Site("TCGA-CDR csv", folder / "cdr.csv", lambda: read_outcomes(folder / "cdr.csv", "DSS"), personal=True),
        Site("TCGA-CDR xlsx", folder / "cdr.xlsx", lambda: read_outcomes(folder / "cdr.xlsx", "DSS"), personal=True),
        Site("slide list", folder / "slides.txt", lambda: read_slides(folder / "slides.txt"), personal=True),
    ]  # fmt: skip
    return found


def _content(data: Dataset) -> Any:
    """Labels, splits and features of a data set: all that a run takes from it."""
    parts = []
    for each in (data, data.external):
        if each is not None:
            bags = each.batch(list(each.cohort.slides_of), coords=True)
            parts.append((each.cohort.slides, each.splits.folds if each.splits else None, bags.features, bags.coords,
                          bags.offsets, each.oracle, each.fingerprint))  # fmt: skip
    return parts


def digest(value: Any) -> str:
    """Hash of what a reader gave, number by number."""
    return hashlib.sha256(repr(_plain(value)).encode()).hexdigest()


def _plain(value: Any) -> Any:
    if isinstance(value, pd.DataFrame | pd.Series):
        return type(value).__name__, value.to_csv()
    if isinstance(value, torch.Tensor):
        return "tensor", str(value.dtype), tuple(value.shape), hashlib.sha256(value.numpy().tobytes()).hexdigest()
    if isinstance(value, np.ndarray):
        return "array", str(value.dtype), value.shape, hashlib.sha256(value.tobytes()).hexdigest()
    if isinstance(value, dict):
        named = {str(k): _plain(v) for k, v in value.items()}
        return state_fingerprint(value) if all(isinstance(v, torch.Tensor) for v in value.values()) else named
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return repr(value)


def damaged(content: bytes, rng: random.Random) -> tuple[bytes, str]:
    """Content as a failing disk or a broken copy leaves it, and in what way."""
    way = rng.choice(["cut off", "a bit", "a bit", "bits", "zeros", "foreign bytes"])
    at = rng.randrange(len(content)) if content else 0
    if way == "cut off":
        return content[:at], f"{way} at {at}"
    changed = bytearray(content)
    if way in ("a bit", "bits"):
        for place in [at] if way == "a bit" else [rng.randrange(len(content)) for _ in range(rng.randint(2, 20))]:
            changed[place] ^= 1 << rng.randrange(8)
    else:
        end = min(at + rng.choice([1, 4, 16, 64, 512, 4096]), len(content))
        changed[at:end] = bytes(end - at) if way == "zeros" else rng.randbytes(end - at)
    return bytes(changed), f"{way} at {at}"
