"""Packing: slide feature files become one store (`steph.data.store`).

The HDF5 library lays out the whole file first; the arrays are then filled by plain writes at their offsets and the
library's own structures are never touched again. So a packing that is killed leaves a partial file that can be gone
on with: a slide counts as done when its hash stands in the file and its bytes still have that hash.
"""

import hashlib
import json
import os
from collections.abc import Iterable
from contextlib import suppress
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
    NO_COORDS,
    SLIDE_ID,
    VERSION,
    Store,
    describe,
    name_and_size,
    slide_hash,
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
    slides: Iterable[tuple[np.ndarray, np.ndarray | None]],
    sizes: dict[str, int],
    provenance: dict[str, Any],
) -> Store:
    """Write a store from arrays. slides: features (N_i, D) and coords (N_i, 2) or None of each slide, taken one by one;
    sizes: their names and N_i, in the same order. Raises `Refused` where an array is not what its size and `features`
    say, or holds values that are not finite in the store's precision; then nothing is written."""
    _refuse_full_disk(path, features, sizes)
    with atomic_path(path) as temporary:
        _lay_out(temporary, features, sizes, provenance)
        with temporary.open("rb+") as file:
            writer = _Writer(temporary, file)
            for slide, (patches, coords) in zip(sizes, slides, strict=True):
                writer.add(slide, patches.shape, [(patches, coords)], f"slide {slide}")
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
    left_out = table[table["problem"].isin(UNAVAILABLE) & allow_missing]
    bare = [patient for patient, slides in cohort.slides_of.items() if set(left_out.index).issuperset(slides)]
    if bare:
        raise Refused(
            f"{path} was not packed: {len(bare)} patient(s) have no slide with features: {shortened(bare, 20)}. Get "
            "their slides, or take these patients out of the label table."
        )
    usable = table.drop(index=left_out.index)
    if message := problems_message(usable):
        hint = (
            "Slides that are missing or empty are left out with `--allow-missing`, as long as each patient keeps one."
        )
        hint = f"\n{hint}" if usable["problem"].isin(UNAVAILABLE).any() else ""
        raise Refused(f"{path} was not packed. {message}{hint}")
    sources = {str(slide): Path(source) for slide, source in usable["path"].items()}
    sizes = {str(slide): int(n) for slide, n in usable["n_patches"].items()}
    provenance = {
        "files": {slide: name_and_size(source) for slide, source in sources.items()},
        "left_out": [
            {"slide_id": slide, "reason": reason, "file": name_and_size(Path(source)) if pd.notna(source) else None}
            for slide, source, _, reason in left_out.itertuples(index=False)
        ],
    }
    busy = f"another process is packing {path}; wait for it, or stop it, and start again."
    with exclusive(path, busy), disk_errors(path):
        partial = _partial(path, features, sizes, provenance)
        with partial.open("rb+") as file:
            writer = _Writer(partial, file)
            done = writer.finished_slides()
            for slide in track([slide for slide in sizes if slide not in done], f"pack {path.name}"):
                with open_slide(sources[slide]) as source:
                    shape = source.n_patches, source.dim
                    writer.add(slide, shape, source.blocks(), f"slide {slide} ({sources[slide]})")
            writer.finish()
        partial.replace(path)
    return Store.open(path)


def _partial(path: Path, features: Features, sizes: dict[str, int], provenance: dict[str, Any]) -> Path:
    """The partial file of a store: that of an interrupted packing where its plan was the same, else a new one."""
    partial, plan = _partial_of(path), None
    with suppress(OSError), h5py.File(partial, "r", locking=False) as layout:
        plan = layout.attrs.get("plan")
    if plan != _plan(features, sizes, provenance):
        partial.unlink(missing_ok=True)
    _refuse_full_disk(path, features, sizes)
    if not partial.is_file():
        with atomic_path(partial) as temporary:
            _lay_out(temporary, features, sizes, provenance)
    return partial


def _partial_of(path: Path) -> Path:
    return path.with_name(f".{path.name}.partial")


def _plan(features: Features, sizes: dict[str, int], provenance: dict[str, Any]) -> bytes:
    what = {**describe(features), "precision": features.precision, "sizes": list(sizes.items()), **provenance}
    return fingerprint(what, 64).encode()


def _refuse_full_disk(path: Path, features: Features, sizes: dict[str, int]) -> None:
    partial = _partial_of(path)
    per_patch = features.dim * DTYPES[features.precision].itemsize + 2 * COORDS.itemsize
    size = sum(sizes.values()) * per_patch + len(sizes) * (SLIDE_ID.itemsize + 200) + 2**16
    # What is laid out and not yet filled takes no room.
    written = min(partial.stat().st_blocks * 512, partial.stat().st_size) if partial.is_file() else 0
    what = f"{path} ({in_words(size)}, of which {in_words(written)} are written)"
    advice = ", or say `precision: float16` in the study's features"
    refuse_full_disk(path.parent, size - written, what, advice)


def _lay_out(path: Path, features: Features, sizes: dict[str, int], provenance: dict[str, Any]) -> None:
    """Make the HDF5 file with all arrays at their final size; features, coords and hashes are filled later."""
    # Early: the arrays' places in the file are fixed now. Never: their pages are not written twice.
    early, n_patches = h5py.h5p.create(h5py.h5p.DATASET_CREATE), sum(sizes.values())
    early.set_alloc_time(h5py.h5d.ALLOC_TIME_EARLY)
    early.set_fill_time(h5py.h5d.FILL_TIME_NEVER)
    # Alignment also keeps a map's values at addresses that processors and PyTorch can read as numbers.
    with h5py.File(path, "w", locking=False, alignment_threshold=1, alignment_interval=4096) as file:
        # Text of a fixed length: for any other, HDF5 follows pointers through the file, and in a damaged one for ever.
        description = {key: np.bytes_(v.encode()) if isinstance(v, str) else v for key, v in describe(features).items()}
        plan = np.bytes_(_plan(features, sizes, provenance))
        file.attrs.update({"format": np.bytes_(FORMAT), "version": VERSION, "plan": plan, **description})
        file["offsets"] = np.array([0, *accumulate(sizes.values())], dtype="<i8")
        file["slide_ids"] = np.array([slide.encode() for slide in sizes], dtype=SLIDE_ID)
        file["provenance"] = np.bytes_(json.dumps(provenance, sort_keys=True, allow_nan=False).encode())
        file["content_sha256"] = np.bytes_(b"-" * 64)  # `_Writer.finish` knows it.
        file.create_dataset("sha256", (len(sizes), 32), "u1", dcpl=early)
        file.create_dataset("coords", (n_patches, 2), COORDS, dcpl=early)
        file.create_dataset("features", (n_patches, features.dim), DTYPES[features.precision], dcpl=early)


class _Writer:
    """Fills a store that is laid out, by plain writes at its arrays' offsets."""

    def __init__(self, path: Path, file: BinaryIO) -> None:
        self.store, self.file = Store.read(path), file
        with h5py.File(path, "r", locking=False) as layout:
            self.at = {name: layout[name].id.get_offset() for name in layout}

    def _write(self, name: str, at: int, content: Any) -> None:
        self.file.seek(self.at[name] + at)
        self.file.write(content)

    def finished_slides(self) -> set[str]:
        """The slides that an interrupted packing finished, their bytes checked against their hashes."""
        begun = [slide for slide, (i, _) in self.store.places.items() if self.store.hashes[i].any()]
        checked = track(begun, "check what was packed before") if begun else ()
        return {slide for slide in checked if self.store.is_intact(slide)}

    def add(
        self,
        slide: str,
        shape: tuple[int, ...],
        pieces: Iterable[tuple[np.ndarray, np.ndarray | None]],
        what: str,
    ) -> None:
        """Write a slide of a shape, given in pieces, and then its hash."""
        store, (i, rows) = self.store, self.store.places[slide]
        if shape != (store.sizes[slide], store.dim):
            raise Refused(f"{what}: features {shape}; expected {store.sizes[slide]} patches {store.dim} wide.")
        row, digests = rows.start, (hashlib.sha256(), hashlib.sha256())
        for patches, coords in pieces:
            stored = stored_features(patches, store.dtype, what), _stored_coords(coords, len(patches), what)
            for name, array, digest in zip(("features", "coords"), stored, digests, strict=True):
                self._write(name, row * array.shape[1] * array.itemsize, array)
                digest.update(array.data)
            row += len(patches)
        store.hashes[i] = np.frombuffer(slide_hash(*digests), np.uint8)
        self.file.flush()  # The hash comes after what it stands for.
        self._write("sha256", 32 * i, store.hashes[i])
        self.file.flush()

    def finish(self) -> None:
        """Write the content's hash, and bring everything to the disk."""
        self._write("content_sha256", 0, self.store.content_hash().encode())
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
        return np.full((n, 2), NO_COORDS, dtype=COORDS)
    limits = np.iinfo(COORDS)
    if coords.size and (coords.min() < limits.min or coords.max() > limits.max):
        raise Refused(f"{what}: coords beyond the range of level-0 pixels (32 bits).")
    return np.ascontiguousarray(coords, dtype=COORDS)
