"""Slide feature files as tools write them, found, checked and read.

Accepted, for a slide of N patches and an encoder of width D:

- HDF5 (``.h5``; CLAM, TRIDENT, MahmoodLab's UNI2-h features): ``features`` (N, D) or (1, N, D) of any floating-point
  type; ``coords`` (N, 2) or (1, N, 2) integers, level-0 pixels, or none.
- PyTorch (``.pt``; CLAM's ``pt_files``): one tensor (N, D) or (1, N, D), without coordinates.

Nothing that runs code when it is loaded is ever opened: a ``.pt`` that is not a bare tensor is refused.
"""

import os
import pickle
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from math import ceil, prod
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pandas as pd
import torch

from steph import Refused
from steph.data.manifest import Features
from steph.files.tables import shortened

SUFFIXES = (".h5", ".pt")
BLOCK_BYTES = 32 << 20  # about how much of a slide is read at a time
ENCODER_KEYS = ("encoder", "encoder_name", "patch_encoder", "patch_encoder_name")
"""Attributes of a feature file, or of what is in it, by which tools name the encoder."""
SAME_ENCODER = {"univ2": "uni2h", "uni2": "uni2h", "mahmoodlabuni2h": "uni2h"}
"""Other names of encoders, in small letters and figures alone."""


def find_slides(folders: Iterable[Path]) -> dict[str, Path]:
    """The feature files (``.h5``, ``.pt``) in `folders` and their subfolders: file name without its ending -> path.

    Hidden files and folders and macOS's ``._*`` files are passed over, links to folders are followed. Of one CLAM
    output (``h5_files/`` beside ``pt_files/``, or both endings in one folder) the h5 counts, as it has coordinates.
    Raises `Refused` where a slide lies in two places: features of different sources must not be mixed by chance.
    """
    slides: dict[str, Path] = {}
    twice = []
    for path in sorted(files_in(folders)):
        if path.suffix not in SUFFIXES or path.name.startswith("."):
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


class SlideFile:
    """An open feature file of `n_patches` patches, `dim` wide, its form checked.

    attributes: those of ``coords`` (TRIDENT: patch size, magnification), and ``encoder`` where the file names one.
    """

    def __init__(self, path: Path, features: Any, coords: Any, attributes: dict[str, Any]) -> None:
        self.path, self.features, self.coords, self.attributes = path, features, coords, attributes
        self.n_patches, self.dim = features.shape[-2:]

    def read(self, rows: slice = slice(None)) -> tuple[np.ndarray, np.ndarray | None]:
        """Features (n, D) in the file's precision (bfloat16 as float32) and coords (n, 2) or None, of some rows."""
        try:
            features = self.features[(0, rows) if self.features.ndim == 3 else rows]
            coords = None if self.coords is None else self.coords[(0, rows) if self.coords.ndim == 3 else rows]
        except (OSError, RuntimeError) as error:
            raise _unreadable(self.path, error, "not readable") from None
        return features, coords

    def blocks(self) -> Iterator[tuple[np.ndarray, np.ndarray | None]]:
        """The file, once, in pieces of about `BLOCK_BYTES` (whole chunks of it), as `read` gives them."""
        chunks = getattr(self.features, "chunks", None)
        chunk = chunks[-2] if chunks else 1
        step = max(BLOCK_BYTES // (max(self.dim, 1) * 4 * chunk), 1) * chunk
        return (self.read(slice(start, start + step)) for start in range(0, self.n_patches, step))


@contextmanager
def open_slide(path: Path) -> Iterator[SlideFile]:
    """Open a feature file; only its header is read.

    Raises `Refused`, with ``<path>: <problem>``, for a truncated or pickled file, one without ``features``
    or with others than floating-point numbers, and coordinates of another length.
    """
    if path.suffix == ".pt":
        yield SlideFile(path, _tensor(path), None, {})
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
    features, coords = file.get("features"), file.get("coords")
    if not isinstance(features, h5py.Dataset):
        content = ", ".join(sorted(map(str, file))) or "nothing"
        raise Refused(f"{path}: no dataset 'features'; the file holds: {content}")
    _refuse_form(path, features.shape, "features", features.dtype.kind == "f", features.dtype)
    datasets, attributes, n_patches = [features], {}, features.shape[-2]
    if coords is not None:
        if not isinstance(coords, h5py.Dataset) or coords.dtype.kind not in "iu":
            raise Refused(f"{path}: 'coords' are {getattr(coords, 'dtype', 'a group')}, expected integers")
        if coords.shape not in {(n_patches, 2), (1, n_patches, 2)}:
            raise Refused(f"{path}: coords of shape {coords.shape} do not fit features of {n_patches} patches")
        datasets.append(coords)
        attributes = {name: _plain(value) for name, value in coords.attrs.items()}
    if not all(map(_is_written, datasets)):
        raise Refused(f"{path}: it was never fully written; extract it again")
    names = [_plain(part.attrs.get(key)) for part in (file, *datasets) for key in ENCODER_KEYS]
    attributes["encoder"] = next((name for name in names if name and isinstance(name, str)), None)
    return SlideFile(path, features, coords, attributes)


def _is_written(dataset: h5py.Dataset) -> bool:
    """HDF5 reads parts that were never written as zeros; a tool that was killed leaves such files."""
    if dataset.size == 0 or dataset.is_virtual:
        return True
    if dataset.chunks is None:
        return dataset.id.get_storage_size() >= dataset.nbytes
    chunks = [ceil(n / chunk) for n, chunk in zip(dataset.shape, dataset.chunks, strict=True)]
    return dataset.id.get_num_chunks() >= prod(chunks)


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


def _plain(value: Any) -> Any:
    """An HDF5 attribute as plain Python; TRIDENT writes None as 'None'."""
    value = np.asarray(value).tolist()
    value = value.decode(errors="replace") if isinstance(value, bytes) else value
    return None if value == "None" else value


def check_slides(slide_ids: Iterable[str], files: dict[str, Path], features: Features) -> pd.DataFrame:
    """The preflight table: slide_id, path, n_patches and `problem`, empty where the file can be used, of each slide.

    Only headers are read. Encoder, patch size and magnification are compared where the file states them.
    """
    rows: list[tuple[str, str | None, int | None, str]] = []
    owners: dict[Path, str] = {}
    for slide, paths in match_slides(slide_ids, files).items():
        if len(paths) != 1:
            problem = f"may mean any of: {', '.join(map(str, paths))}" if paths else "missing"
            rows.append((slide, None, None, problem))
            continue
        path, n_patches = paths[0], None
        if owners.setdefault(path, slide) != slide:
            problem = f"the file is also that of slide {owners[path]}"
        else:
            try:
                with open_slide(path) as file:
                    n_patches, problem = file.n_patches, _difference(file, features)
            except Refused as error:
                problem = str(error).removeprefix(f"{path}: ")
        rows.append((slide, str(path), n_patches, problem))
    return pd.DataFrame(rows, columns=["slide_id", "path", "n_patches", "problem"])


def _difference(file: SlideFile, expected: Features) -> str:
    """What keeps a file from being one of the study's; '' where nothing does."""
    if file.n_patches == 0:  # Of any width: some tools write (0, 0).
        return "empty (0 patches)"
    if file.dim != expected.dim:
        return f"{file.dim} wide, expected {expected.dim}: features of another encoder"
    encoder = file.attributes.get("encoder") or expected.encoder
    first, second = ("".join(c for c in name.lower() if c.isalnum()) for name in (encoder, expected.encoder))
    if SAME_ENCODER.get(first, first) != SAME_ENCODER.get(second, second):
        return f"features of {encoder}, expected {expected.encoder}: other numbers, also where they are as wide"
    pairs = [("patch_size", expected.patch_size_px), ("target_magnification", expected.magnification)]
    differ = [
        f"{name} {file.attributes[name]}, expected {value:g}"
        for name, value in pairs
        if isinstance(file.attributes.get(name), int | float) and file.attributes[name] != value
    ]
    return f"other patches than the study's: {'; '.join(differ)}" if differ else ""


def problems_message(table: pd.DataFrame) -> str:
    """All problems of a preflight table in one text, slides with the same problem together; '' where there is none."""
    bad = table[table["problem"] != ""]
    if bad.empty:
        return ""
    lines = [f"{len(bad)} of {len(table)} slides cannot be used:"]
    for problem, group in bad.groupby("problem", sort=False):
        named = zip(group["slide_id"], group["path"], strict=True)
        names = [f"    {slide} ({path})" if path else f"    {slide}" for slide, path in named]
        more = [f"    ... and {len(names) - 20} more"] if len(names) > 20 else []
        lines += [f"  {problem}: {len(group)} slide(s)", *names[:20], *more]
    return "\n".join(lines)
