"""Slide feature files as tools write them, found, checked and read.

Accepted, for a slide of N patches and an encoder of width D:

- HDF5 (``.h5``; CLAM, TRIDENT, MahmoodLab's UNI2-h features): ``features`` (N, D) or (1, N, D) of any floating-point
  type; ``coords`` (N, 2) or (1, N, 2) integers, level-0 pixels, or none.
- PyTorch (``.pt``; CLAM's ``pt_files``): one tensor (N, D) or (1, N, D), without coordinates.

Nothing that runs code when it is loaded is ever opened: a ``.pt`` that is not a bare tensor is refused.
"""

from __future__ import annotations

import os
import pickle
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pandas as pd
import torch

from steph import Refused
from steph.data.manifest import Features

SUFFIXES = (".h5", ".pt")
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
"""What a tensor of features may hold; PyTorch has smaller formats, which nothing else can read."""
BLOCK_BYTES = 32 << 20
"""About how much of a slide is read at a time."""
ENCODER_KEYS = ("encoder", "encoder_name", "patch_encoder", "patch_encoder_name")
"""Attributes of a feature file, or of what is in it, by which tools name the encoder."""
SAME_ENCODER = {"univ2": "uni2h", "uni2": "uni2h", "mahmoodlabuni2h": "uni2h"}
"""Other names of encoders, in small letters and figures alone."""

TABLE = ["slide_id", "path", "n_patches", "dim", "has_coords", "size_bytes", "problem"]


@dataclass(frozen=True)
class SlideInfo:
    """What the header of a feature file says. attributes: those of ``coords`` (TRIDENT: patch size, magnification), and
    encoder where the file names one."""

    path: Path
    n_patches: int
    dim: int
    has_coords: bool
    size_bytes: int
    attributes: dict[str, Any] = field(default_factory=dict)


# ------------------------------------------------------------------------------------------------ finding


def find_slides(folders: Iterable[Path]) -> dict[str, Path]:
    """The feature files (``.h5``, ``.pt``) in `folders` and their subfolders: file name without its ending -> path.

    Hidden files and folders and macOS's ``._*`` files are passed over, links to folders are followed. Of one CLAM
    output (``h5_files/`` beside ``pt_files/``, or both endings in one folder) the h5 counts, as it has coordinates.
    Raises `Refused` where a slide lies in two places: features of different sources must not be mixed by chance.
    """
    slides: dict[str, Path] = {}
    twice = []
    for path in sorted(set(_files(folders))):
        other = slides.setdefault(path.stem, path)
        if other.resolve() == path.resolve():
            continue
        if path.suffix != other.suffix and _output(path) == _output(other):
            slides[path.stem] = path if path.suffix == ".h5" else other
        else:
            twice.append(f"  {path.stem}: {other} and {path}")
    if twice:
        raise Refused(
            f"{_listed(twice, 10)}\n{len(twice)} slide(s) lie in two places. Features of two sources are never mixed: "
            "name only one feature set's folder in the study's `features.folders`, or remove the copy."
        )
    return slides


def _files(folders: Iterable[Path]) -> Iterator[Path]:
    visited = set()
    for root in folders:
        for folder, subfolders, names in os.walk(root, followlinks=True):
            real = os.path.realpath(folder)
            subfolders[:] = [] if real in visited else [name for name in subfolders if not name.startswith(".")]
            if real not in visited:
                visited.add(real)
                yield from (Path(folder, n) for n in names if n.endswith(SUFFIXES) and not n.startswith("."))


def _output(path: Path) -> Path:
    """The output folder of the tool that wrote a file."""
    return path.parent.parent if path.parent.name in {"h5_files", "pt_files"} else path.parent


def match_slides(slide_ids: Iterable[str], files: dict[str, Path]) -> dict[str, list[Path]]:
    """The files that each slide of a table may mean: the one of exactly that name, else those that agree up to the
    first '.', where either the table or the file leaves out the rest (a TCGA barcode with or without its UUID)."""
    short: dict[str, list[str]] = {}
    for stem in files:
        short.setdefault(stem.split(".")[0], []).append(stem)
    matches = {}
    for slide in slide_ids:
        barcode = slide.split(".")[0]
        stems = [slide] if slide in files else [s for s in short.get(barcode, []) if barcode in (s, slide)]
        matches[slide] = [files[stem] for stem in stems]
    return matches


# ------------------------------------------------------------------------------------------------ reading


class _SlideFile:
    """An open feature file, its form checked. features, coords: arrays, perhaps with a leading axis of 1."""

    def __init__(self, path: Path, features: Any, coords: Any, attributes: dict[str, Any]) -> None:
        self.path, self.features, self.coords = path, features, coords
        chunks = getattr(features, "chunks", None)
        self.rows_per_chunk = chunks[-2] if chunks else 1
        n_patches, dim = features.shape[-2:]
        self.info = SlideInfo(path, n_patches, dim, coords is not None, path.stat().st_size, attributes)

    def read(self, rows: slice) -> tuple[np.ndarray, np.ndarray | None]:
        try:
            coords = None if self.coords is None else np.asarray(self.coords[_index(self.coords, rows)])
            features = self.features[_index(self.features, rows)]
        except (OSError, RuntimeError) as error:
            raise _unreadable(self.path, error) from None
        if isinstance(features, torch.Tensor):
            features = (features.float() if features.dtype == torch.bfloat16 else features).numpy()
        return features, coords


def _index(array: Any, rows: slice) -> Any:
    return (0, rows) if array.ndim == 3 else rows


def _unreadable(path: Path, error: Exception, problem: str = "not readable") -> Refused:
    line = (str(error) or type(error).__name__).splitlines()[0][:200]
    return Refused(f"{path}: {problem} ({line}); download or extract it again")


@contextmanager
def _opened(path: Path) -> Iterator[_SlideFile]:
    if not path.is_file():
        raise Refused(f"{path}: missing")
    if path.suffix == ".pt":
        yield _SlideFile(path, _tensor(path), None, {})
        return
    try:
        # Files are only read, and network file systems often cannot lock.
        file = h5py.File(path, "r", locking=False)
    except OSError as error:
        raise _unreadable(path, error, "truncated or not an HDF5 file") from None
    with file:
        try:
            opened = _hdf5(path, file)
        except (OSError, RuntimeError, KeyError, ValueError, TypeError) as error:  # A damaged header raises any.
            raise _unreadable(path, error) from None
        yield opened


def _hdf5(path: Path, file: h5py.File) -> _SlideFile:
    features, coords = file.get("features"), file.get("coords")
    if not isinstance(features, h5py.Dataset):
        raise Refused(
            f"{path}: no dataset 'features'; the file holds: {', '.join(sorted(map(str, file))) or 'nothing'}"
        )
    n_patches = _checked_patches(path, features.shape, "features", features.dtype.kind == "f", str(features.dtype))
    if coords is not None:
        if not isinstance(coords, h5py.Dataset) or coords.dtype.kind not in "iu":
            raise Refused(f"{path}: 'coords' are {getattr(coords, 'dtype', 'a group')}, expected integers")
        if coords.shape not in {(n_patches, 2), (1, n_patches, 2)}:
            raise Refused(f"{path}: coords of shape {coords.shape} do not fit features of {n_patches} patches")
    parts = [part for part in (file, features, coords) if part is not None]
    names = [_plain(part.attrs.get(key)) for part in parts for key in ENCODER_KEYS]
    attributes = {} if coords is None else {name: _plain(value) for name, value in coords.attrs.items()}
    attributes["encoder"] = next((name for name in names if name and isinstance(name, str)), None)
    for dataset in (features, coords):
        _refuse_unwritten(path, dataset)
    return _SlideFile(path, features, coords, attributes)


def _refuse_unwritten(path: Path, dataset: h5py.Dataset | None) -> None:
    """HDF5 reads parts that were never written as zeros; a tool that was killed leaves such files."""
    if dataset is None or dataset.size == 0 or dataset.is_virtual:
        return
    if dataset.chunks:
        whole = dataset.id.get_num_chunks() >= prod(
            -(-n // c) for n, c in zip(dataset.shape, dataset.chunks, strict=True)
        )
    else:
        whole = dataset.id.get_storage_size() >= dataset.nbytes
    if not whole:
        raise Refused(f"{path}: '{dataset.name[1:]}' was never fully written; extract it again")


def _tensor(path: Path) -> torch.Tensor:
    """The tensor of a ``.pt`` file, mapped where its format allows; `weights_only` runs no code of the file."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # What torch warns of is refused below.
            try:
                value = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
            except RuntimeError as error:
                if "mmap can only be used" not in str(error):
                    raise
                value = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        raise Refused(_pickled(path, "Python objects")) from None
    except Exception as error:  # A damaged file makes torch raise nearly anything.
        raise _unreadable(path, error, "truncated or not a PyTorch file") from None
    if not isinstance(value, torch.Tensor):
        raise Refused(_pickled(path, f"a {type(value).__name__}"))
    if value.layout != torch.strided or value.is_quantized or value.device.type != "cpu":
        raise Refused(f"{path}: the tensor is sparse, quantized or without values; expected a plain one")
    _checked_patches(path, tuple(value.shape), "the tensor", value.dtype in FLOATS, str(value.dtype))
    return value.detach()


def _pickled(path: Path, what: str) -> str:
    return (
        f"{path}: holds {what}, not a bare tensor. Pickles run code when they are loaded, so nothing else is opened; "
        "where you trust its origin, save it with the tool that made it as HDF5 or as one tensor"
    )


def _checked_patches(path: Path, shape: tuple[int, ...], what: str, floating: bool, dtype: str) -> int:
    """The number of patches of an array of features."""
    if not floating:
        raise Refused(f"{path}: {what} of type {dtype}, not floating point of 16 to 64 bits")
    if not (len(shape) == 2 or (len(shape) == 3 and shape[0] == 1)):
        raise Refused(f"{path}: {what} of shape {shape}; expected (patches, width) or (1, patches, width)")
    return shape[-2]


def _plain(value: Any) -> Any:
    """An HDF5 attribute as plain Python; TRIDENT writes None as 'None'."""
    value = value.tolist() if hasattr(value, "tolist") else value
    value = value.decode(errors="replace") if isinstance(value, bytes) else value
    return None if value == "None" else value


def inspect(path: Path, dim: int | None = None) -> SlideInfo:
    """What a feature file holds, from its header alone. dim: the width that it should have.

    Raises `Refused`, with ``<path>: <problem>``, for a missing, truncated or pickled file, one without ``features``
    or with others than floating-point numbers, coordinates of another length, another width than `dim`.
    """
    with _opened(path) as file:
        # An empty slide may have any width: some tools write (0, 0).
        if dim is not None and file.info.dim != dim and file.info.n_patches:
            raise Refused(f"{path}: {file.info.dim} wide, expected {dim}: features of another encoder")
        return file.info


def read(path: Path) -> tuple[np.ndarray, np.ndarray | None]:
    """A whole feature file: features (n, D) in the file's precision (bfloat16 as float32), coords (n, 2) or None."""
    with _opened(path) as file:
        return file.read(slice(None))


def blocks(path: Path) -> Iterator[tuple[np.ndarray, np.ndarray | None]]:
    """A whole feature file, once, in pieces of about `BLOCK_BYTES` (whole chunks of the file), as `read` gives them."""
    with _opened(path) as file:
        n_patches, chunk = file.info.n_patches, file.rows_per_chunk
        step = max(BLOCK_BYTES // (max(file.info.dim, 1) * 4) // chunk, 1) * chunk
        for start in range(0, n_patches, step):
            yield file.read(slice(start, min(start + step, n_patches)))


# ------------------------------------------------------------------------------------------------ preflight


def check_slides(
    slide_ids: Iterable[str], files: dict[str, Path], dim: int, extraction: Features | None = None
) -> pd.DataFrame:
    """The preflight table: a row per slide with the columns `TABLE`; `problem` is empty where the file can be used.

    Only headers are read. extraction: what the study says of encoder, patch size and magnification, compared with what
    the file says, where it says something.
    """
    rows = []
    taken: dict[Path, str] = {}
    for slide, paths in match_slides(slide_ids, files).items():
        row: dict[str, Any] = dict.fromkeys(TABLE, pd.NA) | {"slide_id": slide, "problem": ""}
        rows.append(row)
        if len(paths) != 1:
            row["problem"] = f"may mean any of: {', '.join(map(str, paths))}" if paths else "missing"
            continue
        row["path"] = str(paths[0])
        owner = taken.setdefault(paths[0], slide)
        try:
            info = inspect(paths[0], dim)
        except Refused as error:
            row["problem"] = str(error).removeprefix(f"{paths[0]}: ")
            continue
        row |= {name: getattr(info, name) for name in ("n_patches", "dim", "has_coords", "size_bytes")}
        if owner != slide:
            row["problem"] = f"the file is also that of slide {owner}"
        elif info.n_patches == 0:
            row["problem"] = "empty (0 patches)"
        elif extraction is not None:
            row["problem"] = _other_extraction(info.attributes, extraction)
    return pd.DataFrame(rows, columns=TABLE)


def _other_extraction(attributes: dict[str, Any], expected: Features) -> str:
    encoder = attributes.get("encoder")
    if encoder is not None and _encoder_key(encoder) != _encoder_key(expected.encoder):
        return (
            f"features of {encoder}, expected {expected.encoder}: they mean something else, also where they are as wide"
        )
    pairs = [("patch_size", expected.patch_size_px), ("target_magnification", expected.magnification)]
    differ = [
        f"{name} {attributes[name]}, expected {value:g}"
        for name, value in pairs
        if isinstance(attributes.get(name), int | float) and attributes[name] != value
    ]
    return f"other patches than the study's: {'; '.join(differ)}" if differ else ""


def _encoder_key(encoder: str) -> str:
    """The same for all names of one encoder."""
    letters = "".join(c for c in encoder.lower() if c.isalnum())
    return SAME_ENCODER.get(letters, letters)


def problems_message(table: pd.DataFrame) -> str:
    """All problems of a preflight table in one text, slides with the same problem together; '' where there is none."""
    bad = table[table["problem"] != ""]
    if bad.empty:
        return ""
    lines = [f"{len(bad)} of {len(table)} slides cannot be used:"]
    for problem, group in bad.groupby("problem", sort=False):
        named = [
            f"    {slide}" + ("" if pd.isna(path) else f" ({path})")
            for slide, path in zip(group["slide_id"], group["path"], strict=True)
        ]
        lines += [f"  {problem}: {len(group)} slide(s)", _listed(named, 20)]
    return "\n".join(lines)


def _listed(lines: list[str], most: int) -> str:
    return "\n".join(lines[:most] + ([f"    ... and {len(lines) - most} more"] if len(lines) > most else []))
