"""steph.data.features: every layout in the wild is read, every bad file is named, and nothing in a file is run."""

import pickle
import re
from pathlib import Path

import h5py
import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from steph import Refused
from steph.data import features
from steph.data.cohort import COLUMNS, cohort_from
from steph.data.features import find_slides, match_slides, open_slide
from steph.data.manifest import Features
from steph.data.preflight import check_slides, problems_message
from tests.helpers.fabricate import LAYOUTS, fabricate, read

DIM = 8
PLAIN = Features(encoder="e", dim=DIM)
UUIDS = [f"0{i}a1b2c3-D4E5-4f60-8a7b-9c0d1e2f3a4b" for i in range(3)]


def cohort_of(n_patients=3, slides_each=2, name="LUNG", project="LUAD"):
    patients = [(f"P{p}", project, 100 * (p + 1), p % 2) for p in range(n_patients)]
    rows = [(p, f"{p}-DX{s}.AB-{p[1:]}{s}", *label) for p, *label in patients for s in range(slides_each)]
    return cohort_from(pd.DataFrame(rows, columns=COLUMNS), name, "")


def write_h5(path, n=5, dim=DIM, dtype="f4", **more):
    path.parent.mkdir(parents=True, exist_ok=True)
    values, places = np.random.default_rng(n).normal(1, 1, (n, dim)), np.arange(2 * n).reshape(n, 2) * 256
    arrays = {"features": values.astype(dtype), "coords": places} | more
    with h5py.File(path, "w") as file:
        for name, value in arrays.items():
            if value is not None:
                file[name] = value
    return path


# ------------------------------------------------------------------------------------------------ finding


def test_hidden_files_locks_and_other_files_are_passed_over_and_links_followed(tmp_path):
    write_h5(tmp_path / "in/deep/A.h5")
    write_h5(tmp_path / "elsewhere/B.h5")
    for junk in ("._A.h5", ".C.h5", "D.h5.lock", "E.csv", ".hidden/F.h5", "patches/A_patches.h5"):
        (tmp_path / "in" / junk).parent.mkdir(exist_ok=True)
        (tmp_path / "in" / junk).touch()
    (tmp_path / "in/link").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "in/loop").symlink_to(tmp_path / "in")
    assert sorted(find_slides([tmp_path / "in"])) == ["A", "B"]
    assert sorted(find_slides([tmp_path / "in", tmp_path / "in/deep"])) == ["A", "B"], "a folder named twice is one"
    assert find_slides([tmp_path / "nowhere"]) == {}


def test_clam_output_gives_its_h5_and_a_pt_alone_counts(tmp_path):
    fabricate(cohort_of(), tmp_path, "clam", DIM, 4)
    found = find_slides([tmp_path])
    assert len(found) == 6 and {p.suffix for p in found.values()} == {".h5"}
    found["P0-DX0.AB-00"].unlink()
    assert find_slides([tmp_path])["P0-DX0.AB-00"].suffix == ".pt"


def test_one_slide_in_two_places_is_refused_naming_both(tmp_path):
    first, second = write_h5(tmp_path / "a/S.h5"), write_h5(tmp_path / "b/S.h5")
    with pytest.raises(Refused) as refused:
        find_slides([tmp_path])
    assert str(first) in str(refused.value) and str(second) in str(refused.value)


def test_uuid_may_be_left_out_on_either_side_but_not_contradict(tmp_path):
    one, two, three = UUIDS
    names = f"A-DX1.{one}", "B-DX1", f"C-DX1.{one}", f"D-DX1.{one}", f"D-DX1.{two}", "S1", "S2.rescan", "S3"
    asked = "A-DX1", f"B-DX1.{three}", f"C-DX1.{two}", "D-DX1", f"D-DX1.{two}", "S1.rescan", "S2", "S3.1", "S1"
    matched = match_slides(asked, {name: Path("f") / name for name in names})
    assert [[path.name for path in paths] for paths in matched.values()] == [
        [names[0]], ["B-DX1"], [], [*names[3:5]], [names[4]], [], [], [], ["S1"],
    ], "any other ending is another slide's, a rescan or a second block"  # fmt: skip
    names = "P1.svs", f"A-DX1.{one}.svs", "P2.ome.tif", "P3", "P3.svs", "P4.svs", "P4.ndpi", "P5.rescan.svs", "\u00e9 6"
    asked = "P1", f"A-DX1.{one}", "P2", "P3", "P4", "P5", "\u00e9 6"
    matched = match_slides(asked, {name: Path("f") / name for name in names})
    assert [[path.name for path in paths] for paths in matched.values()] == [
        [names[0]], [names[1]], [names[2]], ["P3"], [*names[5:7]], [], [names[8]],
    ], "an ending of slides behind a name is none of it"  # fmt: skip


def test_a_file_that_would_serve_two_slides_or_a_slide_with_two_files_is_a_problem(tmp_path):
    one, two, _ = UUIDS
    found = {n: write_h5(tmp_path / f"{n}.h5") for n in ("A", f"B.{one}", f"B.{two}")}
    problems = check_slides([f"A.{one}", f"A.{two}", "B"], found, PLAIN)["problem"].tolist()
    assert problems[:2] == ["", f"the file is also that of slide A.{one}"]
    assert f"B.{one}.h5" in problems[2] and f"B.{two}.h5" in problems[2]


# ------------------------------------------------------------------------------------------------ reading


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_are_read_the_same(tmp_path, layout):
    slide, path = next(iter(fabricate(cohort_of(), tmp_path, layout, DIM, 50, seed=3).items()))
    reference = fabricate(cohort_of(), tmp_path / "other", "trident", DIM, 50, seed=3)[slide]
    values, coords = read(path)
    with h5py.File(reference) as file:
        assert np.array_equal(values, file["features"][:]) and np.array_equal(coords, file["coords"][:])
    with open_slide(path) as slide:
        assert (slide.n_patches, slide.dim) == (len(values), DIM)
        assert slide.stated.get("magnification") == ([20] if layout == "trident" else None)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("legacy", [False, True])
def test_pt_tensors(tmp_path, dtype, legacy):
    tensor = torch.randn(1, 7, DIM).to(dtype)
    torch.save(tensor, tmp_path / "A.pt", _use_new_zipfile_serialization=not legacy)
    values, coords = read(tmp_path / "A.pt")
    assert coords is None and torch.equal(torch.from_numpy(values.copy()).double(), tensor[0].double())


def test_blocks_are_bounded_whole_chunks_and_cover_the_file_once(tmp_path, monkeypatch):
    monkeypatch.setattr(features, "BLOCK_BYTES", 10 * DIM * 4)
    values = np.arange(101 * DIM, dtype="f4").reshape(101, DIM)
    with h5py.File(tmp_path / "A.h5", "w") as file:
        file.create_dataset("features", data=values, chunks=(4, DIM), compression="gzip")
    with open_slide(tmp_path / "A.h5") as slide:
        pieces = [piece for piece, _ in slide.blocks()]
    assert [len(p) for p in pieces] == [8] * 12 + [5], "as many whole chunks of 4 rows as fit into 10 rows"
    assert np.array_equal(np.concatenate(pieces), values)


# ------------------------------------------------------------------------------------------------ bad files


class Trap:
    """Unpickling it would create a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def bad_files(folder):
    """One file of every bad kind: slide id -> words its problem must have."""
    ones, trap = torch.ones(5, DIM), Trap(folder / "RAN")
    h5 = {
        "empty": ({"n": 0}, "empty (0 patches)"),
        "emptybatch": ({"features": np.ones((1, 0, DIM), "f4"), "coords": np.ones((1, 0, 2), int)}, "empty (0 pat"),
        "wide": ({"dim": DIM + 1}, "9 wide, expected 8"),
        "nokey": (
            {"features": None, "feats": np.ones((5, DIM))},
            "no dataset 'features'; the file holds: coords, feats",
        ),
        "integers": ({"dtype": "i4"}, "not floating point"),
        "shortcoords": ({"coords": np.ones((4, 2), int)}, "(4, 2) do not fit"),
        "fourdim": ({"features": np.ones((2, 5, DIM), "f4")}, "(2, 5, 8)"),
    }
    pt = {
        "object": (trap, "Pickles run code"),
        "dict": ({"features": ones}, "holds a dict"),
        "list": ([ones], "holds a list"),
        "hollow": (torch.empty(5, DIM, device="meta"), "without values"),
        "integerspt": (ones.int(), "not floating point"),
        "eightbits": (ones.to(torch.float8_e4m3fn), "float8_e4m3fn, not floating point of 16 to 64 bits"),
    }
    whole_h5 = write_h5(folder / "good.h5").read_bytes()
    torch.save(ones, folder / "cutpt.pt")
    damaged = {
        "cut.h5": (whole_h5[:-9], "truncated"),
        "nothing.h5": (b"", "truncated or not an HDF5"),
        "text.h5": (b"not found (404)", "not an HDF5"),
        "pickled.pt": (pickle.dumps(trap), "Pickles run code"),
        "cutpt.pt": ((folder / "cutpt.pt").read_bytes()[:-50], "truncated"),
        "nothingpt.pt": (b"", "truncated"),
    }
    for slide, (options, _) in h5.items():
        write_h5(folder / f"{slide}.h5", **options)
    for slide, (value, _) in pt.items():
        torch.save(value, folder / f"{slide}.pt")
    for name, (content, _) in damaged.items():
        (folder / name).write_bytes(content)
    with h5py.File(folder / "unwritten.h5", "w") as file:
        file.create_dataset("features", (5, DIM), "f4", chunks=(2, DIM))[:2] = 1
    words = {Path(name).stem: words for name, (_, words) in {**h5, **pt, **damaged}.items()}
    return {"absent": "missing", "unwritten": "never fully written", **words}


def test_every_bad_file_is_in_one_table_and_one_message(tmp_path):
    expected = bad_files(tmp_path / "f")
    table = check_slides(["good", *expected], find_slides([tmp_path / "f"]), PLAIN).set_index("slide_id")
    assert table.loc["good", "problem"] == "" and table.loc["good", "n_patches"] == 5
    for slide, words in expected.items():
        assert words in table.loc[slide, "problem"], slide
    message = problems_message(table.reset_index())
    assert f"{len(expected)} of {len(expected) + 1} slides" in message
    for slide, words in expected.items():
        assert slide in message and words in message
    assert "good" not in message.replace("not a", "")
    assert not (tmp_path / "f/RAN").exists(), "code of a pickle was run"
    assert problems_message(table.loc[["good"]]) == ""
    long = problems_message(check_slides([f"S{i}" for i in range(300)], {}, PLAIN))
    assert "300 of 300" in long and "and 280 more" in long


@pytest.mark.parametrize("layout", ["contiguous", "chunked"])
def test_an_h5_cut_anywhere_is_refused(tmp_path, layout):
    with h5py.File(tmp_path / "A.h5", "w") as file:
        file.create_dataset("features", data=np.ones((64, DIM), "f4"), chunks=(8, DIM) if layout == "chunked" else None)
        file["coords"] = np.ones((64, 2), int)
    whole = (tmp_path / "A.h5").read_bytes()
    for share in (0, 0.001, 0.01, 0.1, 0.3, 0.5, 0.8, 0.99, 1):
        (tmp_path / "A.h5").write_bytes(whole[: min(int(len(whole) * share), len(whole) - 1)])
        with pytest.raises(Refused, match="truncated"):
            read(tmp_path / "A.h5")


def test_damage_inside_a_compressed_file_is_refused_when_read(tmp_path):
    with h5py.File(tmp_path / "A.h5", "w") as file:
        data = np.random.default_rng(0).normal(size=(64, DIM))
        chunk = file.create_dataset("features", data=data, chunks=(64, DIM), compression="gzip").id.get_chunk_info(0)
    content = bytearray((tmp_path / "A.h5").read_bytes())
    content[chunk.byte_offset + 100 : chunk.byte_offset + 200] = bytes(100)
    (tmp_path / "A.h5").write_bytes(content)
    with pytest.raises(Refused, match=r"A\.h5: not readable"):
        read(tmp_path / "A.h5")


def test_patches_of_another_size_than_the_studys_are_a_problem(tmp_path):
    fabricate(cohort_of(), tmp_path, "trident", DIM, 5)
    slides, found = cohort_of().slides["slide_id"], find_slides([tmp_path])
    same, other = (Features(encoder="e", dim=DIM, magnification=m) for m in (20, 10))
    assert (check_slides(slides, found, same)["problem"] == "").all()
    assert check_slides(slides, found, other)["problem"].str.contains("magnification 20, expected 10").all()


KINDS = st.sampled_from(["f2", "f4", "f8", ">f4", "i4", "u1", "?", "c8", "S3", "i8"])
SHAPES = st.lists(st.integers(0, 5), min_size=0, max_size=4).map(tuple)


@st.composite
def feature_files(draw):
    """What may stand in a feature file: arrays by name, and whether they are chunked."""
    names = draw(st.lists(st.sampled_from(["features", "coords", "feats", "annots"]), unique=True, max_size=3))
    n, dim = draw(st.integers(0, 5)), draw(st.integers(0, 4))
    made = {}
    for name in names:
        own = draw(st.sampled_from([(n, dim if name == "features" else 2), (1, n, dim if name == "features" else 2)]))
        shape = draw(st.one_of(st.just(own), SHAPES))
        kind = draw(st.one_of(st.just("f4" if name == "features" else "i8"), KINDS))
        made[name] = draw(hnp.arrays(np.dtype(kind), shape))
    return made, draw(st.booleans()), draw(st.booleans())


def is_of_a_known_layout(arrays):
    """What the module says that it reads."""
    features, coords = (arrays.get(name) for name in ("features", "coords"))
    if features is None or features.dtype.kind != "f":
        return False
    n = features.shape[-2] if features.ndim > 1 else 0
    placed = coords is None or int(np.prod(coords.shape[:-1])) == n
    return placed and (features.ndim == 2 or (features.ndim == 3 and features.shape[0] == 1))


def same(a, b):
    return a.shape == b.shape and np.array_equal(a, b, equal_nan=a.dtype.kind == "f")


@given(feature_files())
@example(({"features": np.ones((1, 3, 2), "f4"), "coords": np.ones((1, 3, 2), "i8")}, True, False))
@example(({"features": np.ones((1, 2), "f4"), "coords": np.ones((1, 2), "i8")}, False, False))
@example(({"features": np.ones((1, 1, 2), "f4"), "coords": np.ones((1, 1, 2), "i8")}, False, False))
def test_a_feature_file_is_read_as_it_is_or_refused(tmp_path_factory, made):
    arrays, chunked, grouped = made
    path = tmp_path_factory.mktemp("any") / "slide.h5"
    with h5py.File(path, "w") as file:
        if grouped and "features" not in arrays:
            file.create_group("features")
        for name, value in arrays.items():
            whole = chunked and value.size > 0 and value.ndim > 0
            file.create_dataset(name, data=value, **({"chunks": True, "compression": "gzip"} if whole else {}))
    table = check_slides(["slide"], {"slide": path}, Features(encoder="e", dim=2))
    features, coords = (arrays.get(name) for name in ("features", "coords"))
    if not is_of_a_known_layout(arrays):
        with pytest.raises(Refused, match=re.escape(str(path))):
            read(path)
        assert table["problem"][0]
        return
    expected = features.reshape(features.shape[-2:])
    assert (table["problem"][0] == "") == (len(expected) > 0 and expected.shape[1] == 2)
    with open_slide(path) as slide:
        assert (slide.n_patches, slide.dim) == expected.shape
        values, places = slide.read()
        pieces = list(slide.blocks())
    assert same(values, expected)
    if (
        coords is not None
        and coords.shape in {(len(expected), 2), (1, len(expected), 2)}
        and coords.dtype.kind in "iuf"
    ):
        exact = coords.dtype.kind != "f" or (np.isfinite(coords) & (coords == np.trunc(coords))).all()
        exact = exact and (len(expected) < 2 or (coords.reshape(-1, 2) != coords.reshape(-1, 2)[0]).any())
        assert same(places, coords.reshape(-1, 2).astype(int)) if exact else places is None
    else:
        assert places is None, "a slide goes without coordinates that are none"
    assert not pieces or same(np.concatenate([piece for piece, _ in pieces]), expected)
