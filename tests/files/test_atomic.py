"""steph.files.atomic: files and folders are whole or not there; what the disk refuses is a sentence."""

import errno

import pytest

from steph import Refused
from steph.files.atomic import DiskFull, atomic_folder, atomic_path, free_bytes, in_words, refuse_full_disk


def test_a_file_is_replaced_once_it_is_whole(tmp_path):
    path = tmp_path / "deep" / "a.txt"
    for text in ("old", "new"):
        with atomic_path(path) as temporary:
            temporary.write_text(text)
            assert not path.exists() or path.read_text() == "old"
    with pytest.raises(RuntimeError), atomic_path(path) as temporary:
        temporary.write_text("half")
        raise RuntimeError
    assert path.read_text() == "new" and [file.name for file in path.parent.iterdir()] == ["a.txt"]


@pytest.mark.parametrize("replace", [True, False])
def test_a_folder_takes_the_place_of_another_where_it_may(tmp_path, replace):
    path = tmp_path / "m"
    path.mkdir()
    (path / "old").touch()
    with atomic_folder(path, lambda: replace) as folder:
        (folder / "sub").mkdir()
        (folder / "sub" / "new").touch()
    assert [file.name for file in path.iterdir()] == ["sub" if replace else "old"]
    assert [file.name for file in tmp_path.iterdir()] == ["m"]


@pytest.mark.parametrize("taken", ["file", "folder", "link"])
def test_a_new_folder_overwrites_nothing(tmp_path, taken):
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_text("mine")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    with pytest.raises(Refused, match=r"is there already and is left as it is"), atomic_folder(tmp_path / taken):
        raise AssertionError
    assert (tmp_path / "file").read_text() == "mine"


# ------------------------------------------------------------------------------------------------ what the disk refuses


@pytest.mark.parametrize("make", [atomic_path, atomic_folder])
@pytest.mark.parametrize(
    ("error", "message"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), "no space left in {folder} for r"),
        (OSError(errno.EDQUOT, "Disk quota exceeded"), "no space left in {folder} for r"),
        (RuntimeError("I/O error: No space left on device (os error 28)"), "no space left in {folder} for r"),
        (OSError(errno.EROFS, "Read-only file system"), "cannot write {folder}/r: .*Read-only"),
        (PermissionError("read-only"), "no permission to write {folder}/r: read-only"),
        (FileNotFoundError(errno.ENOENT, "No such file or directory", "input"), "No such file.*'input'"),
        (ZeroDivisionError("1 / 0"), "1 / 0"),
    ],
)
def test_a_failed_write_leaves_nothing_and_what_the_disk_refuses_is_a_sentence(tmp_path, make, error, message):
    folder = tmp_path / "deep"
    with pytest.raises(Exception, match=message.format(folder=folder)) as raised, make(folder / "r") as temporary:
        (temporary if make is atomic_path else temporary / "half").write_text("half")
        raise error
    expected = DiskFull if "no space" in message else Refused if "write" in message else type(error)
    assert type(raised.value) is expected and list(folder.iterdir()) == []


def test_a_place_where_no_folder_can_be_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    for make in (atomic_path, atomic_folder):
        with pytest.raises(Refused, match="cannot write"), make(tmp_path / "file" / "m"):
            raise AssertionError


def test_too_little_room_is_said_with_how_much_is_missing(tmp_path):
    below = tmp_path / "not" / "yet"
    assert free_bytes(below) == pytest.approx(free_bytes(tmp_path), rel=0.1)
    refuse_full_disk(below, 1, "nothing much")
    with pytest.raises(DiskFull, match=r"no space for ten stores: 1000000000\.0 GB are needed, .* GB too little"):
        refuse_full_disk(below, 1e18, "ten stores")


def test_sizes_in_words():
    words = {0: "0 bytes", 999: "999 bytes", 1500: "1.5 kB", 2.5e9: "2.5 GB", 1e13: "10000.0 GB"}
    assert {size: in_words(size) for size in words} == words
