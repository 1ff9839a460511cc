"""The door for slide files: what they say of themselves, what they hold and what the study asks for, compared in one
place for `steph data check`, `steph data pack` and `steph predict` alike."""

from collections.abc import Iterable
from difflib import get_close_matches
from pathlib import Path

import numpy as np
import pandas as pd

from steph import Refused
from steph.data.features import SlideFile, match_slides, open_slide
from steph.data.manifest import Features
from steph.data.store import COORDS, DTYPES
from steph.files.progress import track
from steph.files.tables import shortened

DISPENSABLE = r"missing|empty \(0 patches\)|.*; extract the slide again"
"""Problems of slides without features, or with such as tell nothing: a patient who has others may do without."""
LISTED = 20  # slides of one problem
Blocks = Iterable[tuple[np.ndarray, np.ndarray | None]]  # a slide's features and coordinates, piece by piece


def check_slides(
    slides: Iterable[str], files: dict[str, Path], features: Features, content: bool = False
) -> pd.DataFrame:
    """The preflight table, a row per slide: slide_id, path, n_patches, problem (empty where the file can be used), note
    (what else is to be known), stamp (`SlideFile.stamp`). ``.attrs["remarks"]``: notes on slides that can be used,
    copies among them, files that are of no slide.

    content: read all of a file, for numbers that are of no use (`checked`); else its header and a few patches.
    """
    matches = match_slides(slides, files)
    matched = {path for paths in matches.values() for path in paths}
    unused = {stem.lower(): path for stem, path in files.items() if path not in matched}
    missing = [slide for slide, paths in matches.items() if not paths]
    rows: list[tuple[object, ...]] = []
    owners: dict[Path, str] = {}
    for slide, paths in track(matches.items(), "read slides") if content and len(matches) > 1 else matches.items():
        path = paths[0] if len(paths) == 1 else None
        n_patches, problem, note, stamp = None, "", "", ""
        if slide in missing[:LISTED]:
            nearest = get_close_matches(slide.lower(), unused, n=1)
            note = f"nearest file: {unused[nearest[0]]}" if nearest else ""
        if path is None:
            problem = f"may mean any of: {', '.join(map(str, paths))}" if paths else "missing"
        elif owners.setdefault(path, slide) != slide:
            problem = f"the file is also that of slide {owners[path]}"
        else:
            try:
                with open_slide(path) as file:
                    n_patches = file.n_patches
                    note = _examine(file, features, content)
                    stamp = file.stamp()
            except Refused as error:
                problem = str(error).removeprefix(f"{path}: ")
        rows.append((slide, path and str(path), n_patches, problem, note, stamp))
    table = pd.DataFrame(rows, columns=["slide_id", "path", "n_patches", "problem", "note", "stamp"])
    usable = table[table["problem"] == ""]
    copies = usable[usable["stamp"].duplicated(keep=False)].groupby("stamp")
    groups = [*usable.groupby("note"), *(("the same features; is one a copy?", same) for _, same in copies)]
    named = [(f"{len(of)} of {len(table)} slides: {what}", [*of["slide_id"]]) for what, of in groups if what]
    nobodys = (
        f"{len(unused)} of {len(files)} slide files are of no slide in the table",
        [p.name for p in unused.values()],
    )
    table.attrs["remarks"] = [f"{what} ({shortened(names)})" for what, names in (*named, nobodys) if names]
    return table


def _examine(file: SlideFile, expected: Features, content: bool) -> str:
    """A note on a file. Raises `Refused` for what keeps it from being one of the study's."""
    if file.n_patches == 0:  # Of any width: some tools write (0, 0).
        raise Refused("empty (0 patches)")
    if file.dim != expected.dim:
        turned = " (are rows and columns exchanged?)" if file.n_patches == expected.dim else ""
        raise Refused(f"{file.dim} wide, expected {expected.dim}: features of another encoder{turned}")
    for encoder in file.stated["encoder"]:
        if not expected.is_encoder(encoder):
            same = "if both are names of one, say so in `encoder_aliases` of the study's features"
            raise Refused(f"features of {encoder}, expected {expected.encoder}; {same}")
    sizes = {"patch_size": expected.patch_size_px, "magnification": expected.magnification}
    differ = [
        f"{what} {value if isinstance(value, str) else f'{value:g}'}, expected {asked:g}"
        for what, asked in {**sizes, "overlap": expected.overlap_px}.items()
        for value in file.stated[what]
        if value != asked
    ]
    if differ:
        raise Refused(f"other patches than the study's: {'; '.join(differ)}")
    cut_off = _compare_tensor(file)
    for _ in checked(file.blocks(), DTYPES[expected.precision]) if content else ():
        pass
    bare = "no coordinates, so no map of attention and no network that needs them (Patch-GCN)"
    return "; ".join(filter(None, (file.note, bare if file.coords is None else "", cut_off)))


def _compare_tensor(file: SlideFile) -> str:
    """A note on an h5 without the .pt that CLAM writes behind it. Raises `Refused` where the two differ."""
    folder = file.path.parent
    folder = folder.with_name("pt_files") if folder.name == "h5_files" else folder
    tensor = folder / f"{file.path.stem}.pt"
    if file.path.suffix == ".h5" and tensor.is_file():
        with open_slide(tensor) as other:
            shape, beside = (file.n_patches, file.dim), (other.n_patches, other.dim)
        if shape != beside:
            raise Refused(f"{shape}, but {beside} in {tensor}: remove what is wrong, or extract both again")
    lacks = folder.name == "pt_files" and folder.is_dir() and not tensor.is_file()
    return "no .pt in pt_files, which CLAM writes last: was the extraction cut off?" if lacks else ""


def checked(blocks: Blocks, dtype: np.dtype) -> Blocks:
    """The blocks of a slide. Raises `Refused`, behind the last, for content that cannot be used in a number format."""
    spans, placed, not_finite, constant, reference = [], [], 0, True, None
    for features, coords in blocks:
        yield features, coords
        values = features.astype(np.float32) if features.dtype.itemsize == 2 else features  # numpy is slow in half
        spans.append((values.min(axis=1), values.max(axis=1)))
        if not np.isfinite(spans[-1]).all():  # not finite where one of a patch's numbers is not
            not_finite += int((~np.isfinite(values)).sum())
        reference = values[:1].copy() if reference is None else reference
        constant = constant and bool((values == reference).all())
        placed.append(np.zeros((0, 2)) if coords is None else coords)
    (low, high), places, limits = np.concatenate(spans, axis=1), np.concatenate(placed), np.iinfo(COORDS)
    n, uniform, largest = len(low), low == high, max(-low.min(), high.max())
    zero, unplaced = int((uniform & (low == 0)).sum()), int((places == 0).all(axis=1).sum())
    wider = ", or say `precision: float32` in the study's features" if dtype == DTYPES["float16"] else ""
    too_far = ((places < limits.min) | (places > limits.max)).any()
    unwritten = "as what was never written; extract the slide again"
    problems = {
        f"{not_finite} features are not finite (nan or inf); extract the slide again": not_finite,
        f"{zero} of {n} patches are all zero, {unwritten}": zero,
        f"constant: all {n} patches have the same features; extract the slide again": n > 1 and constant,
        f"{uniform.sum()} of {n} patches hold one number alone, {unwritten}": n > 1 and uniform.any(),
        f"features up to {largest:.3g} are too large for {dtype.name}; check the encoder{wider}": largest
        > np.finfo(dtype).max,
        f"{unplaced} of {n} patches lie at 0, 0, {unwritten}": 1 < unplaced < n,
        "coords beyond the range of level-0 pixels (32 bits)": too_far,
    }
    for problem, is_there in problems.items():
        if is_there:
            raise Refused(problem)


def problems_message(table: pd.DataFrame) -> str:
    """All problems of a preflight table in one text, slides with the same problem together; '' where there is none."""
    bad = table[table["problem"] != ""]
    if bad.empty:
        return ""
    lines = [f"{len(bad)} of {len(table)} slides cannot be used:"]
    for problem, group in bad.groupby("problem", sort=False):
        named = zip(group["slide_id"], group["path"].fillna(group["note"]), strict=True)
        names = [f"    {slide} ({where})".removesuffix(" ()") for slide, where in named]
        more = [f"    ... and {len(names) - LISTED} more"] if len(names) > LISTED else []
        lines += [f"  {problem}: {len(group)} slide(s)", *names[:LISTED], *more]
    return "\n".join(lines)
