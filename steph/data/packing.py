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
from steph.data.features import open_slide
from steph.data.manifest import Features
from steph.data.preflight import DISPENSABLE, Blocks, check_slides, checked, problems_message
from steph.data.store import (
    COORDS,
    DTYPES,
    FORMAT,
    NO_COORDS,
    SLIDE_ID,
    VERSION,
    Store,
    describe,
    slide_hash,
    source_of,
)
from steph.files.atomic import atomic_path, disk_errors, in_words, refuse_full_disk
from steph.files.lock import exclusive
from steph.files.progress import track
from steph.files.records import fingerprint
from steph.files.tables import shortened

HINT = "Slides that are missing, empty or bad in content `--allow-missing` leaves out, where each patient keeps one."


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
                writer.add(slide, patches.shape, [(patches, coords)])
            writer.finish()
    return Store.open(path)


def pack(
    path: Path, cohort: Cohort, files: dict[str, Path], features: Features, allow_missing: bool = False, study: str = ""
) -> Store:
    """Pack slide feature files into a store, slides in the order of the cohort's patients.

    All files' headers are checked first; with a problem in any of them nothing is written and all problems are named.
    Each file is then read once, in blocks, and all whose content cannot be used are named at the end. Killed and
    started again, it goes on behind the slides that were finished, and ends with the same content; where the files,
    their order or `features` have changed, it starts afresh.

    files: slide files by name (`find_slides`). allow_missing: leave out `DISPENSABLE` slides, as long as each patient
    keeps one; all are read for that first, and the store records which. study: the one that asks. Raises `Refused` for
    unusable files, too little disk space, and while another process packs the same store.
    """
    slide_ids = [slide for slides in cohort.slides_of.values() for slide in slides]
    table = check_slides(slide_ids, files, features, content=allow_missing).set_index("slide_id", drop=False)
    left_out = table[table["problem"].str.fullmatch(DISPENSABLE) & allow_missing]
    bare = [patient for patient, slides in cohort.slides_of.items() if set(left_out.index).issuperset(slides)]
    if bare:
        raise Refused(
            f"{path} was not packed: {len(bare)} patient(s) have no slide with features: {shortened(bare, 20)}. Get "
            "their slides (`steph data check` tells what is wrong), or take these patients out of the label table."
        )
    usable = table.drop(index=left_out.index)
    if message := problems_message(usable):
        raise Refused(f"{path} was not packed. {message}\n{HINT}")
    sources = {str(slide): Path(source) for slide, source in usable["path"].items()}
    sizes = {str(slide): int(n) for slide, n in usable["n_patches"].items()}
    provenance: dict[str, Any] = {
        "files": {slide: source_of(source) for slide, source in sources.items()},
        "content": {str(slide): stamp for slide, stamp in usable["stamp"].items()},
        "study": study,
        "asked": features.model_dump(exclude={"encoder_aliases"}),
        "left_out": [
            {"slide_id": slide, "reason": reason, "file": source_of(Path(source)) if pd.notna(source) else None}
            for slide, source, reason in left_out[["slide_id", "path", "problem"]].itertuples(index=False)
        ],
    }
    busy = f"another process is packing {path}; wait for it, or stop it, and start again."
    with exclusive(path, busy), disk_errors(path):
        partial = _partial(path, features, sizes, provenance)
        with partial.open("rb+") as file:
            writer = _Writer(partial, file)
            done = writer.finished_slides()
            for slide in track([slide for slide in sizes if slide not in done], f"pack {path.name}"):
                try:
                    with open_slide(sources[slide]) as source:
                        writer.add(slide, (source.n_patches, source.dim), source.blocks())
                except Refused as reason:
                    usable.loc[slide, "problem"] = str(reason)
            if message := problems_message(usable):
                raise Refused(f"{path} was not packed. {message}\n{HINT}")
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
    """What decides a store's content. Where and how old its files are does not: a copy of them goes on as well."""
    made_from = {key: value for key, value in provenance.items() if key != "files"}
    what = {**describe(features), "precision": features.precision, "sizes": list(sizes.items()), **made_from}
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

    def add(self, slide: str, shape: tuple[int, ...], blocks: Blocks) -> None:
        """Write a slide of a shape, given in blocks, and then its hash. Raises `Refused` for what cannot be used."""
        store, (i, rows) = self.store, self.store.places[slide]
        if shape != (store.sizes[slide], store.dim):
            raise Refused(f"slide {slide}: features {shape}; expected {store.sizes[slide]} patches {store.dim} wide")
        row, digests = rows.start, (hashlib.sha256(), hashlib.sha256())
        for patches, coords in checked(blocks, store.dtype):
            places = np.full((len(patches), 2), NO_COORDS) if coords is None else coords
            with np.errstate(over="ignore", invalid="ignore"):  # what this spoils is refused at the end
                stored = np.ascontiguousarray(patches, store.dtype), np.ascontiguousarray(places, COORDS)
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
