"""steph.data.store: a store holds what was packed, and nothing else is taken for one."""

import shutil
from contextlib import suppress
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from steph import Refused
from steph.data import packing
from steph.data.features import find_slides
from steph.data.manifest import Features
from steph.data.packing import pack, write_store
from steph.data.store import Store
from steph.mil.state import load_state
from tests.data.test_features import DIM, cohort_of, write_h5
from tests.helpers.fabricate import LAYOUTS, fabricate, read

HALF = Features(encoder="UNI2-h", dim=DIM, precision="float16")
SINGLE = Features(encoder="UNI2-h", dim=DIM, precision="float32")


def packed(tmp_path, cohort=None, layout="trident", features=HALF, name="S.h5", seed=0, **more):
    cohort = cohort or cohort_of(4)
    if not (tmp_path / layout).exists():  # a store knows its files' times
        fabricate(cohort, tmp_path / layout, layout, DIM, 30, seed)
    return pack(tmp_path / name, cohort, find_slides([tmp_path / layout]), features, **more)


@pytest.mark.parametrize("features", [HALF, SINGLE], ids=lambda f: f.precision)
def test_a_store_holds_the_files_rounded_once(tmp_path, features):
    cohort = cohort_of(4)
    store = packed(tmp_path, cohort, features=features)
    files = find_slides([tmp_path / "trident"])
    assert list(store.sizes) == cohort.slides["slide_id"].tolist()
    for slide in store.sizes:
        values, coords = read(files[slide])
        assert np.array_equal(store.bag([slide]).view(np.uint8), values.astype(features.precision).view(np.uint8))
        assert np.array_equal(store.coords_of([slide]), coords)
    assert store.features.dtype == features.precision and store.coords.dtype == np.int32
    assert torch.equal(store.tensor, torch.from_numpy(np.array(store.features)))
    store.verify()
    with pytest.raises(ValueError, match="read-only"):
        store.features[0] = 0


def test_any_tool_reads_the_same_through_hdf5_itself(tmp_path):
    store = packed(tmp_path)
    with h5py.File(store.path) as file:
        for name in ("features", "coords"):
            assert file[name].chunks is None and file[name].compression is None
            assert np.array_equal(file[name][:], getattr(store, name))
            assert file[name].id.get_offset() % 4096 == 0
        assert file["content_sha256"][()].decode() == store.fingerprint
        assert dict(file.attrs)["encoder"] == b"UNI2-h" and file.attrs["magnification"] == 20
        # HDF5 can follow pointers of a damaged file for ever: no text lies behind one.
        texts = [name for name in file.attrs if h5py.check_string_dtype(file.attrs.get_id(name).dtype)]
        assert {"format", "encoder"} <= set(texts)
        assert all(h5py.check_string_dtype(file.attrs.get_id(name).dtype).length for name in texts)
        assert not any(h5py.check_vlen_dtype(value.dtype) for value in file.values())


def test_float16_is_rounded_to_nearest_within_the_stated_error(tmp_path):
    rng = np.random.default_rng(0)
    bits = rng.integers(0, 2**32, 200_000, dtype=np.uint32).view(np.float32)
    values = bits[np.isfinite(bits) & (np.abs(bits) < 65_504)]
    values = np.concatenate([values, rng.normal(size=10_000).astype("f4"), np.float32([65_504, 6e-8, -0.0, 2**-25])])
    values = values[: len(values) // DIM * DIM].reshape(-1, DIM)
    store = write_store(tmp_path / "S.h5", HALF, [(values, None)], {"A": len(values)}, {})
    assert np.array_equal(store.features.view(np.uint16), values.astype(np.float16).view(np.uint16))
    error = np.abs(store.features.astype(np.float64) - values)
    assert (error <= np.maximum(np.abs(values.astype(np.float64)) * 2.0**-11, 2.0**-25)).all()


def test_the_same_slides_have_the_same_fingerprint_whatever_wrote_them(tmp_path):
    fingerprints = {layout: packed(tmp_path, layout=layout, name=f"{layout}.h5").fingerprint for layout in LAYOUTS}
    assert len(set(fingerprints.values())) == 1, fingerprints
    assert packed(tmp_path / "b", seed=1).fingerprint not in fingerprints.values()
    assert packed(tmp_path / "c", features=SINGLE).fingerprint not in fingerprints.values()
    other = HALF.model_copy(update={"encoder": "other"})
    assert packed(tmp_path / "d", features=other).fingerprint not in fingerprints.values()


def test_a_patients_slides_lie_side_by_side_even_where_the_table_scatters_them(tmp_path):
    cohort = cohort_of(3, 3)
    scattered = type(cohort)(cohort.dataset, cohort.slides.iloc[[0, 3, 6, 1, 4, 7, 2, 5, 8]].reset_index(drop=True))
    store = packed(tmp_path, scattered)
    assert list(store.sizes) == [slide for slides in scattered.slides_of.values() for slide in slides]
    backwards = list(store.sizes)[::-1]
    assert np.array_equal(store.bag(backwards), np.concatenate([store.bag([s]) for s in backwards]))


def test_slides_without_coordinates_have_minus_one(tmp_path):
    cohort = cohort_of(1, 2)
    first, second = cohort.slides["slide_id"]
    write_h5(tmp_path / f"f/{first}.h5")
    torch.save(torch.randn(3, DIM), tmp_path / f"f/{second}.pt")
    store = pack(tmp_path / "S.h5", cohort, find_slides([tmp_path / "f"]), HALF)
    assert (store.coords_of([first]) >= 0).all() and (store.coords_of([second]) == -1).all()


@pytest.mark.parametrize("share", [0, 0.001, 0.02, 0.3, 0.6, 0.9, 1])
def test_a_truncated_store_is_refused(tmp_path, share):
    path = packed(tmp_path).path
    whole = path.read_bytes()
    path.write_bytes(whole[: min(int(len(whole) * share), len(whole) - 1)])
    with pytest.raises(Refused, match="not a whole feature store"):
        Store.open(path)


def test_foreign_missing_and_unfinished_stores_are_refused(tmp_path):
    with pytest.raises(Refused, match="steph data pack"):
        Store.open(tmp_path / "none.h5")
    with pytest.raises(Refused, match="format is None"):
        Store.open(write_h5(tmp_path / "slide.h5"))
    (tmp_path / "text.h5").write_text("hello")
    with pytest.raises(Refused, match="not a whole feature store"):
        Store.open(tmp_path / "text.h5")
    packing._lay_out(tmp_path / "unfilled.h5", HALF, {"A": 3, "B": 4}, {})
    with pytest.raises(Refused, match=r"not a whole feature store|not those it was finished with"):
        Store.open(tmp_path / "unfilled.h5")


@pytest.mark.parametrize("name", ["slide_ids", "offsets", "sha256", "encoder"])
def test_a_store_whose_lists_were_altered_is_refused(tmp_path, name):
    path = packed(tmp_path).path
    with h5py.File(path, "r+") as file:
        if name == "encoder":
            file.attrs["encoder"] = np.bytes_("other")
        elif name == "slide_ids":
            file["slide_ids"][:2] = file["slide_ids"][:2][::-1]
        else:
            file[name][1] = file[name][1] + 1
    with pytest.raises(Refused, match="not those it was finished with"):
        Store.open(path)


@pytest.mark.parametrize("array", ["features", "coords"])
def test_a_slide_whose_bytes_changed_is_named_when_asked_to_verify_and_when_it_is_first_read(
    tmp_path, monkeypatch, array
):
    store = packed(tmp_path)
    first, second, *_ = store.sizes
    with h5py.File(store.path, "r+") as file:
        row = store.places[second][1].start
        file[array][row] = file[array][row] + 1
    store = Store.open(store.path)  # only lists and hashes are read here
    store.bag([first])
    for ask in (lambda _: store.verify(), store.bag, store.coords_of):
        with pytest.raises(Refused, match=rf"1 slide\(s\) are not what was packed: {second}\."):
            ask([first, second])
    monkeypatch.setattr("steph.data.store.slide_hash", None)
    store.bag([first])  # and only once


def test_a_store_of_other_files_than_the_study_names_is_refused_with_all_differences(tmp_path):
    cohort = cohort_of(4)
    store = packed(tmp_path, cohort)
    found = find_slides([tmp_path / "trident"])
    store.matches(HALF, cohort, found)
    store.matches(HALF, cohort, {})
    moved = {s: Path(shutil.copy(p, tmp_path / p.name)) for s, p in found.items()}
    store.matches(HALF, cohort, moved)  # a copy elsewhere, of another time, holds the same
    store.matches(HALF.model_copy(update={"encoder": "uni_v2"}), cohort, found)  # another name of one encoder

    other = Features(encoder="CONCH", dim=DIM, precision="float32", patch_size_px=512, magnification=10)
    with pytest.raises(Refused) as refused:
        store.matches(other, cohort_of(5), found, "steph data pack --study s --dataset d")
    for words in ("encoder is UNI2-h, the study says CONCH", "patch_size_px", "magnification", "precision", "lacks 2",
                  "`steph data pack --study s --dataset d`"):  # fmt: skip
        assert words in str(refused.value)

    slide = list(store.sizes)[2]
    write_h5(moved[slide], n=77)
    with pytest.raises(Refused, match="1 source file") as refused:
        store.matches(HALF, cohort, moved)
    assert slide in str(refused.value)


def test_slides_that_come_soon_are_asked_for_from_the_disk(tmp_path, monkeypatch):
    store, asked = packed(tmp_path), []
    slides = list(store.sizes)[2::-2]
    monkeypatch.setattr("os.posix_fadvise", lambda file, start, size, how: asked.append((start, size)))
    store.prefetch(slides)
    whole = store.path.read_bytes()
    assert [whole[start : start + size] for start, size in asked] == [store.bag([s]).tobytes() for s in slides]
    monkeypatch.delattr("os.posix_fadvise")
    store.prefetch(slides)  # a system without such a call


@given(st.binary(max_size=300), st.integers(0, 4000), st.sampled_from(["h5", "pt", "store", "safetensors"]))
def test_damaged_files_are_refused_or_what_they_were(tmp_path_factory, junk, at, kind):
    """Bytes overwritten somewhere, or the file cut there."""
    folder = tmp_path_factory.mktemp("damaged")
    path, features, slide = folder / f"slide.{kind}", np.arange(40.0, dtype="f4").reshape(5, DIM), "S1"
    if kind == "h5":
        write_h5(path, features=features)
    elif kind == "pt":
        torch.save(torch.from_numpy(features), path)
    elif kind == "store":
        write_store(path, SINGLE, [(features, None)], {slide: 5}, {})
    else:
        save_file({"a": torch.from_numpy(features)}, path)
    content = path.read_bytes()
    at %= len(content)
    path.write_bytes(content[:at] + junk + content[at + len(junk) :] if len(junk) % 2 else content[:at])
    with suppress(Refused):
        if kind == "store":
            assert np.array_equal(Store.open(path).bag([slide]), features)
        elif kind == "safetensors":
            load_state(path)
        else:
            read(path)
