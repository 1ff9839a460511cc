"""Slide feature files as tools write them, found and read; `steph.data.preflight` judges what they say and hold.

Accepted, for a slide of N patches and an encoder of width D:

- HDF5 (``.h5``; CLAM, TRIDENT, MahmoodLab's UNI2-h features): ``features`` (N, D) or (1, N, D) of any floating-point
  type; ``coords`` (N, 2) or (1, N, 2) whole numbers, level-0 pixels. A slide goes without coordinates of another kind.
- PyTorch (``.pt``; CLAM's ``pt_files``): one tensor (N, D) or (1, N, D), without coordinates.

Nothing that runs code when it is loaded is ever opened: a ``.pt`` that is not a bare tensor is refused.
"""

import hashlib
import importlib
import os
import pickle
import re
import warnings
from collections import defaultdict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from math import ceil, prod
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pandas as pd
import torch

from steph import Refused
from steph.data.cohort import slide_ids
from steph.files.tables import shortened

with suppress(ImportError):  # Where somebody installed it, HDF5 reads files of more kinds of compression.
    importlib.import_module("hdf5plugin")

SUFFIXES = (".h5", ".pt")
BLOCK_BYTES = 32 << 20  # about how much of a slide is read at a time
STAMP_ROWS = 128  # first, last and in the middle
STATEMENTS = {
    "encoder": "encoder encodername patchencoder patchencodername featureencoder featureextractor extractor",
    "patch_size": "patchsize patchsizepx tilesize tilesizepx",
    "magnification": "targetmagnification magnification targetmag mag",
    "overlap": "overlap overlappx patchoverlap",
    "patch_size_level0": "patchsizelevel0",
}
"""What feature files say of themselves, and the attributes that say so, in small letters and figures alone."""
STATEMENT_OF = {name: what for what, names in STATEMENTS.items() for name in names.split()}
UUID = re.compile(r"\.[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}", re.IGNORECASE)
"""What TCGA puts behind a slide's barcode."""


def find_slides(folders: Iterable[Path]) -> dict[str, Path]:
    """The feature files (``.h5``, ``.pt``) in `folders` and their subfolders: file name without its ending -> path.

    Hidden files and folders, macOS's ``._*`` files and TRIDENT's files of coordinates (``patches/*_patches.h5``) are
    passed over, links to folders are followed. Of one CLAM output (``h5_files/`` beside ``pt_files/``, or both endings
    in one folder) the h5 counts, as it has coordinates.
    Raises `Refused` where a slide lies in two places: features of different sources must not be mixed by chance.
    """
    slides: dict[str, Path] = {}
    twice = []
    for path in sorted(files_in(folders)):
        coordinates_alone = path.parent.name == "patches" and path.stem.endswith("_patches")
        if path.suffix not in SUFFIXES or path.name.startswith(".") or coordinates_alone:
            continue
        other = slides.setdefault(path.stem, path)
        if other.resolve() == path.resolve():
            continue
        outputs = {p.parent.parent if p.parent.name in {"h5_files", "pt_files"} else p.parent for p in (path, other)}
        if path.suffix != other.suffix and len(outputs) == 1:
            slides[path.stem] = path if path.suffix == ".h5" else other
        else:
            twice.append(f"{path.stem} ({other} and {path})")
    if twice:
        raise Refused(
            f"{len(twice)} slide(s) lie in two places: {shortened(twice)}. Features of two sources are never mixed: "
            "name only one feature set's folder in the study's `features.folders`, or remove the copy."
        )
    return slides


def files_in(folders: Iterable[Path]) -> Iterator[Path]:
    """All files in folders and their subfolders, links to folders followed, but not in hidden ones."""
    visited = set()
    for root in folders:
        for folder, subfolders, names in os.walk(root, followlinks=True):
            real = os.path.realpath(folder)
            subfolders[:] = [name for name in subfolders if real not in visited and not name.startswith(".")]
            visited.add(real)
            yield from (Path(folder, name) for name in names)


def match_slides(slides: Iterable[str], files: dict[str, Path]) -> dict[str, list[Path]]:
    """The files that each slide of a table may mean: the one of exactly that name, else those with an ending of slides
    behind it (``P1.svs.h5``), or where file or table leave out TCGA's UUID. Any other ending is another slide's."""
    by_barcode: dict[str, dict[str, str]] = defaultdict(dict)
    for stem, name in zip(files, slide_ids(pd.Series([*files], dtype=str)), strict=True):
        by_barcode[UUID.sub("", name)][stem] = name
    matches = {}
    for slide in slides:
        barcode = UUID.sub("", slide)
        near = {slide: slide} if slide in files else by_barcode.get(barcode, {})
        matches[slide] = [files[stem] for stem, name in near.items() if name == slide or barcode in (name, slide)]
    return matches


class SlideFile:
    """An open feature file of `n_patches` patches, `dim` wide, its form checked.

    stated: what the file says of itself, by the names of `STATEMENTS`: the different values of all attributes, numbers
    where they are some. note: why coordinates are not used.
    """

    def __init__(self, path: Path, features: Any, coords: Any, stated: dict[str, list[Any]], note: str = "") -> None:
        self.path, self.features, self.coords, self.stated, self.note = path, features, coords, stated, note
        self.n_patches, self.dim = features.shape[-2:]

    def read(self, rows: slice = slice(None)) -> tuple[np.ndarray, np.ndarray | None]:
        """Features (n, D) in the file's precision (bfloat16 as float32) and coords (n, 2) or None, of some rows."""
        try:
            features = self.features[(0, rows) if self.features.ndim == 3 else rows]
            coords = None if self.coords is None else self.coords[(0, rows) if self.coords.ndim == 3 else rows]
        except (OSError, RuntimeError) as error:
            raise _unreadable(self.path, error, "not readable") from None
        return features, coords

    def stamp(self) -> str:
        """Hash of the slide's size and of its first, middle and last patches: another, when it is extracted again."""
        spare = max(self.n_patches - STAMP_ROWS, 0)
        parts = [part for at in (0, spare // 2, spare) for part in self.read(slice(at, at + STAMP_ROWS))]
        content = b"".join(b"none" if part is None else part.tobytes() for part in parts)
        return hashlib.sha256(f"{self.n_patches} {self.dim} ".encode() + content).hexdigest()[:32]

    def blocks(self) -> Iterator[tuple[np.ndarray, np.ndarray | None]]:
        """The file, once, in pieces of about `BLOCK_BYTES` (whole chunks of it), as `read` gives them."""
        chunks = getattr(self.features, "chunks", None)
        chunk = chunks[-2] if chunks else 1
        step = max(BLOCK_BYTES // (max(self.dim, 1) * 4 * chunk), 1) * chunk
        return (self.read(slice(start, start + step)) for start in range(0, self.n_patches, step))


@contextmanager
def open_slide(path: Path) -> Iterator[SlideFile]:
    """Open a feature file; only its header is read.

    Raises `Refused`, with ``<path>: <problem>``, for a missing, truncated or pickled file, one without ``features`` or
    with others than floating-point numbers, coordinates of another length, and numbers that are not in the file itself.
    """
    if not path.is_file():
        raise Refused(f"{path}: no such file, or a link to one that is gone")
    if path.suffix == ".pt":
        yield SlideFile(path, _tensor(path), None, defaultdict(list))
        return
    try:
        file = h5py.File(path, "r", locking=False)  # Network file systems often cannot lock.
        slide = _hdf5(path, file)
    except (OSError, RuntimeError, KeyError, ValueError, TypeError) as error:  # A damaged header raises any.
        raise _unreadable(path, error, "truncated or not an HDF5 file") from None
    with file:
        yield slide


def _unreadable(path: Path, error: Exception, problem: str) -> Refused:
    line = (str(error) or type(error).__name__).splitlines()[0][:200]
    return Refused(f"{path}: {problem} ({line}); download or extract it again")


def _hdf5(path: Path, file: h5py.File) -> SlideFile:
    features, places = _dataset(path, file, "features"), _dataset(path, file, "coords")
    if features is None:
        content = ", ".join(sorted(map(str, file))) or "nothing"
        raise Refused(f"{path}: no dataset 'features'; the file holds: {content}")
    _refuse_form(path, features.shape, "features", features.dtype.kind == "f", features.dtype)
    coords, note = None, ""
    if places is not None:
        if prod(places.shape[:-1]) != features.shape[-2]:
            raise Refused(f"{path}: coords of shape {places.shape} do not fit features of shape {features.shape}")
        coords, note = _level0_pixels(places, features.shape[-2])
    return SlideFile(path, features, coords, _stated(file), note)


def _dataset(path: Path, file: h5py.File, name: str) -> h5py.Dataset | None:
    """A dataset whose numbers are all in the file. HDF5 reads what is not there, in silence, as a fill value: parts
    that a killed tool never wrote, and other files' numbers where those are gone."""
    if name not in list(file):
        return None
    try:
        dataset = file[name]
    except (KeyError, OSError, RuntimeError):
        raise Refused(f"{path}: {name!r} is a link to what is not there; get the file that holds the numbers") from None
    if not isinstance(dataset, h5py.Dataset) or dataset.shape is None:
        raise Refused(f"{path}: no dataset {name!r} with numbers, but {dataset}")
    if dataset.is_virtual or dataset.external or dataset.file.filename != file.filename:
        raise Refused(f"{path}: the numbers of {name!r} lie in other files, which may be gone; save them in this one")
    if dataset.chunks and dataset.size:
        chunks = prod(ceil(n / chunk) for n, chunk in zip(dataset.shape, dataset.chunks, strict=True))
        is_written = dataset.id.get_num_chunks() >= chunks
    else:
        is_written = dataset.id.get_storage_size() >= dataset.nbytes
    if not is_written:
        raise Refused(f"{path}: {name!r} was never fully written; extract it again")
    settings = dataset.id.get_create_plist()
    for number, *_, label in map(settings.get_filter, range(settings.get_nfilters())):
        if not h5py.h5z.filter_avail(number):
            what = f"{name!r} is compressed by filter {number} {label.decode(errors='replace')}".rstrip()
            raise Refused(f"{path}: {what}, which is not installed here: `pip install hdf5plugin`")
    return dataset


def _level0_pixels(places: h5py.Dataset, n: int) -> tuple[Any, str]:
    """Coordinates (N, 2) or (1, N, 2) of whole numbers, as they are or cast; else None and the reason."""
    if places.shape not in {(n, 2), (1, n, 2)} or places.dtype.kind not in "iuf":
        return None, f"coords of shape {places.shape} and type {places.dtype} are not x and y, and not used"
    some = places[..., :STAMP_ROWS, :].reshape(-1, 2)
    if n > 1 and (some == some[:1]).all():
        return None, "coords are all the same, and not used"
    if places.dtype.kind != "f":
        return places, ""
    values = places[:]
    if (np.abs(values) < 2**53).all() and (values == np.trunc(values)).all():
        return values.astype(np.int64), ""
    return None, "coords are not whole numbers, and not used"


def _stated(file: h5py.File) -> dict[str, list[Any]]:
    """What attributes of a file, its groups and datasets say (`STATEMENTS`). TRIDENT writes None as 'None'."""
    stated: dict[str, list[Any]] = defaultdict(list)

    def collect(part: Any) -> None:
        for name in part.attrs:
            what = STATEMENT_OF.get(re.sub(r"[\W_]", "", name.lower()), "")
            value = part.attrs[name] if what else []
            for item in [] if isinstance(value, h5py.Empty) else np.asarray(value).ravel().tolist():
                text = (item.decode(errors="replace") if isinstance(item, bytes) else str(item)).strip()
                number = re.fullmatch(r"x? ?(\d+(\.\d*)?) ?(x|px|pixels?)?", text, re.IGNORECASE)
                statement = float(number[1]) if number and what != "encoder" else text
                if text.lower() not in ("", "none", "nan") and statement not in stated[what]:
                    stated[what].append(statement)

    collect(file)
    file.visititems(lambda _, part: collect(part))
    return stated


def _tensor(path: Path) -> np.ndarray:
    """The tensor of a ``.pt`` file, mapped where its format allows; `weights_only` runs no code of the file."""
    try:
        with path.open("rb") as file:
            zipped = file.read(4) == b"PK\x03\x04"
        with warnings.catch_warnings(action="ignore"):  # What torch warns of is refused below.
            value = torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
        content = f"a {type(value).__name__}"
    except pickle.UnpicklingError:
        value, content = None, "Python objects"
    except Exception as error:  # A damaged file makes torch raise nearly anything.
        raise _unreadable(path, error, "truncated or not a PyTorch file") from None
    if not isinstance(value, torch.Tensor):
        raise Refused(
            f"{path}: holds {content}, not a bare tensor. Pickles run code when they are loaded, so nothing else is "
            "opened; where you trust its origin, save it with the tool that made it as HDF5 or as one tensor"
        )
    if value.layout != torch.strided or value.device.type != "cpu":
        raise Refused(f"{path}: the tensor is sparse or without values; expected a plain one")
    floating = value.is_floating_point() and value.element_size() > 1
    _refuse_form(path, tuple(value.shape), "the tensor", floating, value.dtype)
    return (value.float() if value.dtype == torch.bfloat16 else value).detach().numpy()


def _refuse_form(path: Path, shape: tuple[int, ...], what: str, floating: bool, dtype: Any) -> None:
    if not floating:
        raise Refused(f"{path}: {what} of type {dtype}, not floating point of 16 to 64 bits")
    if len(shape) != 2 and (len(shape) != 3 or shape[0] != 1):
        raise Refused(f"{path}: {what} of shape {shape}; expected (patches, width) or (1, patches, width)")
