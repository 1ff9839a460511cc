"""The packed store: all patch features of a data set in one file, read through a memory map.

An HDF5 file, so that any tool can open it, in which every array is contiguous and uncompressed, so that a slide is a
slice of a map and nothing is decoded:

    features (N, D) float16 or float32    all patches, a patient's slides side by side
    coords (N, 2) int32                   level-0 pixels; -1 where the slide's file had none
    slide_ids (S,), offsets (S + 1,)      slide i is features[offsets[i]:offsets[i + 1]]
    sha256 (S, 32)                        of each slide's features and coordinates
    content_sha256 ()                     of all that is above and of the attributes below: the store's fingerprint
    provenance ()                         JSON: source files' names and sizes, what was left out
    attributes                            format, version, encoder, dim, patch_size_px, magnification

float16 halves the disk and the time to read; it rounds to nearest, so a value is off by at most 2^-11 of itself
(0.05 %), or by 2^-25 below 6.1e-5. Values that it cannot hold (above 65,504) are refused.

The HDF5 library lays out the whole file first; the arrays are then filled by plain writes at their offsets and the
library's own structures are never touched again. So a packing that is killed leaves a partial file that can be gone
on with: a slide counts as done when its hash stands in the file and its bytes still have that hash.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import Any, BinaryIO

import h5py
import numpy as np
import pandas as pd
import torch
from torch import Tensor

from steph import Refused
from steph.data.cohort import Cohort
from steph.data.features import blocks, check_slides, match_slides, problems_message
from steph.data.manifest import Features
from steph.progress import track
from steph.records import atomic_path, fingerprint

FORMAT, VERSION = "steph-store", 1
DTYPES: dict[str, np.dtype] = {"float16": np.dtype("<f2"), "float32": np.dtype("<f4")}
COORDS = np.dtype("<i4")
SLIDE_ID = np.dtype("S255")
"""A slide id is a file name, and those end at 255 bytes."""
UNAVAILABLE = ("missing", "empty (0 patches)")
"""Problems that `allow_missing` may pass over: there are no features to read. Damaged files are never passed over."""

AGAIN = "Delete it; `steph data pack` makes it again, or, in a synthetic study, the next run."

Piece = tuple[np.ndarray, np.ndarray | None]


# ------------------------------------------------------------------------------------------------ reading


@dataclass(frozen=True, eq=False)
class Store:
    """A whole, checked store. slide_ids: S names in file order. offsets: (S + 1,) int64. fingerprint: SHA-256 of the
    content, the same whatever files it was packed from. description: encoder, dim, patch size, magnification."""

    path: Path
    slide_ids: tuple[str, ...]
    offsets: np.ndarray
    description: dict[str, Any]
    provenance: dict[str, Any] = field(repr=False)
    hashes: np.ndarray = field(repr=False)
    fingerprint: str
    dtype: np.dtype
    features_at: int
    coords_at: int

    @classmethod
    def open(cls, path: Path) -> Store:
        """Open a store. Raises `Refused` for a missing, truncated, foreign, unfinished or altered file."""
        if not path.is_file():
            raise Refused(f"no feature store at {path}. `steph data pack` makes it from slide feature files.")
        try:
            store = cls._read(path)
        except (OSError, KeyError, ValueError, RuntimeError, TypeError, AttributeError) as error:
            raise Refused(f"{path} is not a whole feature store ({error}). {AGAIN}") from None
        expected = _content(store.description, store.dtype, store.slide_ids, store.sizes.tolist(), store.hashes)
        if store.fingerprint != expected:
            raise Refused(
                f"{path}: slide list, sizes or hashes are not those it was finished with (content {expected[:12]}, "
                f"expected {store.fingerprint[:12]!r}). {AGAIN}"
            )
        return store

    @classmethod
    def _read(cls, path: Path) -> Store:
        with h5py.File(path, "r", locking=False) as file:
            if file.attrs.get("format") != FORMAT:
                raise ValueError(f"format is {file.attrs.get('format')!r}, expected {FORMAT!r}")
            if file.attrs["version"] != VERSION:
                raise ValueError(f"version {file.attrs['version']}, expected {VERSION}")
            features, coords, offsets = file["features"], file["coords"], file["offsets"][:]
            ids = tuple(name.decode() for name in file["slide_ids"][:].tolist())
            if features.dtype not in DTYPES.values() or coords.dtype != COORDS:
                raise ValueError(f"features are {features.dtype}, coords {coords.dtype}")
            n_patches, dim = features.shape
            if dim != file.attrs["dim"] or coords.shape != (n_patches, 2):
                raise ValueError(f"features {features.shape} do not fit coords {coords.shape} or the width stated")
            if len(ids) + 1 != len(offsets) or len(set(ids)) != len(ids) or file["sha256"].shape != (len(ids), 32):
                raise ValueError("slide ids, offsets and hashes do not fit each other")
            if offsets[0] != 0 or offsets[-1] != n_patches or not (np.diff(offsets) > 0).all():
                raise ValueError("slide offsets do not rise from 0 to the number of patches")
            size = path.stat().st_size
            for array in (features, coords):
                at = array.id.get_offset()
                if at is None or at % array.dtype.itemsize or at + array.nbytes > size:
                    raise ValueError(f"{array.name} is not one aligned piece within the file's {size} bytes")
            return cls(
                path=path,
                slide_ids=ids,
                offsets=offsets,
                description={
                    "encoder": str(file.attrs["encoder"]),
                    "dim": int(dim),
                    "patch_size_px": int(file.attrs["patch_size_px"]),
                    "magnification": float(file.attrs["magnification"]),
                },
                provenance=json.loads(file["provenance"][()].decode()),
                hashes=file["sha256"][:],
                fingerprint=file["content_sha256"][()].decode(),
                dtype=features.dtype,
                features_at=features.id.get_offset(),
                coords_at=coords.id.get_offset(),
            )

    def __reduce__(self) -> tuple[Any, tuple[Path]]:
        # A map would be pickled as a copy of the whole file; another process opens its own.
        return Store.open, (self.path,)

    @property
    def dim(self) -> int:
        """Width of the features."""
        return int(self.description["dim"])

    @cached_property
    def features(self) -> np.ndarray:
        """(N, D), read-only, mapped: pages are read from disk when they are touched."""
        shape = (int(self.offsets[-1]), self.dim)
        return np.memmap(self.path, self.dtype, "r", self.features_at, shape)

    @cached_property
    def coords(self) -> np.ndarray:
        """(N, 2) int32, read-only, mapped; -1 where a slide's file had no coordinates."""
        return np.memmap(self.path, COORDS, "r", self.coords_at, (int(self.offsets[-1]), 2))

    @cached_property
    def tensor(self) -> Tensor:
        """`features` as a tensor over the same map; it must not be written to."""
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "The given NumPy array is not writable")
            return torch.from_numpy(self.features)

    @cached_property
    def sizes(self) -> np.ndarray:
        """Patches of each slide, (S,) int64."""
        return np.diff(self.offsets)

    @cached_property
    def _index(self) -> dict[str, int]:
        return {slide: i for i, slide in enumerate(self.slide_ids)}

    def __contains__(self, slide_id: str) -> bool:
        return slide_id in self._index

    def ranges(self, slide_ids: Sequence[str]) -> list[tuple[int, int]]:
        """Rows of these slides, in order, as (start, stop) pairs; slides that lie side by side make one pair.
        Raises `Refused` for a slide that the store does not hold."""
        unknown = [slide for slide in slide_ids if slide not in self._index]
        if unknown:
            raise Refused(f"{self.path} holds no slide {', '.join(unknown[:5])}. Pack it again (`steph data pack`).")
        joined: list[tuple[int, int]] = []
        for i in (self._index[slide] for slide in slide_ids):
            start, stop = int(self.offsets[i]), int(self.offsets[i + 1])
            if joined and joined[-1][1] == start:
                start = joined.pop()[0]
            joined.append((start, stop))
        return joined

    def bag(self, slide_ids: Sequence[str]) -> np.ndarray:
        """Features of these slides, (n, D) in the store's precision: a read-only view where the slides lie side by
        side, as a patient's do, else a copy."""
        return self._rows(self.features, slide_ids)

    def coords_of(self, slide_ids: Sequence[str]) -> np.ndarray:
        """Coordinates of these slides' patches, (n, 2) int32, in the order of `bag`."""
        return self._rows(self.coords, slide_ids)

    def _rows(self, array: np.ndarray, slide_ids: Sequence[str]) -> np.ndarray:
        pieces = [array[start:stop] for start, stop in self.ranges(slide_ids)]
        return pieces[0] if len(pieces) == 1 else np.concatenate(pieces)

    def verify(self, progress: bool = False) -> None:
        """Read everything and compare it with the hashes. Raises `Refused` naming the slides that are damaged."""
        slides: Iterable[int] = range(len(self.slide_ids))
        damaged = [
            self.slide_ids[i]
            for i in (track(slides, f"verify {self.path.name}") if progress else slides)
            if _slide_hash(*(a[self.offsets[i] : self.offsets[i + 1]] for a in (self.features, self.coords)))
            != self.hashes[i].tobytes()
        ]
        if damaged:
            raise Refused(
                f"{self.path}: {len(damaged)} slide(s) are not what was packed: {', '.join(damaged[:10])}. The disk or "
                f"a copy damaged the file. {AGAIN}"
            )

    def matches(
        self, features: Features, cohort: Cohort, found: dict[str, Path] | None = None, repack: str = "steph data pack"
    ) -> None:
        """Check that the store is the one that the manifest, the cohort and the slide files mean.

        found: `find_slides`' answer, or None where the files were removed after packing; then only the encoder and
        the slides are compared. Raises `Refused`, with all differences and the command `repack`, for another encoder,
        width, patch size, magnification or precision, for slides that the store lacks, and for source files with
        other names or sizes.
        """
        differences = [
            f"{name} is {self.description[name]}, the study says {value}"
            for name, value in _description(features).items()
            if self.description[name] != value
        ]
        if self.dtype != DTYPES[features.precision]:
            differences.append(f"precision is {self.dtype.name}, the study says {features.precision}")
        wanted = cohort.slides["slide_id"].tolist()
        left_out = {row["slide_id"]: row for row in self.provenance.get("left_out", [])}
        absent = [slide for slide in wanted if slide not in self._index and slide not in left_out]
        if absent:
            differences.append(f"it lacks {len(absent)} of the table's slides ({', '.join(absent[:5])})")
        changed = [] if found is None else list(self._changed_files(wanted, found, left_out))
        if changed:
            differences.append(f"{len(changed)} source file(s) differ: {'; '.join(changed[:5])}")
        if differences:
            listed = "\n".join(f"  {line}" for line in differences)
            raise Refused(f"{self.path} was not made from what the study names:\n{listed}\nPack it again: `{repack}`.")

    def _changed_files(
        self, wanted: list[str], found: dict[str, Path], left_out: dict[str, dict[str, Any]]
    ) -> Iterator[str]:
        files = self.provenance.get("files", {})
        for slide, paths in match_slides(wanted, found).items():
            packed = files.get(slide) or left_out.get(slide, {}).get("file")
            now = _name_and_size(paths[0]) if len(paths) == 1 else None
            if now and packed != now:
                yield f"{slide}: now {now}, packed from {packed}"


def _description(features: Features) -> dict[str, Any]:
    """What a store says of its features; two stores with different ones are never mixed."""
    return {
        "encoder": features.encoder,
        "dim": features.dim,
        "patch_size_px": features.patch_size_px,
        "magnification": float(features.magnification),
    }


def _name_and_size(path: Path) -> list[Any]:
    return [path.name, path.stat().st_size]


# ------------------------------------------------------------------------------------------------ content


def _slide_hash(features: np.ndarray, coords: np.ndarray) -> bytes:
    digests = [hashlib.sha256(np.ascontiguousarray(array).data).digest() for array in (features, coords)]
    return hashlib.sha256(b"".join(digests)).digest()


def _content(
    description: dict[str, Any], dtype: np.dtype, slide_ids: Sequence[str], sizes: Sequence[int], hashes: np.ndarray
) -> str:
    """The store's fingerprint. Where the features came from is no part of it."""
    slides = [[slide, n, row.tobytes().hex()] for slide, n, row in zip(slide_ids, sizes, hashes, strict=True)]
    return fingerprint({"version": VERSION, **description, "dtype": dtype.name, "slides": slides}, 64)


# ------------------------------------------------------------------------------------------------ writing


def write_store(
    path: Path,
    features: Features,
    slides: Iterable[tuple[str, np.ndarray, np.ndarray | None]],
    sizes: Sequence[int],
    provenance: dict[str, Any],
) -> Store:
    """Write a store from arrays. slides: (slide_id, features (N_i, D), coords (N_i, 2) or None), taken one by one, in
    the order of the store; sizes: their N_i. Raises `Refused` where the arrays are not what sizes and `features` say,
    or hold values that are not finite in the store's precision; then nothing is written."""
    sizes = [int(n) for n in sizes]
    with _write_errors(path), atomic_path(path) as temporary:
        _lay_out(temporary, features, sizes, provenance, plan="")
        with temporary.open("rb+") as file:
            writer = _Writer(temporary, file, features, sizes)
            given = iter(slides)
            for i in range(len(sizes)):
                try:
                    slide_id, patches, coords = next(given)
                except StopIteration:
                    raise Refused(f"{path}: {i} slides given, {len(sizes)} sizes.") from None
                writer.add(i, slide_id, [(patches, coords)], f"slide {slide_id}")
            if next(given, None) is not None:
                raise Refused(f"{path}: more slides given than the {len(sizes)} sizes.")
            writer.finish()
    return Store.open(path)


def pack(
    path: Path,
    cohort: Cohort,
    found: dict[str, Path],
    features: Features,
    allow_missing: bool = False,
    progress: bool = True,
) -> Store:
    """Pack slide feature files into a store, slides in the order of the cohort's patients.

    All files are checked first; with a problem in any of them nothing is written and all problems are named. Each file
    is then read once, in blocks. Killed and started again, it goes on behind the slides that were finished, and ends
    with the same content; where the files, their order or `features` have changed, it starts afresh.

    found: slide files by name (`find_slides`). allow_missing: leave out slides that have no file or no patches, as
    long as each patient keeps one; the store records which. Raises `Refused` for unusable files, values that are not
    finite or too large for float16, too little disk space, and while another process packs the same store.
    """
    slide_ids = [slide for slides in cohort.slides_of.values() for slide in slides]
    table = check_slides(slide_ids, found, features.dim, features).set_index("slide_id", drop=False)
    left_out = _left_out(table, cohort, path) if allow_missing else table.iloc[:0]
    usable = table.drop(index=left_out.index)
    if message := problems_message(usable):
        raise Refused(f"{path} was not packed. {message}{_advice(usable, allow_missing)}")
    sources = {slide: Path(source) for slide, source in zip(usable["slide_id"], usable["path"], strict=True)}
    sizes = [int(n) for n in usable["n_patches"]]
    provenance = {
        "files": {slide: _name_and_size(source) for slide, source in sources.items()},
        "left_out": [
            {"slide_id": slide, "reason": reason, "file": None if pd.isna(source) else _name_and_size(Path(source))}
            for slide, reason, source in zip(left_out.index, left_out["problem"], left_out["path"], strict=True)
        ],
    }
    with _partial(path, features, sizes, provenance) as (partial, file):
        writer = _Writer(partial, file, features, sizes)
        done = writer.finished_slides(list(sources), progress)
        todo = [(i, slide) for i, slide in enumerate(sources) if i not in done]
        for i, slide in track(todo, f"pack {path.name}") if progress else todo:
            writer.add(i, slide, blocks(sources[slide]), f"slide {slide} ({sources[slide]})")
        writer.finish()
        if not os.path.samestat(os.fstat(file.fileno()), partial.stat()):
            raise Refused(f"another process has begun to pack other files to {path}; start one packing at a time.")
        partial.replace(path)
    return Store.open(path)


def _left_out(table: pd.DataFrame, cohort: Cohort, path: Path) -> pd.DataFrame:
    """The slides without features. Raises `Refused` where a patient would keep none."""
    without = table[table["problem"].isin(UNAVAILABLE)]
    gone = set(without.index)
    bare = [patient for patient, slides in cohort.slides_of.items() if gone.issuperset(slides)]
    if bare:
        raise Refused(
            f"{path} was not packed: {len(bare)} patient(s) have no slide with features: {', '.join(bare[:20])}"
            f"{' ...' if len(bare) > 20 else ''}. Get their slides, or take these patients out of the label table."
        )
    return without


def _advice(table: pd.DataFrame, allow_missing: bool) -> str:
    if allow_missing or not table["problem"].isin(UNAVAILABLE).any():
        return ""
    return "\nSlides that are missing or empty are left out with `--allow-missing`, as long as each patient keeps one."


@contextmanager
def _partial(
    path: Path, features: Features, sizes: list[int], provenance: dict[str, Any]
) -> Iterator[tuple[Path, BinaryIO]]:
    """The partial file of a store, open for writing and locked: the one of an interrupted packing where its plan was
    the same, else a new one."""
    plan = fingerprint({**_description(features), "precision": features.precision, "sizes": sizes, **provenance}, 64)
    partial = path.with_name(f".{path.name}.partial")
    with _write_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        if not partial.exists() or _plan_of(partial, path) != plan:
            _refuse_full_disk(path.parent, features, sum(sizes))
            with atomic_path(partial) as temporary:
                _lay_out(temporary, features, sizes, provenance, plan)
        with partial.open("rb+") as file:
            _lock(file, path)
            yield partial, file


@contextmanager
def _write_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise Refused(
            f"{path} cannot be written: {error}. Choose another folder (STEPH_DATA), change its rights or free some "
            "space; started again, the packing goes on where it stopped."
        ) from None


def _plan_of(partial: Path, path: Path) -> str | None:
    """What a partial file was to become. Raises `Refused` while another process fills it."""
    with partial.open("rb") as file:
        _lock(file, path)
    try:
        with h5py.File(partial, "r", locking=False) as layout:
            return layout.attrs.get("plan")
    except OSError:
        return None


def _lock(file: BinaryIO, path: Path) -> None:
    """Keep a second process off the file. The lock goes with the process, so a killed one leaves none behind."""
    try:
        import fcntl

        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise Refused(f"another process is packing {path}; wait for it, or stop it, and start again.") from None
    except (ImportError, OSError):
        return  # A file system without locks.


def _refuse_full_disk(folder: Path, features: Features, n_patches: int) -> None:
    needed = n_patches * (features.dim * DTYPES[features.precision].itemsize + 2 * COORDS.itemsize)
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise Refused(
            f"{folder} has {free / 1e9:.1f} GB free, the store needs {needed / 1e9:.1f} GB. Free some, set STEPH_DATA "
            "to a larger disk, or say `precision: float16` in the study's features."
        )


def _lay_out(path: Path, features: Features, sizes: list[int], provenance: dict[str, Any], plan: str) -> None:
    """Make the HDF5 file with all arrays at their final size; features, coords and hashes are filled later."""
    n_patches = sum(sizes)
    if not sizes or min(sizes) < 1:
        raise Refused(f"{path}: a store needs slides, each with at least one patch; got sizes {sizes[:10]}.")
    # Early: the arrays' places in the file are fixed now. Never: their pages are not written twice.
    dcpl = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    dcpl.set_layout(h5py.h5d.CONTIGUOUS)
    dcpl.set_alloc_time(h5py.h5d.ALLOC_TIME_EARLY)
    dcpl.set_fill_time(h5py.h5d.FILL_TIME_NEVER)
    dcpl.set_obj_track_times(False)  # The same content is the same file, byte for byte.
    arrays: dict[str, tuple[tuple[int, ...], np.dtype]] = {
        "sha256": ((len(sizes), 32), np.dtype("u1")),
        "content_sha256": ((), np.dtype("S64")),
        "slide_ids": ((len(sizes),), SLIDE_ID),
        "coords": ((n_patches, 2), COORDS),
        "features": ((n_patches, features.dim), DTYPES[features.precision]),
    }
    # Alignment also keeps a map's values at addresses that processors and PyTorch can read as numbers.
    with h5py.File(path, "w", locking=False, alignment_threshold=1, alignment_interval=4096) as file:
        file.attrs.update({"format": FORMAT, "version": VERSION, "plan": plan})
        file.attrs.update(_description(features))
        file["offsets"] = np.array([0, *accumulate(sizes)], dtype="<i8")
        file["provenance"] = np.bytes_(json.dumps(provenance, sort_keys=True, allow_nan=False).encode())
        for name, (shape, dtype) in arrays.items():
            space = h5py.h5s.create_simple(shape) if shape else h5py.h5s.create(h5py.h5s.SCALAR)
            h5py.h5d.create(file.id, name.encode(), h5py.h5t.py_create(dtype, logical=True), space, dcpl)


class _Writer:
    """Fills a laid out file by plain writes at the arrays' offsets."""

    def __init__(self, path: Path, file: BinaryIO, features: Features, sizes: list[int]) -> None:
        self.path, self.file, self.sizes = path, file, sizes
        self.dim, self.description = features.dim, _description(features)
        self.dtype = DTYPES[features.precision]
        self.offsets = [0, *accumulate(sizes)]
        self.slide_ids = [""] * len(sizes)
        with h5py.File(path, "r", locking=False) as layout:
            self.at = {name: layout[name].id.get_offset() for name in layout}
            self.hashes = layout["sha256"][:]

    def _write(self, name: str, row: int, row_bytes: int, content: Any) -> None:
        self.file.seek(self.at[name] + row * row_bytes)
        self.file.write(content)

    def finished_slides(self, slide_ids: list[str], progress: bool) -> set[int]:
        """The slides that an interrupted packing finished, their bytes checked against their hashes."""
        candidates = np.flatnonzero(self.hashes.any(axis=1)).tolist()
        features = np.memmap(self.path, self.dtype, "r", self.at["features"], (self.offsets[-1], self.dim))
        coords = np.memmap(self.path, COORDS, "r", self.at["coords"], (self.offsets[-1], 2))
        done = set()
        for i in track(candidates, "check what was packed before") if progress and candidates else candidates:
            rows = slice(self.offsets[i], self.offsets[i + 1])
            if _slide_hash(features[rows], coords[rows]) == self.hashes[i].tobytes():
                self.slide_ids[i] = slide_ids[i]
                done.add(i)
        return done

    def add(self, i: int, slide_id: str, pieces: Iterable[Piece], what: str) -> None:
        """Write slide i, given in pieces, and then its hash."""
        if len(slide_id.encode()) > SLIDE_ID.itemsize or slide_id in self.slide_ids:
            raise Refused(f"{what}: the name stands twice or is longer than {SLIDE_ID.itemsize} bytes.")
        row, stop = self.offsets[i], self.offsets[i + 1]
        of_features, of_coords = hashlib.sha256(), hashlib.sha256()
        for patches, coords in pieces:
            if patches.ndim != 2 or patches.shape[1] != self.dim or row + len(patches) > stop:
                raise Refused(f"{what}: features {patches.shape}; expected {self.sizes[i]} patches {self.dim} wide.")
            stored, places = _stored(patches, self.dtype, what), _stored_coords(coords, len(patches), what)
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
        content = _content(self.description, self.dtype, self.slide_ids, self.sizes, self.hashes)
        self._write("content_sha256", 0, 64, content.encode())
        self.file.flush()
        os.fsync(self.file.fileno())


def _stored(patches: np.ndarray, dtype: np.dtype, what: str) -> np.ndarray:
    """Features in the store's precision, rounded to nearest. Raises `Refused` for values that are not finite there."""
    with np.errstate(over="ignore", invalid="ignore"):
        stored = np.ascontiguousarray(patches, dtype=dtype)
    if np.isfinite(stored).all():
        return stored
    bad = int((~np.isfinite(patches)).sum())
    if bad:
        raise Refused(f"{what}: {bad} features are not finite (nan or inf); extract the slide again.")
    raise Refused(
        f"{what}: features up to {np.abs(patches).max():.3g} are too large for {dtype.name}; say `precision: float32` "
        "in the study's features, or check the encoder."
    )


def _stored_coords(coords: np.ndarray | None, n: int, what: str) -> np.ndarray:
    if coords is None:
        return np.full((n, 2), -1, dtype=COORDS)
    if coords.shape != (n, 2):
        raise Refused(f"{what}: coords {coords.shape}, expected ({n}, 2).")
    limits = np.iinfo(COORDS)
    if coords.size and (coords.min() < limits.min or coords.max() > limits.max):
        raise Refused(f"{what}: coords beyond the range of level-0 pixels (32 bits).")
    return np.ascontiguousarray(coords, dtype=COORDS)
