"""Fuzzing: every reader is fed made-up files of its format, nearly right or not at all. It reads or refuses each with a
sentence; anything else is a finding, and its smallest form is kept."""

from __future__ import annotations

import copy
import hashlib
import io
import json
import os
import random
import traceback
import zipfile
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import torch
import yaml

from steph import Refused
from steph.book import notebooks
from steph.data.cohort import read_cohort
from steph.data.dataset import open_dataset
from steph.data.features import blocks, check_slides, find_slides
from steph.data.labels import read_outcomes, read_slides
from steph.data.manifest import load_study
from steph.data.splits import load_splits
from steph.data.store import Store
from steph.deploy.checkpoints import read_weights
from steph.deploy.model_folder import read_model
from steph.deploy.predict import load_model
from steph.files.records import fingerprint, read_record
from steph.mil.state import load_state
from steph.study.runs import Workbench, results

from .harness import Case, Report, carry_out
from .scene import make

ODD: list[Any] = [
    None, True, 0, -1, 1, 2**31, 2**63, 10**30, -0.0, 0.5, 1e308, float("nan"), float("inf"), "", " ", "nan", "x", "é",
    "\0", "\u202e", "../..", "/etc/passwd", "~nobody/x", "a" * 5000, "1e400", "=1+1", "<b>", "{x}", "%s", [], {}, [[]],
    [None], {"a": None}, {"": []}, [[[[[[[[]]]]]]]], "2024-13-45", "0x1g",
]  # fmt: skip
TOKENS = [
    b"", b",", b"\n", b'"', b"'", b"\0", b"\xff\xfe", b"{", b"[", b"NaN", b"-1", b"1e999", b"\xe2\x80\xae", b"\r",
    b"P00", b"fold", b"9" * 400, b"PK\x03\x04", b"\x89HDF\r\n\x1a\n", b"!!python/name:os.system", b"&a [*a]",
]  # fmt: skip


@dataclass(frozen=True)
class Target:
    """A reader and the file it reads. make: made-up content, from a source of chance."""

    name: str
    path: Path
    read: Callable[[], Any]
    make: Callable[[random.Random], bytes]


def torture(folder: Path, minutes: float, seed: int, keep: Path | None = None) -> Report:
    """Fuzz every reader for so many minutes in all; the content behind each finding is kept in a folder."""
    make(folder)
    return carry_out(cases, (folder, seed, keep), None, 60 * minutes)


def cases(folder: Path, seed: int, keep: Path | None) -> Case:
    """The cases over a scene."""
    _mend(folder)
    known = targets(folder)
    _keep(folder, known)
    originals = {target.path: target.path.read_bytes() for target in known if target.path.exists()}
    seen: set[str] = set()

    def tried(target: Target, content: bytes) -> tuple[str, str]:
        target.path.write_bytes(content)
        try:
            target.read()
            return "read", ""
        except Refused as refused:
            return ("refused", "") if len(str(refused)) > 10 else ("no sentence", str(refused))
        except BaseException as error:
            frames = [f"{frame.filename}:{frame.lineno}" for frame in traceback.extract_tb(error.__traceback__)]
            ours = [frame for frame in frames if "/steph/" in frame][-1:]
            return "a traceback", f"{type(error).__name__} at {' '.join(ours)}: {str(error)[:300]}"
        finally:
            target.path.unlink()
            if target.path in originals:
                target.path.write_bytes(originals[target.path])

    def case(number: int) -> tuple[str, str, str]:
        rng = random.Random(f"{seed}/{number}")
        target = known[number % len(known)]
        content = target.make(rng)
        outcome, details = tried(target, content)
        kind = details.partition(":")[0]
        if details and kind not in seen:
            seen.add(kind)
            content = _smaller(content, lambda less: tried(target, less)[1].startswith(kind))
            if keep is not None:
                keep.mkdir(parents=True, exist_ok=True)
                name = f"{target.name.replace(' ', '-')}-{hashlib.sha256(content).hexdigest()[:8]}{target.path.suffix}"
                (keep / name).write_bytes(content)
                details += f" [{keep / name}]"
            return target.name, outcome, details
        return target.name, outcome, ""

    return case


def _mend(folder: Path) -> None:
    """Put back what a process left damaged that was ended."""
    for path in (folder / "kept").rglob("*.*"):
        if path.is_file():
            (folder / path.relative_to(folder / "kept")).write_bytes(path.read_bytes())


def _keep(folder: Path, known: list[Target]) -> None:
    for target in known:
        kept = folder / "kept" / target.path.relative_to(folder)
        if target.path.exists() and not kept.exists():
            kept.parent.mkdir(parents=True, exist_ok=True)
            kept.write_bytes(target.path.read_bytes())


def _smaller(content: bytes, fails: Callable[[bytes], bool], tries: int = 200) -> bytes:
    """Content with pieces cut out, as long as it still fails: first halves, then ever smaller ones."""
    step = len(content) // 2
    while step and tries:
        at = 0
        while at < len(content) and tries:
            tries -= 1
            less = content[:at] + content[at + step :]
            if fails(less):
                content = less
            else:
                at += step
        step //= 2
    return content


# ------------------------------------------------------------------------------------------------ made-up content


def mangled(content: bytes, rng: random.Random) -> bytes:
    """Content with bytes changed, put in, taken out, doubled."""
    for _ in range(rng.choice([1, 1, 2, 5, 20])):
        at = rng.randrange(len(content) + 1)
        end = at + rng.choice([0, 1, 2, 8, 50, 1000])
        piece = rng.choice([rng.choice(TOKENS), rng.randbytes(rng.choice([1, 4, 30])), content[at:end] * 2])
        content = content[:at] + piece + content[end if rng.random() < 0.7 else at :]
        if rng.random() < 0.05:
            content = content[:at]
    return content


def bent(value: Any, rng: random.Random) -> Any:
    """Plain data in which a few things are other things, gone, or there twice."""
    value = copy.deepcopy(value)
    for _ in range(rng.choice([1, 1, 1, 2, 4])):
        at, inside = value, None
        while isinstance(at, dict | list) and at and (inside is None or rng.random() < 0.8):
            keys = list(at) if isinstance(at, dict) else range(len(at))
            inside, key = at, rng.choice(keys)
            at = at[key]
        if inside is None:
            return rng.choice(ODD)
        change = rng.random()
        if change < 0.2:
            del inside[key]
        elif change < 0.3 and isinstance(inside, list):
            inside.append(copy.deepcopy(at))
        elif change < 0.3 and isinstance(inside, dict):
            inside[str(rng.choice(ODD))] = copy.deepcopy(at)
        else:
            inside[key] = copy.deepcopy(rng.choice(ODD))
    return value


def as_json(value: Any, checksum: str = "") -> Callable[[random.Random], bytes]:
    """Bent JSON, most of it with the right checksum, where such files have one; some of it no JSON at all."""

    def make(rng: random.Random) -> bytes:
        text = json.dumps(value).encode()
        if rng.random() < 0.2:
            return mangled(text, rng)
        found = bent(value, rng)
        if checksum and isinstance(found, dict):
            found.pop(checksum, None)
            with suppress(ValueError):
                found[checksum] = fingerprint(json.loads(json.dumps(found, allow_nan=False)), 64)
        return json.dumps(found).encode()

    return make


def as_yaml(value: Any) -> Callable[[random.Random], bytes]:
    """A bent manifest."""

    def make(rng: random.Random) -> bytes:
        if rng.random() < 0.3:
            return mangled(yaml.safe_dump(value).encode(), rng)
        return yaml.safe_dump(bent(value, rng), allow_unicode=rng.random() < 0.5).encode(errors="replace")

    return make


def as_csv(content: bytes) -> Callable[[random.Random], bytes]:
    """A table with odd cells, rows and columns."""

    def make(rng: random.Random) -> bytes:
        if rng.random() < 0.3:
            return mangled(content, rng)
        rows = [line.split(",") for line in content.decode().splitlines()]
        for _ in range(rng.choice([1, 1, 2, 5])):
            i = rng.randrange(len(rows))
            change = rng.random()
            if change < 0.6 and rows[i]:
                rows[i][rng.randrange(len(rows[i]))] = str(rng.choice([*ODD, rng.choice(rng.choice(rows) or [""])]))
            elif change < 0.75:
                rows.insert(i, list(rng.choice(rows)))
            elif change < 0.9 and len(rows) > 1:
                del rows[i]
            else:
                k = rng.randrange(max(len(rows[0]), 1))
                rows = [row[:k] + row[k + 1 :] for row in rows]
        return "\n".join(",".join(row) for row in rows).encode(errors="replace")

    return make


def as_zip(content: bytes) -> Callable[[random.Random], bytes]:
    """A zip file (xlsx, pt) one of whose members is mangled; or its own bytes are."""
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        members = {info.filename: archive.read(info) for info in archive.infolist()}

    def make(rng: random.Random) -> bytes:
        if rng.random() < 0.3:
            return mangled(content, rng)
        changed = dict(members)
        name = rng.choice(list(changed))
        changed[name] = mangled(changed[name], rng)
        if rng.random() < 0.1:
            del changed[name]
        out = io.BytesIO()
        with zipfile.ZipFile(out, "w") as archive:
            for name, data in changed.items():
                archive.writestr(name, data)
        return out.getvalue()

    return make


def as_safetensors(content: bytes) -> Callable[[random.Random], bytes]:
    """Weights whose header is bent."""
    size = int.from_bytes(content[:8], "little")
    header, rest = json.loads(content[8 : 8 + size]), content[8 + size :]

    def make(rng: random.Random) -> bytes:
        if rng.random() < 0.4:
            return mangled(content, rng)
        text = json.dumps(bent(header, rng)).encode()
        length = len(text) if rng.random() < 0.9 else rng.choice([0, 7, 2**40, 2**63])
        return length.to_bytes(8, "little") + text + (rest if rng.random() < 0.8 else mangled(rest, rng))

    return make


def as_pt(content: bytes) -> Callable[[random.Random], bytes]:
    """Objects that people save with PyTorch, and mangled files of one tensor."""
    zipped = as_zip(content)

    def make(rng: random.Random) -> bytes:
        if rng.random() < 0.5:
            return zipped(rng)
        shape = [rng.choice([0, 1, 3, 6]) for _ in range(rng.randrange(5))]
        kinds = [torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.int64, torch.bool, torch.complex64,
                 torch.float8_e4m3fn]  # fmt: skip
        tensor = torch.zeros(shape).to(rng.choice(kinds))
        things = [tensor, tensor, {"features": tensor}, [tensor], torch.ones(3, 6).to_sparse(),
                  torch.nn.Parameter(torch.ones(3, 6)), torch.zeros(1).expand(10**6, 6), torch.zeros(6, 9).T,
                  torch.empty(4, 6, device="meta"), rng.choice(ODD)]  # fmt: skip
        out = io.BytesIO()
        torch.save(rng.choice(things), out, _use_new_zipfile_serialization=rng.random() < 0.7)
        return out.getvalue()

    return make


def as_h5(content: bytes, folder: Path) -> Callable[[random.Random], bytes]:
    """HDF5 files of odd types, shapes, links, filters and attributes; and mangled good ones."""
    path = folder / "made.h5"

    def array(rng: random.Random) -> np.ndarray:
        shape = rng.choice([(5, 6), (1, 5, 6), (5, 2), (0, 6), (0, 0), (), (5,), (1, 1, 5, 6), (5, 0), (2, 5, 6)])
        kind = rng.choice(["f2", "f4", "f8", ">f4", "i4", "u8", "?", "S3", "c8", "V4"])
        return np.zeros(shape, kind)

    def make(rng: random.Random) -> bytes:
        if rng.random() < 0.4:
            return mangled(content, rng)
        with h5py.File(path, "w", libver=rng.choice(["earliest", "latest"])) as file:
            for name in ("features", "coords", *rng.sample(["feats", "coords_patching", ""], 1)):
                _put(file, name, array(rng) if rng.random() < 0.7 else np.zeros((5, 6 if name[:1] == "f" else 2)), rng)
        return path.read_bytes()

    return make


def _put(file: h5py.File, name: str, array: np.ndarray, rng: random.Random) -> None:
    way = rng.random()
    try:
        if way < 0.1:
            file.create_group(name)
        elif way < 0.15:
            file[name] = h5py.SoftLink("/nowhere")
        elif way < 0.2:
            file[name] = h5py.ExternalLink("/etc/passwd", "/x")
        elif way < 0.25:
            file[name] = h5py.SoftLink(f"/{name}")
        elif way < 0.3:
            file.create_dataset(name, (2**33, 6), "f4", chunks=(1, 6))
        elif way < 0.5 and array.shape:
            file.create_dataset(name, data=array, chunks=True, compression=rng.choice(["gzip", "lzf", None]))
        else:
            file[name] = array
        for key in ("patch_size", "target_magnification", "encoder", "patch_size_level0"):
            if rng.random() < 0.3:
                file[name].attrs[key] = rng.choice(
                    [256, 20.5, "conch", b"x\xff", [1, 2], np.nan, "None", h5py.Empty("f4")]
                )
    except (ValueError, TypeError, KeyError, OSError, RuntimeError):
        return  # what the library does not let us write


# ------------------------------------------------------------------------------------------------ readers


def targets(folder: Path) -> list[Target]:
    """Every reader, with made-up files of its format."""
    torch.set_num_threads(1)
    os.environ["STEPH_BUILD"] = str(folder / "build")
    study, real = folder / "torture.yaml", folder / "real"
    build = Workbench(study).study.build
    [run] = (build / "runs").glob("SARC/steph/fold0-*")
    cohort = read_cohort(real / "labels" / "LIHC.csv", "LIHC")
    odd = folder / "odd"
    odd.mkdir(exist_ok=True)
    model, inside = folder / "model", load_model(folder / "model")
    slide = (folder / "slide.h5").read_bytes()
    feature = next(iter(find_slides([real / "features"]).values())).read_bytes()
    manifest = yaml.safe_load((folder / "real.yaml").read_text())
    full = load_study(study).model_dump(mode="json")
    state = (run / "model.safetensors").read_bytes()
    weights = (model / "model.safetensors").read_bytes()
    whole = (real / "stores" / "LIHC.h5").read_bytes()

    def record() -> Any:
        return read_record(run), results(study, current_only=False)

    def blocks_of(path: Path) -> Callable[[], Any]:
        return lambda: (check_slides([path.stem], {path.stem: path}, 6, load_study(study).features), list(blocks(path)))

    def packed() -> Any:
        store = Store.open(odd / "store.h5")
        store.verify()
        return store.bag(store.slide_ids), store.coords_of(store.slide_ids)

    def authors() -> Any:
        return load_splits(cohort, folder / "authors", 2, 0)

    def ours() -> Any:
        (odd / "splits").mkdir(exist_ok=True)
        return load_splits(cohort, odd / "splits", 2, 0)

    def studied() -> Any:
        found = load_study(odd / "study.yaml")
        name = next(iter(found.datasets))
        if found.synthetic is None:
            open_dataset(found, name)
        return found.data, found.build, Workbench(found)

    (odd / "splits").mkdir(exist_ok=True)
    cdr, authors_path = (folder / "cdr.csv").read_bytes(), folder / "authors" / "LIHC" / "splits_0.csv"
    record_json, model_json = (json.loads(path.read_text()) for path in (run / "run.json", model / "config.json"))
    executed = json.loads((folder / "executed.json").read_text())
    book = json.loads((folder / "notebook.ipynb").read_text())
    return [
        Target("record", run / "run.json", record, as_json(record_json, "checksum")),
        Target("completion", folder / "executed.json",
               lambda: notebooks.completion(folder / "executed.ipynb"), as_json(executed, "checksum")),
        Target("notebook", odd / "a.ipynb", lambda: notebooks.declared(odd / "a.ipynb"), as_json(book)),
        Target("model configuration", model / "config.json",
               lambda: read_model(model), as_json(model_json, "checksum")),
        Target("model weights", model / "model.safetensors", lambda: read_model(model), as_safetensors(weights)),
        Target("state", odd / "s.safetensors", lambda: load_state(odd / "s.safetensors"), as_safetensors(state)),
        Target("weights, ours", odd / "w.safetensors",
               lambda: read_weights(odd / "w.safetensors"), as_safetensors(state)),
        Target("weights, released", odd / "w.pth",
               lambda: read_weights(odd / "w.pth"), as_pt((folder / "released.pth").read_bytes())),
        Target("manifest", odd / "study.yaml", studied, as_yaml({**manifest, "name": "odd"})),
        Target("whole manifest", odd / "study.yaml", studied, as_yaml({**full, "name": "odd"})),
        Target("label table", odd / "l.csv",
               lambda: read_cohort(odd / "l.csv", "LIHC"), as_csv((real / "labels" / "LIHC.csv").read_bytes())),
        Target("our splits", odd / "splits" / "LIHC.csv", ours, as_csv((real / "splits" / "LIHC.csv").read_bytes())),
        Target("authors' splits", authors_path, authors, as_csv(authors_path.read_bytes())),
        Target("TCGA-CDR csv", odd / "c.csv", lambda: read_outcomes(odd / "c.csv", "DSS"), as_csv(cdr)),
        Target("TCGA-CDR xlsx", odd / "c.xlsx",
               lambda: read_outcomes(odd / "c.xlsx", "DSS"), as_zip((folder / "cdr.xlsx").read_bytes())),
        Target("slide list", odd / "s.txt",
               lambda: read_slides(odd / "s.txt"), as_csv((folder / "slides.txt").read_bytes())),
        Target("slide list csv", odd / "s.csv", lambda: read_slides(odd / "s.csv"),
               as_csv(b"slide_id,project\nTCGA-AA-A001-01Z-00-DX1,LIHC\nTCGA-AA-A002-01Z-00-DX1,LIHC")),
        Target("slide h5", odd / "f.h5", blocks_of(odd / "f.h5"), as_h5(feature, odd)),
        Target("slide pt", odd / "f.pt", blocks_of(odd / "f.pt"), as_pt((folder / "slide.pt").read_bytes())),
        Target("slide to predict", odd / "p.h5", lambda: inside.predict([odd / "p.h5"]), as_h5(slide, odd)),
        Target("store", odd / "store.h5", packed, lambda rng: mangled(whole, rng)),
    ]  # fmt: skip
