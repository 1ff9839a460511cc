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
from collections.abc import Iterable, Iterator, Sequence
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
        expected = content_hash(store.description, store.dtype, store.slide_ids, store.sizes.tolist(), store.hashes)
        if store.fingerprint != expected:
            raise Refused(
                f"{path}: slide list, sizes or hashes are not those it was finished with (content {expected[:12]}, "
                f"expected {store.fingerprint[:12]!r}). {AGAIN}"
            )
        return store

    @classmethod
    def _read(cls, path: Path) -> Store:
        with h5py.File(path, "r", locking=False) as file:
            form = text(file.attrs.get("format"))
            if form != FORMAT:
                raise ValueError(f"format is {form!r}, expected {FORMAT!r}")
            if file.attrs["version"] != VERSION:
                raise ValueError(f"version {file.attrs['version']}, expected {VERSION}")
            features, coords, offsets = file["features"], file["coords"], file["offsets"][:]
            ids = tuple(name.decode() for name in file["slide_ids"][:].tolist())
            if features.dtype not in DTYPES.values() or coords.dtype != COORDS:
                raise ValueError(f"features are {features.dtype}, coords {coords.dtype}")
            n_patches, dim = features.shape
            if dim != file.attrs["dim"] or coords.shape != (n_patches, 2):
                raise ValueError(f"features {features.shape} do not fit coords {coords.shape} or the width stated")
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
                    "encoder": str(text(file.attrs["encoder"])),
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
        Raises `Refused` for a slide that is not what was packed: whoever asks for a slide's rows for the first time has
        them compared with its hash."""
        self._compare([slide for slide in slide_ids if slide not in self._compared])
        joined: list[tuple[int, int]] = []
        for i in (self._index[slide] for slide in slide_ids):
            start, stop = int(self.offsets[i]), int(self.offsets[i + 1])
            if joined and joined[-1][1] == start:
                start = joined.pop()[0]
            joined.append((start, stop))
        return joined

    def prefetch(self, slide_ids: Iterable[str]) -> None:
        """Have the system read these slides from the disk meanwhile, as they are asked for soon. A hint: where there is
        no such thing, nothing happens."""
        width = self.dim * self.dtype.itemsize
        with suppress(OSError, AttributeError), self.path.open("rb") as file:
            for i in (self._index[slide] for slide in slide_ids):
                start, stop = (self.features_at + width * int(at) for at in self.offsets[i : i + 2])
                os.posix_fadvise(file.fileno(), start, stop - start, os.POSIX_FADV_WILLNEED)

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

    def verify(self) -> None:
        """Read everything and compare it with the hashes. Raises `Refused` naming the slides that are damaged."""
        self._compare(track(self.slide_ids, f"verify {self.path.name}"))

    @cached_property
    def _compared(self) -> set[str]:
        """Slides that were compared with their hashes since the store was opened."""
        return set()

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
        self, features: Features, cohort: Cohort, files: dict[str, Path] | None = None, repack: str = "steph data pack"
    ) -> None:
        """Check that the store is the one that the manifest, the cohort and the slide files mean.

        files: `find_slides`' answer, or None where the files were removed after packing; then only the encoder and
        the slides are compared. Raises `Refused`, with all differences and the command `repack`, for another encoder,
        width, patch size, magnification or precision, for slides that the store lacks, and for source files with
        other names or sizes.
        """
        differences = [
            f"{name} is {self.description[name]}, the study says {value}"
            for name, value in describe(features).items()
            if self.description[name] != value
        ]
        if self.dtype != DTYPES[features.precision]:
            differences.append(f"precision is {self.dtype.name}, the study says {features.precision}")
        slides = cohort.slides["slide_id"].tolist()
        left_out = {row["slide_id"]: row for row in self.provenance.get("left_out", [])}
        absent = [slide for slide in slides if slide not in self._index and slide not in left_out]
        if absent:
            differences.append(f"it lacks {len(absent)} of the table's slides ({', '.join(absent[:5])})")
        changed = [] if files is None else list(self._changed_files(slides, files, left_out))
        if changed:
            differences.append(f"{len(changed)} source file(s) differ: {'; '.join(changed[:5])}")
        if differences:
            listed = "\n".join(f"  {line}" for line in differences)
            raise Refused(f"{self.path} was not made from what the study names:\n{listed}\nPack it again: `{repack}`.")

    def _changed_files(
        self, slides: list[str], files: dict[str, Path], left_out: dict[str, dict[str, Any]]
    ) -> Iterator[str]:
        for slide, paths in match_slides(slides, files).items():
            packed = self.provenance.get("files", {}).get(slide) or left_out.get(slide, {}).get("file")
            now = name_and_size(paths[0]) if len(paths) == 1 else None
            if now and packed != now:
                yield f"{slide}: now {now}, packed from {packed}"


def describe(features: Features) -> dict[str, Any]:
    """What a store says of its features; two stores with different ones are never mixed."""
    return {
        "encoder": features.encoder,
        "dim": features.dim,
        "patch_size_px": features.patch_size_px,
        "magnification": float(features.magnification),
    }


def text(value: Any) -> Any:
    """An attribute's text, whether HDF5 holds it in a fixed length or not; what is no text, as it is."""
    return value.decode() if isinstance(value, bytes) else value


def name_and_size(path: Path) -> list[Any]:
    """What a store remembers of a file that it was packed from."""
    return [path.name, path.stat().st_size]


# ------------------------------------------------------------------------------------------------ content


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
