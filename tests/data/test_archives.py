import io
import os
import tarfile
import zipfile

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from steph import Refused
from steph.data import archives
from steph.data.archives import RECORD, folder_of, is_archive, missing_files, unpack, unpacked

FILES = {"TCGA-SARC/a.h5": os.urandom(9000), "TCGA-SARC/b.h5": os.urandom(4000), "TCGA-SARC/deep/c.h5": b""}


def tar(path, files=FILES, mode="w:gz", extra=()):
    with tarfile.open(path, mode) as tape:
        folder = tarfile.TarInfo("./")
        folder.type = tarfile.DIRTYPE
        tape.addfile(folder)
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tape.addfile(info, io.BytesIO(content))
        for info in extra:
            tape.addfile(info, io.BytesIO(b"x" * info.size))
    return path


def zipped(path, files=FILES, extra=()):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.mkdir("TCGA-SARC")
        for name, content in files.items():
            archive.writestr(name, content)
        for info in extra:
            archive.writestr(info, b"/etc/passwd")
    return path


def opened(archive, folder):
    return unpack(archive, folder, archive.name, {"source": "test"})


MAKERS = {
    "x.tar.gz": lambda path: tar(path),
    "x.tgz": lambda path: tar(path),
    "x.tar": lambda path: tar(path, mode="w"),
    "x.zip": lambda path: zipped(path),
}


@pytest.mark.parametrize("name", MAKERS)
def test_every_kind_comes_out_as_it_went_in(tmp_path, name):
    archive = MAKERS[name](tmp_path / name)
    folder = folder_of(archive)
    assert is_archive(name) and folder.name == "x"
    assert opened(archive, folder) == 3
    assert {
        str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file() and p.name != RECORD
    } == FILES
    record = unpacked(folder)
    assert record["source"] == "test" and record["archive"] == name and not missing_files(folder, record)
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted([name, "x"])  # nothing temporary is left


def test_lost_and_shortened_files_are_named(tmp_path):
    folder = tmp_path / "x"
    opened(tar(tmp_path / "x.tar.gz"), folder)
    (folder / "TCGA-SARC/a.h5").unlink()
    (folder / "TCGA-SARC/b.h5").write_bytes(b"short")
    assert missing_files(folder, unpacked(folder)) == ["TCGA-SARC/a.h5", "TCGA-SARC/b.h5"]


def test_a_folder_that_is_there_is_replaced_only_by_a_whole_one(tmp_path):
    folder = tmp_path / "x"
    opened(tar(tmp_path / "x.tar.gz"), folder)
    whole = (tmp_path / "x.tar.gz").read_bytes()
    (tmp_path / "x.tar.gz").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(Refused, match=r"x\.tar\.gz is damaged or cut off"):
        opened(tmp_path / "x.tar.gz", folder)
    assert not missing_files(folder, unpacked(folder))
    opened(tar(tmp_path / "x.tar.gz", {"new.h5": b"new"}), folder)
    assert [p.name for p in folder.glob("*.h5")] == ["new.h5"] and not (folder / "TCGA-SARC").exists()


def member(name, kind=tarfile.REGTYPE, size=0, **more):
    info = tarfile.TarInfo(name)
    info.type, info.size = kind, size
    for key, value in more.items():
        setattr(info, key, value)
    return info


BAD_TAR = {
    "parent": member("../outside.h5", size=3),
    "hidden parent": member("TCGA-SARC/../../outside.h5", size=3),
    "absolute": member("/tmp/outside.h5", size=3),
    "folder outside": member("../outside", tarfile.DIRTYPE),
    "symlink": member("link.h5", tarfile.SYMTYPE, linkname="/etc/passwd"),
    "link inside": member("link.h5", tarfile.SYMTYPE, linkname="TCGA-SARC/a.h5"),
    "hard link": member("link.h5", tarfile.LNKTYPE, linkname="../outside"),
    "device": member("null.h5", tarfile.CHRTYPE, devmajor=1, devminor=3),
    "pipe": member("pipe.h5", tarfile.FIFOTYPE),
    "line break": member("a\nsteph: all is well.h5", size=3),
    "backslash": member("..\\outside.h5", size=3),
    "drive": member("C:/outside.h5", size=3),
    "twice": member("TCGA-SARC/a.h5", size=3),
    "our record": member(RECORD, size=3),
    "file as a folder": member("TCGA-SARC/a.h5/inside.h5", size=3),
}


@pytest.mark.parametrize("name", BAD_TAR)
def test_a_tar_with_one_bad_member_leaves_nothing(tmp_path, name):
    home = tmp_path / "home"
    home.mkdir()
    bad = BAD_TAR[name]
    archive = tar(home / "x.tar.gz", extra=[bad])
    with pytest.raises(Refused) as refused:
        opened(archive, home / "x")
    assert "x.tar.gz" in str(refused.value)
    assert name == "file as a folder" or repr(bad.name) in str(refused.value)
    assert [p.name for p in home.iterdir()] == ["x.tar.gz"] and [p.name for p in tmp_path.iterdir()] == ["home"]


def link_info():
    info = zipfile.ZipInfo("link.h5")
    info.external_attr = 0o120777 << 16
    return info


@pytest.mark.parametrize(
    "bad",
    [zipfile.ZipInfo("../outside.h5"), zipfile.ZipInfo("/tmp/outside.h5"), zipfile.ZipInfo("../out/"), link_info()],
    ids=lambda info: info.filename,
)  # fmt: skip
def test_a_zip_with_one_bad_member_leaves_nothing(tmp_path, bad):
    archive = zipped(tmp_path / "x.zip", extra=[bad])
    with pytest.raises(Refused) as refused:
        opened(archive, tmp_path / "x")
    assert bad.filename.rstrip("/") in str(refused.value) and [p.name for p in tmp_path.iterdir()] == ["x.zip"]


def test_an_archive_of_nothing_is_refused(tmp_path):
    with pytest.raises(Refused, match="holds no files"):
        opened(tar(tmp_path / "x.tar", {}, "w"), tmp_path / "x")


@pytest.mark.parametrize("name", MAKERS)
def test_cut_off_anywhere_it_is_refused(tmp_path, name):
    archive = MAKERS[name](tmp_path / name)
    whole = archive.read_bytes()
    # What a tar holds ends at 15,360; a first empty block must follow, and a second, before the padding.
    last = 15360 + 512 if name.endswith(".tar") else len(whole) - 1
    for cut in sorted({last * share // 20 for share in range(21)} | {512, 1024, last - 4}):
        archive.write_bytes(whole[:cut])
        with pytest.raises(Refused, match=r"damaged or cut off|holds no files"):
            opened(archive, tmp_path / "x")
        assert [p.name for p in tmp_path.iterdir()] == [name], cut


def test_a_tar_cut_between_two_members_is_refused(tmp_path):
    archive = tar(tmp_path / "x.tar", {"a.h5": b"a" * 512, "b.h5": b"b" * 512}, "w")
    archive.write_bytes(archive.read_bytes()[: 512 * 3])  # the folder, the header and the content of a.h5
    with pytest.raises(Refused, match="its end is missing"):
        opened(archive, tmp_path / "x")


@settings(max_examples=60)
@given(data=st.data())
def test_flipped_bits_never_end_in_another_error(tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("flipped")
    name = data.draw(st.sampled_from(sorted(MAKERS)))
    archive = MAKERS[name](folder / name)
    content = bytearray(archive.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    archive.write_bytes(content)
    try:
        opened(archive, folder / "x")
    except Refused:
        assert [p.name for p in folder.iterdir()] == [name]


def test_a_full_disk_is_said_and_leaves_nothing(tmp_path, monkeypatch):
    archive = tar(tmp_path / "x.tar.gz")
    usage = archives.shutil.disk_usage(tmp_path)
    monkeypatch.setattr(archives.shutil, "disk_usage", lambda folder: usage._replace(free=5000))
    with pytest.raises(archives.Stop, match="is full while it is unpacked"):
        opened(archive, tmp_path / "x")
    assert [p.name for p in tmp_path.iterdir()] == ["x.tar.gz"]


def test_a_damaged_record_is_refused(tmp_path):
    opened(tar(tmp_path / "x.tar.gz"), tmp_path / "x")
    for text in ('{"files": {"a.h5": "9"}}', "[]", "{", '{"files": []}', ""):
        (tmp_path / "x" / RECORD).write_text(text)
        with pytest.raises(Refused, match="cannot be read"):
            unpacked(tmp_path / "x")
    (tmp_path / "x" / RECORD).write_text('{"files": {"../../etc/passwd": 9}}')
    with pytest.raises(Refused, match=r"etc/passwd' leads out"):
        missing_files(tmp_path / "x", unpacked(tmp_path / "x"))
