"""The packed store: all patch features of a data set in one file, read through a memory map.

`steph.data.packing` writes it. An HDF5 file, so that any tool can open it, in which every array is contiguous and
uncompressed, so that a slide is a slice of a map and nothing is decoded:

    features (N, D) float16 or float32    all patches, a patient's slides side by side
    coords (N, 2) int32                   level-0 pixels; -1 where the slide's file had none
    slide_ids (S,), offsets (S + 1,)      slide i is features[offsets[i]:offsets[i + 1]]
    sha256 (S, 32)                        of each slide's features and coordinates
    content_sha256 ()                     of all that is above and of the attributes below: the store's fingerprint
    provenance ()                         JSON: source files' names and sizes, what was left out
    attributes                            format, version, encoder, dim, patch_size_px, magnification

float16 halves the disk and the time to read; it rounds to nearest, so a value is off by at most 2^-11 of itself
(0.05 %), or by 2^-25 below 6.1e-5. Values that it cannot hold (above 65,504) are refused.
"""

from __future__ import annotations

import hashlib
import json
import os
import warnings
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import torch
from torch import Tensor

from steph import Refused
from steph.data.cohort import Cohort
from steph.data.features import match_slides
from steph.data.manifest import Features
from steph.files.progress import track
from steph.files.records import fingerprint

FORMAT, VERSION = "steph-store", 1
DTYPES: dict[str, np.dtype] = {"float16": np.dtype("<f2"), "float32": np.dtype("<f4")}
COORDS = np.dtype("<i4")
SLIDE_ID = np.dtype("S255")
"""A slide id is a file name, and those end at 255 bytes."""
AGAIN = "Delete it; `steph data pack` makes it again, or, in a synthetic study, the next run."


@dataclass(frozen=True, eq=False)
class Store:
    """A whole, checked store. slide_ids: S names in file order. offsets: (S + 1,) int64. features, coords: (N, D) and
    (N, 2), read-only maps of the file. fingerprint: SHA-256 of the content, the same whatever files it was packed from.
    description: encoder, dim, patch size, magnification."""

    path: Path
    slide_ids: tuple[str, ...]
    offsets: np.ndarray
    features: np.memmap
    coords: np.memmap
    description: dict[str, Any]
    provenance: dict[str, Any] = field(repr=False)
    hashes: np.ndarray = field(repr=False)
    fingerprint: str
    _compared: set[str] = field(default_factory=set, init=False, repr=False)

    @classmethod
    def open(cls, path: Path) -> Store:
        """Open a store. Raises `Refused` for a missing, truncated, foreign, unfinished or altered file."""
        if not path.is_file():
            raise Refused(f"no feature store at {path}. `steph data pack` makes it from slide feature files.")
        try:
            store = cls._read(path)
        except (OSError, KeyError, ValueError, RuntimeError, TypeError, AttributeError) as error:
            raise Refused(f"{path} is not a whole feature store ({error}). {AGAIN}") from None
        expected = content_hash(store.description, store.dtype, store.slide_ids, store.sizes.tolist(), store.hashes)
        if store.fingerprint != expected:
            raise Refused(f"{path}: slide list, sizes or hashes are not those it was finished with. {AGAIN}")
        return store

    @classmethod
    def _read(cls, path: Path) -> Store:
        with h5py.File(path, "r", locking=False) as file:
            form, version = text(file.attrs.get("format")), file.attrs.get("version")
            if (form, version) != (FORMAT, VERSION):
                raise ValueError(f"format is {form!r}, version {version}, expected {FORMAT!r}, {VERSION}")
            features, coords, offsets = file["features"], file["coords"], file["offsets"][:]
            n_patches, dim = features.shape
            fit = features.dtype in DTYPES.values() and coords.dtype == COORDS and coords.shape == (n_patches, 2)
            if not fit or dim != file.attrs["dim"] or offsets[0] != 0 or offsets[-1] != n_patches:
                raise ValueError("features, coordinates and offsets do not fit each other")
            if any(array.id.get_offset() % array.dtype.itemsize for array in (features, coords)):
                raise ValueError("its arrays are not aligned")
            return cls(
                path=path,
                slide_ids=tuple(name.decode() for name in file["slide_ids"][:].tolist()),
                offsets=offsets,
                features=np.memmap(path, features.dtype, "r", features.id.get_offset(), features.shape),
                coords=np.memmap(path, COORDS, "r", coords.id.get_offset(), coords.shape),
                description={
                    "encoder": str(text(file.attrs["encoder"])),
                    "dim": dim,
                    "patch_size_px": int(file.attrs["patch_size_px"]),
                    "magnification": float(file.attrs["magnification"]),
                },
                provenance=json.loads(file["provenance"][()].decode()),
                hashes=file["sha256"][:],
                fingerprint=file["content_sha256"][()].decode(),
            )

    @property
    def dim(self) -> int:
        """Width of the features."""
        return self.features.shape[1]

    @property
    def dtype(self) -> np.dtype:
        """Precision of the features."""
        return self.features.dtype

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
        Raises `Refused` for a slide that is not what was packed: whoever asks for a slide's rows for the first time has
        them compared with its hash."""
        self._compare(slide for slide in slide_ids if slide not in self._compared)
        joined: list[tuple[int, int]] = []
        for i in (self._index[slide] for slide in slide_ids):
            start, stop = int(self.offsets[i]), int(self.offsets[i + 1])
            if joined and joined[-1][1] == start:
                start = joined.pop()[0]
            joined.append((start, stop))
        return joined

    def prefetch(self, slide_ids: Iterable[str]) -> None:
        """Have the system read these slides from the disk meanwhile. A hint: it may do nothing."""
        width = self.dim * self.dtype.itemsize
        with suppress(OSError, AttributeError), self.path.open("rb") as file:
            for i in (self._index[slide] for slide in slide_ids):
                at, size = self.features.offset + width * int(self.offsets[i]), width * int(self.sizes[i])
                os.posix_fadvise(file.fileno(), at, size, os.POSIX_FADV_WILLNEED)

    def bag(self, slide_ids: Sequence[str]) -> np.ndarray:
        """Features of these slides, (n, D) in the store's precision: a read-only view where they lie side by side, as
        a patient's do, else a copy."""
        return self._rows(self.features, slide_ids)

    def coords_of(self, slide_ids: Sequence[str]) -> np.ndarray:
        """Coordinates of these slides' patches, (n, 2) int32, in the order of `bag`."""
        return self._rows(self.coords, slide_ids)

    def _rows(self, array: np.ndarray, slide_ids: Sequence[str]) -> np.ndarray:
        pieces = [array[start:stop] for start, stop in self.ranges(slide_ids)]
        return pieces[0] if len(pieces) == 1 else np.concatenate(pieces)

    def verify(self) -> None:
        """Read everything and compare it with the hashes. Raises `Refused` naming the slides that are damaged."""
        self._compare(track(self.slide_ids, f"verify {self.path.name}"))

    def _compare(self, slide_ids: Iterable[str]) -> None:
        damaged: list[str] = []
        for slide in slide_ids:
            i = self._index[slide]
            rows = slice(self.offsets[i], self.offsets[i + 1])
            same = slide_hash(self.features[rows], self.coords[rows]) == self.hashes[i].tobytes()
            (self._compared.add if same else damaged.append)(slide)
        if damaged:
            raise Refused(
                f"{self.path}: {len(damaged)} slide(s) are not what was packed: {', '.join(damaged[:10])}. The disk or "
                f"a copy damaged the file. {AGAIN}"
            )

    def matches(
        self, features: Features, cohort: Cohort, files: dict[str, Path] | None, repack: str = "steph data pack"
    ) -> None:
        """Check that the store is the one that the manifest, the cohort and the slide files mean.

        files: `find_slides`' answer; none where the files were removed after packing. Raises `Refused`, with all
        differences and the command `repack`, for another encoder, width, patch size, magnification or precision, for
        slides that the store lacks, and for source files with other names or sizes.
        """
        stored = {**self.description, "precision": self.dtype.name}
        differences = [
            f"{name} is {stored[name]}, the study says {value}"
            for name, value in {**describe(features), "precision": features.precision}.items()
            if stored[name] != value
        ]
        slides = cohort.slides["slide_id"].tolist()
        packed = {row["slide_id"]: row["file"] for row in self.provenance.get("left_out", [])}
        absent = [slide for slide in slides if slide not in self._index and slide not in packed]
        if absent:
            differences.append(f"it lacks {len(absent)} of the table's slides ({', '.join(absent[:5])})")
        packed |= self.provenance.get("files", {})
        matched = match_slides(slides, files or {}).items()
        now = {slide: name_and_size(paths[0]) for slide, paths in matched if len(paths) == 1}
        changed = [
            f"{slide}: now {file}, packed from {packed.get(slide)}"
            for slide, file in now.items()
            if file != packed.get(slide)
        ]
        if changed:
            differences.append(f"{len(changed)} source file(s) differ: {'; '.join(changed[:5])}")
        if differences:
            listed = "\n".join(f"  {line}" for line in differences)
            raise Refused(f"{self.path} was not made from what the study names:\n{listed}\nPack it again: `{repack}`.")


def describe(features: Features) -> dict[str, Any]:
    """What a store says of its features; two stores with different ones are never mixed."""
    values = features.model_dump(include={"encoder", "dim", "patch_size_px", "magnification"})
    return {**values, "magnification": float(features.magnification)}


def text(value: Any) -> Any:
    """An attribute's text, whether HDF5 holds it in a fixed length or not; what is no text, as it is."""
    return value.decode() if isinstance(value, bytes) else value


def name_and_size(path: Path) -> list[Any]:
    """What a store remembers of a file that it was packed from."""
    return [path.name, path.stat().st_size]


def slide_hash(features: np.ndarray, coords: np.ndarray) -> bytes:
    """SHA-256 of a slide's features and coordinates."""
    digests = [hashlib.sha256(np.ascontiguousarray(array).data).digest() for array in (features, coords)]
    return hashlib.sha256(b"".join(digests)).digest()


def content_hash(
    description: dict[str, Any], dtype: np.dtype, slide_ids: Sequence[str], sizes: Sequence[int], hashes: np.ndarray
) -> str:
    """The store's fingerprint. Where the features came from is no part of it."""
    slides = [[slide, n, row.tobytes().hex()] for slide, n, row in zip(slide_ids, sizes, hashes, strict=True)]
    return fingerprint({"version": VERSION, **description, "dtype": dtype.name, "slides": slides}, 64)
