"""steph.data.preflight: what a file says and holds and what the study asks are compared once, for every command."""

import h5py
import numpy as np
import pytest
import torch

from steph import Refused
from steph.data import features as feature_files
from steph.data.features import find_slides, open_slide
from steph.data.manifest import Features
from steph.data.preflight import check_slides, problems_message
from tests.data.test_features import DIM, write_h5

ASKED = Features(encoder="UNI2-h", dim=DIM, patch_size_px=256, magnification=20)
GRID = np.arange(10).reshape(5, 2) * 256


def values(n=5, dim=DIM, seed=0):
    return np.random.default_rng(seed).normal(size=(n, dim)).astype("f4")


def row(path, features=ASKED, content=True):
    return check_slides([path.stem], {path.stem: path}, features, content).iloc[0]


# ------------------------------------------------------------------------------------------------ what a file says


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("encoder", "uni_v2", ""),
        ("patch_encoder", "MahmoodLab/UNI2-h", ""),
        ("encoder", "None", ""),
        ("encoder", h5py.Empty("f"), ""),
        ("encoder", "gigapath", "features of gigapath, expected UNI2-h"),
        ("Encoder-Name", np.bytes_("uni_v1"), "features of uni_v1"),
        ("encoder", np.array(["hoptimus0"], dtype=h5py.string_dtype()), "features of hoptimus0"),
        ("encoder", "our ViT", "say so in `encoder_aliases`"),
        ("target_magnification", 20.0, ""),
        ("magnification", "20x", ""),
        ("magnification", 40, "magnification 40, expected 20"),
        ("target_magnification", np.array([40]), "magnification 40, expected 20"),
        ("target_magnification", "40", "magnification 40, expected 20"),
        ("magnification", np.array([b"10X"]), "magnification 10, expected 20"),
        ("magnification", "high", "magnification high, expected 20"),
        ("patch_size", np.array([256, 256]), ""),
        ("patch_size", "256px", ""),
        ("patch_size", np.array([512, 512]), "patch_size 512, expected 256"),
        ("patch_size", [256, 512], "patch_size 512, expected 256"),
        ("overlap", 0, ""),
        ("overlap", 128, "overlap 128, expected 0"),
        ("overlap", np.array([64.0]), "overlap 64, expected 0"),
        ("patch_size_level0", 512, ""),
        ("level0_magnification", 40, ""),
    ],
)
@pytest.mark.parametrize("part", ["/", "features", "coords", "made", "made/by"])
def test_what_a_file_says_of_itself_is_compared_wherever_and_however_it_says_it(tmp_path, name, value, words, part):
    path = write_h5(tmp_path / "a.h5")
    with h5py.File(path, "a") as file:
        (file.require_group(part) if "made" in part else file[part]).attrs[name] = value
    assert (words in row(path)["problem"]) if words else (row(path)["problem"] == "")


def test_a_study_may_name_its_encoder_otherwise_and_take_patches_that_overlap(tmp_path):
    path = write_h5(tmp_path / "a.h5")
    with h5py.File(path, "a") as file:
        file.attrs.update(encoder="our ViT", overlap=128)
    assert row(path, ASKED.model_copy(update={"encoder_aliases": ["Our-ViT"], "overlap_px": 128}))["problem"] == ""


def test_all_statements_of_a_file_count_and_a_mixed_data_set_is_named_slide_by_slide(tmp_path):
    for i in range(12):
        path = write_h5(tmp_path / f"S{i:02d}.h5", features=values(seed=i))
        with h5py.File(path, "a") as file:
            file["features"].attrs["encoder"] = "gigapath" if i < 4 else "uni_v2"
            file["coords"].attrs["target_magnification"] = 40 if 3 <= i < 6 else 20
    with h5py.File(tmp_path / "S11.h5", "a") as file:
        file["coords"].attrs["encoder"] = "conch_v1"  # its features say uni_v2
    files = find_slides([tmp_path])
    message = problems_message(check_slides(files, files, ASKED))
    assert "7 of 12 slides cannot be used" in message
    assert "features of gigapath, expected UNI2-h; if both" in message and "study's features: 4 slide(s)" in message
    assert "magnification 40, expected 20: 2 slide(s)" in message and "features of conch_v1" in message
    assert all(f"S{i:02d}.h5" in message for i in (0, 1, 2, 3, 4, 5, 11)) and "S06" not in message


# ------------------------------------------------------------------------------------------------ absent data


def dataset(values, name="features", **settings):
    """A way to write a dataset of a file."""
    return lambda file, _: file.create_dataset(name, data=values, **settings)


def written_part(shape, rows, name="features", **settings):
    """A way to write a dataset of which only some rows are written."""
    return lambda file, _: file.create_dataset(name, shape, "f4", **settings).write_direct(
        values(rows), dest_sel=np.s_[:rows]
    )


def early(chunks=None, name="features", shape=(5, DIM), kind="<f4"):
    """A way to lay out a dataset that nothing is written to."""

    def write(file, _):
        settings = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
        settings.set_alloc_time(h5py.h5d.ALLOC_TIME_EARLY)
        if chunks:
            settings.set_chunk(chunks)
        space, kind_ = h5py.h5s.create_simple(shape), h5py.h5t.py_create(np.dtype(kind))
        h5py.h5d.create(file.id, name.encode(), kind_, space, settings)

    return write


def virtual(file, other):
    layout = h5py.VirtualLayout((5, DIM), "f4")
    layout[:] = h5py.VirtualSource(str(other), "features", (5, DIM))
    file.create_virtual_dataset("features", layout)


def link(target, name="features"):
    def write(file, other):
        file[name] = h5py.ExternalLink(str(other), target) if target.startswith("//") else h5py.SoftLink(target)

    return write


ABSENT = {
    "chunks never written": (written_part((50, DIM), 40, chunks=(10, DIM)), "'features' was never fully written"),
    "chunks of few columns": (written_part((50, DIM), 40, chunks=(10, 3), fillvalue=2), "never fully written"),
    "compressed chunks": (written_part((50, DIM), 40, chunks=(10, DIM), compression="gzip"), "never fully written"),
    "grown": (written_part((50, DIM), 40, chunks=(50, DIM), fillvalue=2), "10 of 50 patches hold one number alone"),
    "never written": (lambda file, _: file.create_dataset("features", (5, DIM), "f4"), "never fully written"),
    "of another fill value": (
        lambda file, _: file.create_dataset("features", (5, DIM), "f4", fillvalue=np.nan),
        "never fully written",
    ),
    "laid out, never filled": (early(), "5 of 5 patches are all zero"),
    "chunks laid out": (early((2, DIM)), "5 of 5 patches are all zero"),
    "half filled": (dataset(np.concatenate([values(), np.zeros((3, DIM))])), "3 of 8 patches are all zero"),
    "half filled with 7": (dataset(np.concatenate([values(), np.full((3, DIM), 7)])), "3 of 8 patches hold one number"),
    "external": (
        lambda file, other: file.create_dataset("features", data=values(), external=[(str(other), 0, 160)]),
        "lie in other files",
    ),
    "virtual": (virtual, "lie in other files"),
    "soft link": (link("/gone"), "'features' is a link to what is not there"),
    "link to itself": (link("/features"), "a link to what is not there"),
    "external link": (link("//features"), "a link to what is not there"),
    "a group": (lambda file, _: file.create_group("features"), "no dataset 'features' with numbers, but <HDF5 group"),
    "a type": (lambda file, _: file.__setitem__("features", np.dtype("f4")), "with numbers, but <HDF5 named type"),
    "an empty one": (lambda file, _: file.__setitem__("features", h5py.Empty("f4")), "but <HDF5 dataset"),
    "no patch": (dataset(np.zeros((0, 0), "f4"), maxshape=(None, None), chunks=(1, 1)), "empty (0 patches)"),
    "one number": (dataset(np.float32(3)), "features of shape ()"),
    "a row": (dataset(values()[0]), "features of shape (8,)"),
    "records": (dataset(np.zeros(5, [("x", "f4"), ("y", "f4")])), "not floating point"),
    "text": (dataset(np.array([["a"] * DIM] * 5, dtype=object), dtype=h5py.string_dtype()), "not floating point"),
    "ragged": (lambda file, _: file.create_dataset("features", (5,), h5py.vlen_dtype("f4")), "'features'"),
    "whole numbers": (dataset(np.ones((5, DIM), int)), "not floating point"),
    "complex": (dataset(values().astype("c8")), "not floating point"),
    "turned": (
        dataset(values().T),
        "5 wide, expected 8: features of another encoder (are rows and columns exchanged?)",
    ),
    "turned, with coords": (dataset(values().T), "coords of shape (5, 2) do not fit features of shape (8, 5)"),
    "coords linked": (link("/gone", "coords"), "'coords' is a link to what is not there"),
    "coords of another file": (link("//coords", "coords"), "'coords' is a link to what is not there"),
    "coords a group": (
        lambda file, _: file.create_group("coords"),
        "no dataset 'coords' with numbers, but <HDF5 group",
    ),
    "coords never written": (lambda file, _: file.create_dataset("coords", (5, 2), "i8"), "'coords' was never fully"),
    "coords half filled": (
        dataset(np.array([[1, 2], [3, 4], [0, 0], [0, 0], [0, 0]]), "coords"),
        "3 of 5 patches lie at 0, 0",
    ),
    "coords longer": (dataset(np.ones((6, 2), int), "coords"), "coords of shape (6, 2) do not fit"),
    "coords of one number": (dataset(3, "coords"), "coords of shape () do not fit"),
    "coords turned": (dataset(np.ones((2, 5), int), "coords"), "coords of shape (2, 5) do not fit"),
}


@pytest.mark.parametrize("how", ABSENT)
def test_absent_data_are_refused_in_whatever_form(tmp_path, how):
    write, words = ABSENT[how]
    path, other = tmp_path / "a.h5", tmp_path / "other.bin"
    with h5py.File(path, "w") as file:
        write(file, other)
        if "features" not in list(file):
            file["features"] = values()
        if how == "turned, with coords":
            file["coords"] = GRID
    other.unlink(missing_ok=True)
    assert words in row(path)["problem"]


def test_numbers_in_another_file_are_not_taken_even_where_they_are_there(tmp_path):
    write_h5(tmp_path / "whole.h5")
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file["features"] = h5py.ExternalLink("whole.h5", "/features")
    assert "lie in other files" in row(tmp_path / "a.h5")["problem"]
    with h5py.File(tmp_path / "b.h5", "w") as file:
        file["data"] = values()
        file["features"] = h5py.SoftLink("/data")
    assert row(tmp_path / "b.h5")["problem"] == "", "a link within the file is none"


def test_a_filter_that_is_not_installed_is_named_with_its_remedy(tmp_path):
    with h5py.File(tmp_path / "a.h5", "w") as file:
        settings = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
        settings.set_chunk((5, DIM))
        settings.set_filter(60999, h5py.h5z.FLAG_OPTIONAL, (3,))
        space, kind = h5py.h5s.create_simple((5, DIM)), h5py.h5t.py_create(np.dtype("<f4"))
        dataset = h5py.h5d.create(file.id, b"features", kind, space, settings)
        dataset.write_direct_chunk((0, 0), b"x" * 160, 0)
    problem = row(tmp_path / "a.h5", content=False)["problem"]
    assert "filter 60999" in problem and "`pip install hdf5plugin`" in problem


# ------------------------------------------------------------------------------------------------ content


def spoiled(value, at=(3, 2)):
    changed = values()
    changed[at] = value
    return changed


@pytest.mark.parametrize(
    ("features", "words"),
    [
        (spoiled(np.nan), "1 features are not finite"),
        (spoiled(-np.inf), "1 features are not finite"),
        (spoiled(1e6), "too large for float16"),
        (np.zeros((5, DIM), "f4"), "5 of 5 patches are all zero"),
        (spoiled(0, 4), "1 of 5 patches are all zero"),
        (np.zeros((1, DIM), "f4"), "1 of 1 patches are all zero"),
        (np.full((5, DIM), 0.25, "f4"), "constant: all 5 patches"),
        (np.arange(5)[:, None] + np.ones((5, DIM)), "5 of 5 patches hold one number alone"),
        (np.repeat(values(1), 5, axis=0), "constant: all 5 patches"),
        (values(1), ""),
        (values(), ""),
        (values().astype("f2"), ""),
    ],
)
@pytest.mark.parametrize("ending", ["h5", "pt"])
def test_content_is_looked_at_whole_and_only_when_asked(tmp_path, features, words, ending, monkeypatch):
    monkeypatch.setattr(feature_files, "BLOCK_BYTES", 2 * DIM * 4)  # of two patches
    path = tmp_path / f"a.{ending}"
    if ending == "h5":
        write_h5(path, features=features, coords=None)
    else:
        torch.save(torch.from_numpy(features), path)
    half = ASKED.model_copy(update={"precision": "float16"})
    problem = row(path, half)["problem"]
    assert (words in problem) if words else problem == ""
    assert row(path, half, content=False)["problem"] == ""


@pytest.mark.parametrize(
    ("coords", "note"),
    [
        (GRID.astype("f4"), ""),
        (GRID[None].astype("f8"), ""),
        (GRID + 0.5, "coords are not whole numbers"),
        (np.where(GRID == 0, np.nan, GRID), "coords are not whole numbers"),
        (np.hstack([GRID, GRID]), "coords of shape (5, 4)"),
        (np.hstack([GRID, GRID[:, :1]]), "coords of shape (5, 3)"),
        (np.zeros((5, 2), int), "coords are all the same"),
        (GRID.astype("c8"), "type complex64 are not x and y"),
        (GRID[:, 0], ""),
        (GRID.astype("S5"), "coords of shape (5, 2)"),
    ],
)
def test_coordinates_are_cast_where_that_is_exact_else_the_slide_goes_without_and_says_so(tmp_path, coords, note):
    path = write_h5(tmp_path / "a.h5", coords=coords)
    slide = row(path)
    if coords.ndim == 1:
        assert "do not fit" in slide["problem"]
        return
    assert slide["problem"] == "" and note in slide["note"]
    with open_slide(path) as file:
        places = file.read()[1]
    assert np.array_equal(places, GRID) if not note else places is None
    told = "\n".join(check_slides(["a"], {"a": path}, ASKED).attrs["remarks"])
    assert (note in told and "no map of attention" in told) if note else not told


# ------------------------------------------------------------------------------------------------ several slides


def clam(folder, counts):
    """h5_files/ and pt_files/ of slides with so many patches in each; None: no file."""
    for name, (in_h5, in_pt) in counts.items():
        if in_h5:
            write_h5(folder / f"h5_files/{name}.h5", features=values(in_h5), coords=None)
        if in_pt:
            (folder / "pt_files").mkdir(exist_ok=True, parents=True)
            torch.save(torch.from_numpy(values(in_pt)), folder / f"pt_files/{name}.pt")
    files = find_slides([folder])
    return check_slides(counts, files, ASKED).set_index("slide_id", drop=False)


def test_an_h5_and_its_pt_agree(tmp_path):
    table = clam(tmp_path / "a", {"A": (5, 5), "B": (7, 5), "C": (6, None), "D": (None, 8)})
    assert "was the extraction cut off?" in table.loc["C", "note"] and "cut off" not in table.loc["A", "note"]
    assert table["problem"].astype(bool).to_dict() == {"A": False, "B": True, "C": False, "D": False}
    assert "(7, 8), but (5, 8) in" in table.loc["B", "problem"]


def test_slides_of_equal_content_are_told(tmp_path):
    for name, seed in (("A", 1), ("B", 2), ("C", 1)):
        write_h5(tmp_path / f"{name}.h5", features=values(seed=seed))
    files = find_slides([tmp_path])
    assert check_slides(files, files, ASKED).attrs["remarks"] == [
        "2 of 3 slides: the same features; is one a copy? (A, C)"
    ]


def test_a_missing_slide_names_the_nearest_file_and_files_of_no_slide_are_told(tmp_path):
    for name in ("P01-A1", "P02_A1", "P03-A1", "P03-A2", "Other"):
        write_h5(tmp_path / f"{name}.h5", features=values(seed=len(name)))
    files = find_slides([tmp_path])
    table = check_slides(["P01-A1", "p02-a1", "P03-A1", "Q9"], files, ASKED)
    message = problems_message(table)
    assert "missing: 2 slide(s)" in message and f"    p02-a1 (nearest file: {files['P02_A1']})" in message
    assert message.endswith("    Q9"), "none is near"
    assert "3 of 5 slide files are of no slide in the table (Other.h5, P02_A1.h5, P03-A2.h5)" in table.attrs["remarks"]
    many = check_slides([f"P{i:04d}" for i in range(3_000)], files, ASKED)
    assert problems_message(many).count("\n") == 22, "one problem, however many slides"


@pytest.mark.parametrize("at", [0, 150, 299, 5_000, 9_999])
def test_a_stamp_tells_slides_apart_by_first_middle_and_last_patches(tmp_path, at):
    n = 300 if at < 300 else 10_000
    features = values(n)
    before = write_h5(tmp_path / "a.h5", n, features=features)
    features[at, 3] += 1
    after = write_h5(tmp_path / "b.h5", n, features=features)
    with open_slide(before) as first, open_slide(after) as second:
        assert first.stamp() == first.stamp() != second.stamp()


def test_a_file_that_is_not_readable_is_a_problem_of_its_slide(tmp_path):
    path = write_h5(tmp_path / "a.h5")
    path.write_bytes(path.read_bytes()[:-9])
    assert "truncated" in row(path)["problem"]
    with pytest.raises(Refused, match="truncated"), open_slide(path):
        pass
