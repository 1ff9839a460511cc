"""Packing: slide feature files become one store (`steph.data.store`).

The HDF5 library lays out the whole file first; the arrays are then filled by plain writes at their offsets and the
library's own structures are never touched again. So a packing that is killed leaves a partial file that can be gone
on with: a slide counts as done when its hash stands in the file and its bytes still have that hash.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from itertools import accumulate
from pathlib import Path
from typing import Any, BinaryIO

import h5py
import numpy as np
import pandas as pd

from steph import Refused
from steph.data.cohort import Cohort
from steph.data.features import check_slides, open_slide, problems_message
from steph.data.manifest import Features
from steph.data.store import (
    COORDS,
    DTYPES,
    FORMAT,
    SLIDE_ID,
    VERSION,
    Store,
    content_hash,
    describe,
    name_and_size,
    slide_hash,
    text,
)
from steph.files.atomic import atomic_path, disk_errors, in_words, refuse_full_disk
from steph.files.lock import exclusive
from steph.files.progress import track
from steph.files.records import fingerprint
from steph.files.tables import shortened

UNAVAILABLE = ("missing", "empty (0 patches)")
"""Problems that `allow_missing` may pass over: there are no features to read. Damaged files are never passed over."""


def write_store(
    path: Path,
    features: Features,
    slides: Iterable[tuple[str, np.ndarray, np.ndarray | None]],
    sizes: Sequence[int],
    provenance: dict[str, Any],
) -> Store:
    """Write a store from arrays. slides: (slide_id, features (N_i, D), coords (N_i, 2) or None), taken one by one, in
    the order of the store; sizes: their N_i. Raises `Refused` where an array is not what its size and `features` say,
    or holds values that are not finite in the store's precision; then nothing is written."""
    sizes = [int(n) for n in sizes]
    _refuse_full_disk(path, features, sizes)
    with atomic_path(path) as temporary:
        _lay_out(temporary, features, sizes, provenance, plan="")
        with temporary.open("rb+") as file:
            writer = _Writer(temporary, file, features, sizes)
            for i, ((slide_id, patches, coords), _) in enumerate(zip(slides, sizes, strict=True)):
                writer.add(i, slide_id, [(patches, coords)], f"slide {slide_id}")
            writer.finish()
    return Store.open(path)


def pack(path: Path, cohort: Cohort, files: dict[str, Path], features: Features, allow_missing: bool = False) -> Store:
    """Pack slide feature files into a store, slides in the order of the cohort's patients.

    All files are checked first; with a problem in any of them nothing is written and all problems are named. Each file
    is then read once, in blocks. Killed and started again, it goes on behind the slides that were finished, and ends
    with the same content; where the files, their order or `features` have changed, it starts afresh.

    files: slide files by name (`find_slides`). allow_missing: leave out slides that have no file or no patches, as
    long as each patient keeps one; the store records which. Raises `Refused` for unusable files, values that are not
    finite or too large for float16, too little disk space, and while another process packs the same store.
    """
    slide_ids = [slide for slides in cohort.slides_of.values() for slide in slides]
    table = check_slides(slide_ids, files, features).set_index("slide_id", drop=False)
    unavailable = table["problem"].isin(UNAVAILABLE)
    left_out = table[unavailable & allow_missing]
    bare = [patient for patient, slides in cohort.slides_of.items() if set(left_out.index).issuperset(slides)]
    if bare:
        raise Refused(
            f"{path} was not packed: {len(bare)} patient(s) have no slide with features: {shortened(bare, 20)}. Get "
            "their slides, or take these patients out of the label table."
        )
    usable = table.drop(index=left_out.index)
    if message := problems_message(usable):
        hint = (
            "\nSlides that are missing or empty are left out with `--allow-missing`, as long as each patient keeps one."
        )
        raise Refused(f"{path} was not packed. {message}{hint if unavailable.any() and not allow_missing else ''}")
    sources = {slide: Path(source) for slide, source in zip(usable["slide_id"], usable["path"], strict=True)}
    sizes = [int(n) for n in usable["n_patches"]]
    provenance = {
        "files": {slide: name_and_size(source) for slide, source in sources.items()},
        "left_out": [
            {"slide_id": slide, "reason": reason, "file": None if pd.isna(source) else name_and_size(Path(source))}
            for slide, reason, source in zip(left_out.index, left_out["problem"], left_out["path"], strict=True)
        ],
    }
    with _partial(path, features, sizes, provenance) as (partial, file):
        writer = _Writer(partial, file, features, sizes)
        done = writer.finished_slides(list(sources))
        todo = [(i, slide) for i, slide in enumerate(sources) if i not in done]
        for i, slide in track(todo, f"pack {path.name}"):
            with open_slide(sources[slide]) as source:
                writer.add(i, slide, source.blocks(), f"slide {slide} ({sources[slide]})")
        writer.finish()
        partial.replace(path)
    return Store.open(path)


@contextmanager
def _partial(
    path: Path, features: Features, sizes: list[int], provenance: dict[str, Any]
) -> Iterator[tuple[Path, BinaryIO]]:
    """The partial file of a store, open for writing and locked: the one of an interrupted packing where its plan was
    the same, else a new one."""
    plan = fingerprint({**describe(features), "precision": features.precision, "sizes": sizes, **provenance}, 64)
    partial, same = partial_of(path), False
    busy = f"another process is packing {path}; wait for it, or stop it, and start again."
    with exclusive(path, busy), disk_errors(path):
        with suppress(OSError, UnicodeDecodeError), h5py.File(partial, "r", locking=False) as layout:
            same = text(layout.attrs.get("plan")) == plan
        if not same:
            partial.unlink(missing_ok=True)
        _refuse_full_disk(path, features, sizes)
        if not partial.is_file():
            with atomic_path(partial) as temporary:
                _lay_out(temporary, features, sizes, provenance, plan)
        with partial.open("rb+") as file:
            yield partial, file


def partial_of(path: Path) -> Path:
    """Where a store lies while it is packed."""
    return path.with_name(f".{path.name}.partial")


def _refuse_full_disk(path: Path, features: Features, sizes: list[int]) -> None:
    partial = partial_of(path)
    per_patch = features.dim * DTYPES[features.precision].itemsize + 2 * COORDS.itemsize
    size = sum(sizes) * per_patch + len(sizes) * (SLIDE_ID.itemsize + 200) + 2**16
    # What is laid out and not yet filled takes no room.
    written = min(partial.stat().st_blocks * 512, partial.stat().st_size) if partial.is_file() else 0
    what = f"{path} ({in_words(size)}, of which {in_words(written)} are written)"
    advice = ", or say `precision: float16` in the study's features"
    refuse_full_disk(path.parent, size - written, what, advice)


def _lay_out(path: Path, features: Features, sizes: list[int], provenance: dict[str, Any], plan: str) -> None:
    """Make the HDF5 file with all arrays at their final size; features, coords and hashes are filled later."""
    n_patches = sum(sizes)
    # Early: the arrays' places in the file are fixed now. Never: their pages are not written twice.
    dcpl = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    dcpl.set_layout(h5py.h5d.CONTIGUOUS)
    dcpl.set_alloc_time(h5py.h5d.ALLOC_TIME_EARLY)
    dcpl.set_fill_time(h5py.h5d.FILL_TIME_NEVER)
    dcpl.set_obj_track_times(False)  # The same content is the same file, byte for byte.
    arrays = {
        "sha256": ((len(sizes), 32), np.dtype("u1")),
        "content_sha256": ((), np.dtype("S64")),
        "slide_ids": ((len(sizes),), SLIDE_ID),
        "coords": ((n_patches, 2), COORDS),
        "features": ((n_patches, features.dim), DTYPES[features.precision]),
    }
    # Alignment also keeps a map's values at addresses that processors and PyTorch can read as numbers.
    with h5py.File(path, "w", locking=False, alignment_threshold=1, alignment_interval=4096) as file:
        # Text of a fixed length: for any other, HDF5 follows pointers through the file, and in a damaged one for ever.
        attributes = {"format": FORMAT, "version": VERSION, "plan": plan, **describe(features)}
        file.attrs.update({k: np.bytes_(v.encode()) if isinstance(v, str) and v else v for k, v in attributes.items()})
        file["offsets"] = np.array([0, *accumulate(sizes)], dtype="<i8")
        file["provenance"] = np.bytes_(json.dumps(provenance, sort_keys=True, allow_nan=False).encode())
        for name, (shape, dtype) in arrays.items():
            space = h5py.h5s.create_simple(shape) if shape else h5py.h5s.create(h5py.h5s.SCALAR)
            h5py.h5d.create(file.id, name.encode(), h5py.h5t.py_create(dtype, logical=True), space, dcpl)


class _Writer:
    """Fills a laid out file by plain writes at the arrays' offsets."""

    def __init__(self, path: Path, file: BinaryIO, features: Features, sizes: list[int]) -> None:
        self.path, self.file, self.sizes = path, file, sizes
        self.dim, self.description = features.dim, describe(features)
        self.dtype = DTYPES[features.precision]
        self.offsets = [0, *accumulate(sizes)]
        self.slide_ids = [""] * len(sizes)
        with h5py.File(path, "r", locking=False) as layout:
            self.at = {name: layout[name].id.get_offset() for name in layout}
            self.hashes = layout["sha256"][:]

    def _write(self, name: str, row: int, row_bytes: int, content: Any) -> None:
        self.file.seek(self.at[name] + row * row_bytes)
        self.file.write(content)

    def finished_slides(self, slide_ids: list[str]) -> set[int]:
        """The slides that an interrupted packing finished, their bytes checked against their hashes."""
        candidates = np.flatnonzero(self.hashes.any(axis=1)).tolist()
        features = np.memmap(self.path, self.dtype, "r", self.at["features"], (self.offsets[-1], self.dim))
        coords = np.memmap(self.path, COORDS, "r", self.at["coords"], (self.offsets[-1], 2))
        done = set()
        for i in track(candidates, "check what was packed before") if candidates else ():
            rows = slice(self.offsets[i], self.offsets[i + 1])
            if slide_hash(features[rows], coords[rows]) == self.hashes[i].tobytes():
                self.slide_ids[i] = slide_ids[i]
                done.add(i)
        return done

    def add(self, i: int, slide_id: str, pieces: Iterable[tuple[np.ndarray, np.ndarray | None]], what: str) -> None:
        """Write slide i, given in pieces, and then its hash."""
        if slide_id in self.slide_ids:
            raise Refused(f"{what}: the name stands twice.")
        row, stop = self.offsets[i], self.offsets[i + 1]
        of_features, of_coords = hashlib.sha256(), hashlib.sha256()
        for patches, coords in pieces:
            if patches.ndim != 2 or patches.shape[1] != self.dim or row + len(patches) > stop:
                raise Refused(f"{what}: features {patches.shape}; expected {self.sizes[i]} patches {self.dim} wide.")
            stored, places = stored_features(patches, self.dtype, what), _stored_coords(coords, len(patches), what)
            self._write("features", row, self.dim * self.dtype.itemsize, stored)
            self._write("coords", row, 2 * COORDS.itemsize, places)
            of_features.update(stored.data)
            of_coords.update(places.data)
            row += len(patches)
        if row != stop:
            raise Refused(f"{what}: {row - self.offsets[i]} patches; expected {self.sizes[i]}.")
        digest = hashlib.sha256(of_features.digest() + of_coords.digest()).digest()
        self.hashes[i] = np.frombuffer(digest, np.uint8)
        self.slide_ids[i] = slide_id
        self.file.flush()  # The hash comes after what it stands for.
        self._write("sha256", i, 32, digest)
        self.file.flush()

    def finish(self) -> None:
        """Write the slide list and the content's hash, and bring everything to the disk."""
        names = np.array([slide.encode() for slide in self.slide_ids], dtype=SLIDE_ID)
        self._write("slide_ids", 0, SLIDE_ID.itemsize, names)
        content = content_hash(self.description, self.dtype, self.slide_ids, self.sizes, self.hashes)
        self._write("content_sha256", 0, 64, content.encode())
        self.file.flush()
        os.fsync(self.file.fileno())


def stored_features(patches: np.ndarray, dtype: np.dtype, what: str) -> np.ndarray:
    """Features in the store's precision, rounded to nearest. Raises `Refused` for values that are not finite there."""
    with np.errstate(over="ignore", invalid="ignore"):
        stored = np.ascontiguousarray(patches, dtype=dtype)
    if np.isfinite(stored).all():
        return stored
    bad = int((~np.isfinite(patches)).sum())
    if bad:
        raise Refused(f"{what}: {bad} features are not finite (nan or inf); extract the slide again.")
    raise Refused(
        f"{what}: features up to {np.abs(patches).max():.3g} are too large for {dtype.name}; check the encoder, or "
        "say `precision: float32` in the study's features."
    )


def _stored_coords(coords: np.ndarray | None, n: int, what: str) -> np.ndarray:
    if coords is None:
        return np.full((n, 2), -1, dtype=COORDS)
    limits = np.iinfo(COORDS)
    if coords.size and (coords.min() < limits.min or coords.max() > limits.max):
        raise Refused(f"{what}: coords beyond the range of level-0 pixels (32 bits).")
    return np.ascontiguousarray(coords, dtype=COORDS)
