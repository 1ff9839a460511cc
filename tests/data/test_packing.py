"""steph.data.packing: files become a store, whole or not at all; it goes on where it was killed or a disk was full."""

import contextlib
import shutil
import signal
import subprocess
import sys
import threading

import numpy as np
import pytest

from steph import PROJECT, Refused
from steph.data import features as feature_files
from steph.data import packing
from steph.data.features import SlideFile, find_slides
from steph.data.packing import pack, write_store
from steph.data.store import Store
from tests.data.test_features import DIM, bad_files, cohort_of, write_h5
from tests.data.test_store import HALF, SINGLE, packed
from tests.helpers.fabricate import fabricate


def test_nothing_is_written_where_files_are_bad_and_all_are_named(tmp_path):
    expected = bad_files(tmp_path / "f")
    cohort = cohort_of(1, len(expected))
    cohort.slides["slide_id"] = list(expected)
    with pytest.raises(Refused) as refused:
        pack(tmp_path / "out/S.h5", cohort, find_slides([tmp_path / "f"]), HALF)
    for slide, words in expected.items():
        assert slide in str(refused.value) and words in str(refused.value)
    assert "--allow-missing" in str(refused.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("value", "features", "words"),
    [
        (np.nan, HALF, "not finite"),
        (np.inf, SINGLE, "not finite"),
        (-np.inf, HALF, "not finite"),
        (65_520, HALF, "too large for float16"),
        (1e39, SINGLE, "too large for float32"),
    ],
)
def test_values_that_cannot_be_kept_are_refused_naming_slide_and_file(tmp_path, value, features, words):
    cohort = cohort_of(1, 2)
    slides = cohort.slides["slide_id"].tolist()
    write_h5(tmp_path / f"f/{slides[0]}.h5")
    values = np.random.default_rng(0).normal(size=(5, DIM))
    values[3, 2] = value
    path = write_h5(tmp_path / f"f/{slides[1]}.h5", features=values)
    with pytest.raises(Refused, match=words) as refused:
        pack(tmp_path / "S.h5", cohort, find_slides([tmp_path / "f"]), features)
    assert slides[1] in str(refused.value) and str(path) in str(refused.value)
    assert not (tmp_path / "S.h5").exists()


def test_missing_and_empty_slides_are_left_out_on_request_and_recorded(tmp_path):
    cohort = cohort_of(3, 3)
    slides = cohort.slides["slide_id"].tolist()
    files = fabricate(cohort, tmp_path / "f", "trident", DIM, 30)
    files[slides[0]].unlink()
    write_h5(files[slides[4]], n=0)
    found = find_slides([tmp_path / "f"])
    with pytest.raises(Refused, match="2 of 9 slides"):
        pack(tmp_path / "S.h5", cohort, found, HALF)
    store = pack(tmp_path / "S.h5", cohort, found, HALF, allow_missing=True)
    assert list(store.sizes) == [s for s in slides if s not in (slides[0], slides[4])]
    assert [(row["slide_id"], row["reason"]) for row in store.provenance["left_out"]] == [
        (slides[0], "missing"),
        (slides[4], "empty (0 patches)"),
    ]
    store.matches(HALF, cohort, found)
    fabricate(cohort, tmp_path / "f", "trident", DIM, 30)
    with pytest.raises(Refused, match="2 source file"):
        store.matches(HALF, cohort, find_slides([tmp_path / "f"]))


def test_damaged_slides_and_patients_without_any_are_refused_even_where_missing_ones_are_allowed(tmp_path):
    cohort = cohort_of(3, 2)
    files = fabricate(cohort, tmp_path / "f", "trident", DIM, 30)
    damaged, *of_p1 = (files[slide] for slide in ("P0-DX1.AB-01", "P1-DX0.AB-10", "P1-DX1.AB-11"))
    whole = damaged.read_bytes()
    damaged.write_bytes(whole[:-10])
    with pytest.raises(Refused, match="truncated"):
        pack(tmp_path / "S.h5", cohort, find_slides([tmp_path / "f"]), HALF, allow_missing=True)
    damaged.write_bytes(whole)
    for path in of_p1:
        path.unlink()
    with pytest.raises(Refused, match=r"1 patient\(s\) have no slide with features: P1\b"):
        pack(tmp_path / "S.h5", cohort, find_slides([tmp_path / "f"]), HALF, allow_missing=True)


def test_write_store_refuses_what_does_not_fit_and_leaves_nothing(tmp_path):
    rng = np.random.default_rng(0)
    cases = [
        ((2, DIM), None, r"slide B: features \(2, 8\); expected 3 patches 8 wide"),
        ((4, DIM), None, "expected 3 patches"),
        ((3, 9), None, "8 wide"),
        ((3, DIM), np.full((3, 2), 2**31), "32 bits"),
    ]
    for shape, coords, words in cases:
        slides = [(rng.normal(size=(3, DIM)), None), (rng.normal(size=shape), coords)]
        with pytest.raises(Refused, match=words):
            write_store(tmp_path / "S.h5", HALF, iter(slides), {"A": 3, "B": 3}, {})
        assert not list(tmp_path.iterdir())


def test_write_store_keeps_its_provenance_and_is_the_same_file_every_time(tmp_path):
    rng = np.random.default_rng(0)
    sizes = {f"S{i}": i + 1 for i in range(5)}
    slides = [(rng.normal(size=(n, DIM)), rng.integers(0, 9, (n, 2))) for n in sizes.values()]
    first, second = (
        write_store(tmp_path / name, SINGLE, slides, sizes, {"seed": 0, "name": "é"}) for name in ("a.h5", "b.h5")
    )
    assert first.provenance == {"seed": 0, "name": "é"}
    assert first.path.read_bytes() == second.path.read_bytes()


KILLED = """
import os, signal, sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from tests.data.test_features import cohort_of
from tests.data.test_store import HALF
from steph.data import features, packing
features.BLOCK_BYTES = 10 * 8 * 4
real, log, blocks_left = features.SlideFile.blocks, open(sys.argv[3], "a", buffering=1), [int(sys.argv[4])]
def watched(slide):
    print(slide.path.name, file=log)
    for block in real(slide):
        yield block
        blocks_left[0] -= 1
        if blocks_left[0] == 0:
            os.kill(os.getpid(), signal.SIGKILL)
features.SlideFile.blocks = watched
folder = Path(sys.argv[2])
packing.pack(folder / "S.h5", cohort_of(4), features.find_slides([folder / "clam"]), HALF)
"""


def kill_after(tmp_path, n_blocks):
    """Pack in another process that kills itself after `n_blocks` blocks; the slides it began, in order."""
    log = tmp_path / "read.log"
    arguments = [sys.executable, "-c", KILLED, str(PROJECT), str(tmp_path), str(log), str(n_blocks)]
    ended = subprocess.run(arguments, capture_output=True, text=True)
    assert ended.returncode == -signal.SIGKILL, ended.stderr
    return log.read_text().split()


class Interrupted(Exception):
    """Stands in for a kill where a whole new process would only cost time."""


def interrupt_after(tmp_path, monkeypatch, n_blocks):
    """Pack in this process and stop after `n_blocks` blocks, or when all slides are in and their list is not."""
    monkeypatch.setattr(feature_files, "BLOCK_BYTES", 10 * DIM * 4)
    left = iter(range(n_blocks))
    real = SlideFile.blocks

    def stop(*_):
        raise Interrupted

    def stopping(slide):
        for block in real(slide):
            yield stop() if next(left, None) is None else block

    with monkeypatch.context() as patched, pytest.raises(Interrupted):
        patched.setattr(SlideFile, "blocks", stopping)
        patched.setattr(packing._Writer, "finish", stop)
        packed(tmp_path, layout="clam")


@pytest.fixture
def read_now(monkeypatch):
    """The names of the files that are read from here on."""
    names = []
    real = SlideFile.blocks
    monkeypatch.setattr(SlideFile, "blocks", lambda slide: names.append(slide.path.name) or real(slide))
    return names


def test_killed_in_the_middle_it_goes_on_and_ends_the_same(tmp_path, read_now):
    whole = packed(tmp_path, layout="clam", name="whole.h5")
    began = kill_after(tmp_path, 12)
    assert 2 < len(began) < 8, "the kill must fall between the first slide and the last"
    assert not (tmp_path / "S.h5").exists() and (tmp_path / ".S.h5.partial").exists()
    read_now.clear()
    resumed = packed(tmp_path, layout="clam")
    assert read_now[0] == began[-1], "the slide that was begun is read again, those finished before are not"
    assert not set(began[:-1]) & set(read_now) and len(set(began) | set(read_now)) == 8
    assert resumed.fingerprint == whole.fingerprint
    assert resumed.path.read_bytes() == whole.path.read_bytes()
    resumed.verify()
    assert not list(tmp_path.glob(".S.h5*")), "nothing is left lying about"


@pytest.mark.parametrize("n_blocks", [0, 1, 9, 19, 1000])
def test_stopped_anywhere_it_ends_the_same(tmp_path, monkeypatch, n_blocks):
    whole = packed(tmp_path, layout="clam", name="whole.h5")
    interrupt_after(tmp_path, monkeypatch, n_blocks)
    assert packed(tmp_path, layout="clam").path.read_bytes() == whole.path.read_bytes()


def test_what_was_packed_before_is_only_trusted_with_its_hash(tmp_path, monkeypatch, read_now):
    whole = packed(tmp_path, layout="clam", name="whole.h5")
    interrupt_after(tmp_path, monkeypatch, 12)
    with (tmp_path / ".S.h5.partial").open("rb+") as file:
        file.seek(whole.features.offset)
        file.write(bytes(64))  # As after a power cut: pages that never reached the disk.
    read_now.clear()
    assert packed(tmp_path, layout="clam").path.read_bytes() == whole.path.read_bytes()
    assert read_now[0].startswith(next(iter(whole.sizes)))


@pytest.mark.parametrize("change", ["size", "precision", "order", "damaged partial"])
def test_a_partial_of_other_files_is_not_gone_on_with(tmp_path, monkeypatch, read_now, change):
    cohort, features = cohort_of(4), HALF
    interrupt_after(tmp_path, monkeypatch, 12)
    found = find_slides([tmp_path / "clam"])
    if change == "size":
        write_h5(found["P3-DX1.AB-31"], n=7)
        (tmp_path / "clam/pt_files/P3-DX1.AB-31.pt").unlink()  # of another extraction now
    elif change == "precision":
        features = SINGLE
    elif change == "order":
        cohort = type(cohort)(cohort.dataset, cohort.slides.iloc[::-1].reset_index(drop=True))
    else:
        (tmp_path / ".S.h5.partial").write_bytes(b"half a file")
    read_now.clear()
    store = pack(tmp_path / "S.h5", cohort, found, features)
    assert len(read_now) == 8
    store.verify()


def test_a_second_packing_of_the_same_store_is_refused(tmp_path, monkeypatch):
    cohort = cohort_of(4)
    fabricate(cohort, tmp_path / "f", "trident", DIM, 30)
    found = find_slides([tmp_path / "f"])
    inside, leave = threading.Event(), threading.Event()
    real = SlideFile.blocks

    def waiting(slide):
        inside.set()
        leave.wait(20)
        return real(slide)

    monkeypatch.setattr(SlideFile, "blocks", waiting)
    arguments = (tmp_path / "S.h5", cohort, found, HALF)
    first = threading.Thread(target=pack, args=arguments)
    first.start()
    assert inside.wait(20)
    with pytest.raises(Refused, match="another process is packing"):
        pack(*arguments)
    leave.set()
    first.join()
    Store.open(tmp_path / "S.h5").verify()


def test_memory_is_bounded_by_the_block_not_by_the_slide(tmp_path, monkeypatch):
    cohort = cohort_of(1, 1)
    slide = cohort.slides["slide_id"][0]
    values = np.random.default_rng(0).normal(size=(5_000, DIM)).astype("f4")
    write_h5(tmp_path / f"f/{slide}.h5", features=values, coords=None)
    monkeypatch.setattr(feature_files, "BLOCK_BYTES", 100 * DIM * 4)
    held = []
    real = SlideFile.read
    monkeypatch.setattr(
        SlideFile, "read", lambda slide, *rows: held.append(real(slide, *rows)[0].nbytes) or real(slide, *rows)
    )
    store = pack(tmp_path / "S.h5", cohort, find_slides([tmp_path / "f"]), SINGLE)
    assert len(held) >= 50 and max(held) <= feature_files.STAMP_ROWS * DIM * 4
    assert np.array_equal(store.features, values)
    one_block = write_store(tmp_path / "T.h5", SINGLE, [(values, None)], {slide: 5_000}, {})
    assert one_block.fingerprint == store.fingerprint, "the size of the blocks is no part of the content"


def test_a_disk_that_is_too_small_or_that_holds_no_such_folder_is_refused_before_anything_is_written(
    tmp_path, monkeypatch
):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9 - 100, 100))
    with pytest.raises(Refused, match=r"no space for .*S.h5 .* are needed, .* kB too little"):
        packed(tmp_path)
    assert not list(tmp_path.glob("*S.h5*")) and not list(tmp_path.glob(".*"))
    (tmp_path / "file").touch()
    with pytest.raises(Refused, match="cannot write"):
        packed(tmp_path, name="file/S.h5")


def test_a_disk_that_fills_up_meanwhile_is_refused_and_gone_on_with(tmp_path, monkeypatch):
    def full(self, *arguments):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(packing._Writer, "_write", full)
        with pytest.raises(Refused, match=r"no space left in .* for S\.h5"):
            packed(tmp_path)
    assert not (tmp_path / "S.h5").exists()
    packed(tmp_path).verify()


def test_on_a_real_disk_that_fills_up_it_says_so_then_how_much_is_missing_and_goes_on(
    tmp_path, small_disk, monkeypatch, read_now
):
    cohort = cohort_of(4)
    fabricate(cohort, tmp_path / "f", "trident", DIM, 1500)
    arguments = cohort, find_slides([tmp_path / "f"]), HALF
    whole = pack(tmp_path / "whole.h5", *arguments)
    counted, left = SlideFile.blocks, [3]

    def filling(slide):
        left[0] -= 1
        if left[0] == 0:  # somebody else takes what is left
            with (small_disk / "other").open("wb", buffering=0) as file, contextlib.suppress(OSError):
                while True:
                    file.write(bytes(4096))
        return counted(slide)

    with monkeypatch.context() as patched:
        patched.setattr(SlideFile, "blocks", filling)
        with pytest.raises(Refused, match=r"no space left in .* for S\.h5"):
            pack(small_disk / "S.h5", *arguments)
    assert not (small_disk / "S.h5").exists(), "nothing is taken for a store that is none"
    read_now.clear()
    with pytest.raises(Refused, match=r"no space for .*S.h5 .* kB are needed, .* has 0 bytes free, .* kB too little"):
        pack(small_disk / "S.h5", *arguments)
    assert not read_now, "it is said before anything is read again"
    (small_disk / "other").unlink()
    assert pack(small_disk / "S.h5", *arguments).fingerprint == whole.fingerprint
    assert 0 < len(read_now) < 8, "slides that were packed before the disk was full are not read again"
    assert [path.name for path in small_disk.iterdir()] == ["S.h5"]
