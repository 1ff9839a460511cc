"""The packed store: all patch features of a data set in one file, read through a memory map.

`steph.data.packing` writes it. An HDF5 file, so that any tool can open it, in which every array is contiguous and
uncompressed, so that a slide is a slice of a map and nothing is decoded:

    features (N, D) float16 or float32    all patches, a patient's slides side by side
    coords (N, 2) int32                   level-0 pixels; -1 where the slide's file had none
    slide_ids (S,), offsets (S + 1,)      slide i is features[offsets[i]:offsets[i + 1]]
    sha256 (S, 32)                        of each slide's features and coordinates
    content_sha256 ()                     of all that is above and of the attributes below: the store's fingerprint
    provenance ()                         JSON: source files and stamps of their content, what was asked, what left out
    attributes                            format, version, encoder, dim, patch_size_px, magnification

float16 halves the disk and the time to read; it rounds to nearest, so a value is off by at most 2^-11 of itself
(0.05 %), or by 2^-25 below 6.1e-5. Values that it cannot hold (above 65,504) are refused.
"""

import hashlib
import json
import os
import warnings
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import torch
from torch import Tensor

from steph import Refused
from steph.data.cohort import Cohort
from steph.data.features import match_slides, open_slide
from steph.data.manifest import Features
from steph.files.progress import track
from steph.files.records import fingerprint

FORMAT, VERSION = b"steph-store", 1
DTYPES: dict[str, np.dtype] = {"float16": np.dtype("<f2"), "float32": np.dtype("<f4")}
COORDS = np.dtype("<i4")
NO_COORDS = -1
SLIDE_ID = np.dtype("S255")
"""A slide id is a file name, and those end at 255 bytes."""
AGAIN = "Delete it; `steph data pack` makes it again, or, in a synthetic study, the next run."


@dataclass(frozen=True, eq=False)
class Store:
    """A store. sizes: patches of each slide, in file order. features, coords: (N, D) and (N, 2), read-only maps of the
    file. hashes: (S, 32). fingerprint: SHA-256 of the content, the same whatever files it was packed from. description:
    encoder, dim, patch size, magnification."""

    path: Path
    sizes: dict[str, int]
    features: np.memmap
    coords: np.memmap
    description: dict[str, Any]
    provenance: dict[str, Any] = field(repr=False)
    hashes: np.ndarray = field(repr=False)
    fingerprint: str
    _intact: set[str] = field(default_factory=set, init=False, repr=False)

    @classmethod
    def open(cls, path: Path) -> "Store":
        """Open a store. Raises `Refused` for a missing, truncated, foreign, unfinished or altered file."""
        try:
            store = cls.read(path)
            finished = store.content_hash() == store.fingerprint
        except (OSError, KeyError, ValueError, RuntimeError, TypeError, AttributeError) as error:
            raise Refused(f"{path} is not a whole feature store ({error}). {AGAIN}") from None
        if not finished:
            raise Refused(f"{path}: slide list, sizes or hashes are not those it was finished with. {AGAIN}")
        return store

    @classmethod
    def read(cls, path: Path) -> "Store":
        """A store that may be unfinished; a file that is none raises nearly anything."""
        with h5py.File(path, "r", locking=False) as file:
            form, version = file.attrs.get("format"), file.attrs.get("version")
            if (form, version) != (FORMAT, VERSION):
                raise ValueError(f"format is {form}, version {version}, expected {FORMAT!r}, {VERSION}")
            features, coords, offsets = file["features"], file["coords"], file["offsets"][:]
            fit = features.dtype in DTYPES.values() and coords.dtype == COORDS
            if not fit or coords.shape != (len(features), 2) or offsets[-1] != len(features):
                raise ValueError("features, coordinates and offsets do not fit each other")
            slide_ids = [name.decode() for name in file["slide_ids"][:].tolist()]
            return cls(
                path=path,
                sizes=dict(zip(slide_ids, np.diff(offsets).tolist(), strict=True)),
                features=np.memmap(path, features.dtype, "r", features.id.get_offset(), features.shape),
                coords=np.memmap(path, COORDS, "r", coords.id.get_offset(), coords.shape),
                description={
                    "encoder": file.attrs["encoder"].decode(),
                    "dim": features.shape[1],
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
    def places(self) -> dict[str, tuple[int, slice]]:
        """Number and rows of each slide."""
        ends = accumulate(self.sizes.values())
        slides = zip(self.sizes.items(), ends, strict=True)
        return {slide: (i, slice(end - n, end)) for i, ((slide, n), end) in enumerate(slides)}

    def rows(self, slide_id: str) -> slice:
        """A slide's rows of `features` and `coords`. Raises `Refused` where they are not what was packed: they are
        compared with their hash when they are first asked for."""
        if slide_id not in self._intact:
            self._refuse_damaged([slide_id])
            self._intact.add(slide_id)
        return self.places[slide_id][1]

    def bag(self, slide_ids: Iterable[str]) -> np.ndarray:
        """Features of these slides, (n, D) in the store's precision, a copy."""
        return np.concatenate([self.features[self.rows(slide)] for slide in slide_ids])

    def coords_of(self, slide_ids: Iterable[str]) -> np.ndarray:
        """Coordinates of these slides' patches, (n, 2) int32, in the order of `bag`."""
        return np.concatenate([self.coords[self.rows(slide)] for slide in slide_ids])

    def prefetch(self, slide_ids: Iterable[str]) -> None:
        """Have the system read these slides from the disk meanwhile. A hint: it may do nothing."""
        width = self.dim * self.dtype.itemsize
        with suppress(OSError, AttributeError), self.path.open("rb") as file:
            for slide in slide_ids:
                at = self.features.offset + width * self.places[slide][1].start
                os.posix_fadvise(file.fileno(), at, width * self.sizes[slide], os.POSIX_FADV_WILLNEED)

    def verify(self) -> None:
        """Read everything and compare it with the hashes. Raises `Refused` naming the slides that are damaged."""
        self._refuse_damaged(track(list(self.sizes), f"verify {self.path.name}"))

    def is_intact(self, slide_id: str) -> bool:
        """Whether a slide's features and coordinates have their hash."""
        i, rows = self.places[slide_id]
        digests = (hashlib.sha256(array[rows].data) for array in (self.features, self.coords))
        return slide_hash(*digests) == self.hashes[i].tobytes()

    def _refuse_damaged(self, slide_ids: Iterable[str]) -> None:
        damaged = [slide for slide in slide_ids if not self.is_intact(slide)]
        if damaged:
            raise Refused(
                f"{self.path}: {len(damaged)} slide(s) are not what was packed: {', '.join(damaged[:10])}. The disk or "
                f"a copy damaged the file. {AGAIN}"
            )

    def content_hash(self) -> str:
        """The fingerprint that the store must have. Where the features came from is no part of it."""
        hashes = (row.tobytes().hex() for row in self.hashes)
        slides = [[slide, n, digest] for (slide, n), digest in zip(self.sizes.items(), hashes, strict=True)]
        return fingerprint({"version": VERSION, **self.description, "dtype": self.dtype.name, "slides": slides}, 64)

    def matches(
        self, features: Features, cohort: Cohort, files: dict[str, Path], repack: str = "steph data pack"
    ) -> None:
        """Check that the store is the one that the manifest, the cohort and the slide files mean.

        files: `find_slides`' answer; those that were removed after packing are not missed. Raises `Refused`, with all
        differences and the command `repack`, where it was packed for other features, for slides that the store lacks,
        for source files of other content, and where the study names other folders and files are not there to tell.
        """
        asked = features.model_dump(exclude={"encoder_aliases"})
        stored = {**asked, **self.provenance.get("asked", {}), **self.description, "precision": self.dtype.name}
        if features.is_encoder(stored["encoder"]):
            stored["encoder"] = features.encoder
        slides = cohort.slides["slide_id"].tolist()
        matched = match_slides(slides, files)
        if all(matched.values()):  # what lies in a folder tells more than its name
            stored["folders"] = asked["folders"]
        differences = [
            f"{name} is {stored[name]}, the study says {value}"
            for name, value in asked.items()
            if stored[name] != value
        ]
        left_out = {row["slide_id"]: row["file"] for row in self.provenance.get("left_out", [])}
        known = {*self.sizes, *left_out}
        absent = [slide for slide in slides if slide not in known]
        if absent:
            differences.append(f"it lacks {len(absent)} of the table's slides ({', '.join(absent[:5])})")
        packed = {**left_out, **self.provenance.get("files", {})}
        changed = [
            f"{slide} ({paths[0]})"
            for slide, paths in matched.items()
            if len(paths) == 1 and packed.get(slide) != source_of(paths[0]) and not self._holds(slide, paths[0])
        ]
        if changed:
            differences.append(f"{len(changed)} source file(s) are not what was packed: {', '.join(changed[:5])}")
        if differences:
            listed = "\n".join(f"  {line}" for line in differences)
            raise Refused(f"{self.path} was not made from what the study names:\n{listed}\nPack it again: `{repack}`.")

    def _holds(self, slide: str, path: Path) -> bool:
        """Whether a slide was packed from a file of this content."""
        with suppress(Refused), open_slide(path) as file:
            return file.stamp() == self.provenance.get("content", {}).get(slide)
        return False

    @cached_property
    def without_coords(self) -> list[str]:
        """The slides whose patches have no coordinates."""
        return [slide for slide, (_, rows) in self.places.items() if (self.coords[rows] == NO_COORDS).all()]


def describe(features: Features) -> dict[str, Any]:
    """What a store says of its features; two stores with different ones are never mixed."""
    values = features.model_dump(include={"encoder", "dim", "patch_size_px", "magnification"})
    return {**values, "magnification": float(features.magnification)}


def source_of(path: Path) -> list[Any]:
    """What a store remembers of a file that it was packed from, beside its content: folder, name, size and times."""
    status = path.stat()
    return [str(path.parent.resolve()), path.name, status.st_size, status.st_mtime_ns, status.st_ctime_ns]


def slide_hash(features: Any, coords: Any) -> bytes:
    """SHA-256 of a slide, from those of its features and its coordinates."""
    return hashlib.sha256(features.digest() + coords.digest()).digest()
