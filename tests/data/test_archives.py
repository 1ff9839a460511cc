import io
import os
import tarfile

import pytest

from steph import Refused
from steph.data.archives import RECORD, folder_of, unpack, unpacked

FILES = {"TCGA-SARC/a.h5": os.urandom(9000), "TCGA-SARC/b.h5": os.urandom(4000), "TCGA-SARC/deep/c.h5": b""}


def member(name, kind=tarfile.REGTYPE, size=0, **more):
    info = tarfile.TarInfo(name)
    info.type, info.size = kind, size
    for key, value in more.items():
        setattr(info, key, value)
    return info


def packed(files, extra=(), mode="w:gz"):
    """An archive of files by name and of further members, as bytes."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode=mode) as tape:
        tape.addfile(member("./", tarfile.DIRTYPE))
        for name, content in files.items():
            tape.addfile(member(name, size=len(content)), io.BytesIO(content))
        for info in extra:
            tape.addfile(info, io.BytesIO(b"x" * info.size))
    return file.getvalue()


def tar(path, files=FILES, mode="w:gz", extra=()):
    path.write_bytes(packed(files, extra, mode))
    return path


def opened(archive, folder):
    return unpack(archive, folder, archive.name, {"source": "test"})


MODES = {"x.tar.gz": "w:gz", "x.tgz": "w:gz", "x.TAR": "w"}


@pytest.mark.parametrize("name", MODES)
def test_every_kind_comes_out_as_it_went_in(tmp_path, name):
    archive = tar(tmp_path / name, mode=MODES[name])
    folder = folder_of(archive)
    (tmp_path / ".x.12345678.tmp" / "x").mkdir(parents=True)  # what a killed call left is removed
    assert folder == tmp_path / "x" and folder_of(tmp_path / "x.h5") is None
    assert opened(archive, folder) == 3
    assert {
        str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file() and p.name != RECORD
    } == FILES
    record = unpacked(folder)
    assert record["source"] == "test" and record["archive"] == name and not record["missing"]
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted([name, "x"])  # nothing temporary is left


@pytest.mark.parametrize("name", MODES)
def test_an_archive_that_is_broken_at_its_source_is_refused(tmp_path, name):
    archive = tar(tmp_path / name, mode=MODES[name])
    content, nothing = archive.read_bytes(), tar(tmp_path / name, {}, MODES[name]).read_bytes()
    for damaged in (content[: len(content) // 3], nothing, b"no archive", b""):
        archive.write_bytes(damaged)
        with pytest.raises(Refused, match=r"cannot be unpacked|holds no files"):
            opened(archive, tmp_path / "x")
        assert [p.name for p in tmp_path.iterdir()] == [name]


def test_lost_and_shortened_files_are_named(tmp_path):
    folder = tmp_path / "x"
    opened(tar(tmp_path / "x.tar.gz"), folder)
    (folder / "TCGA-SARC/a.h5").unlink()
    (folder / "TCGA-SARC/b.h5").write_bytes(b"short")
    assert unpacked(folder)["missing"] == ["TCGA-SARC/a.h5", "TCGA-SARC/b.h5"]


def test_a_folder_that_is_there_is_replaced_only_by_a_whole_one(tmp_path):
    folder = tmp_path / "x"
    opened(tar(tmp_path / "x.tar.gz"), folder)
    whole = (tmp_path / "x.tar.gz").read_bytes()
    (tmp_path / "x.tar.gz").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(Refused, match=r"x\.tar\.gz cannot be unpacked"):
        opened(tmp_path / "x.tar.gz", folder)
    assert not unpacked(folder)["missing"]
    opened(tar(tmp_path / "x.tar.gz", {"new.h5": b"new"}), folder)
    assert [p.name for p in folder.glob("*.h5")] == ["new.h5"] and not (folder / "TCGA-SARC").exists()


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
}


@pytest.mark.parametrize("name", BAD_TAR)
def test_a_tar_with_one_bad_member_leaves_nothing(tmp_path, name):
    home = tmp_path / "home"
    home.mkdir()
    bad = BAD_TAR[name]
    archive = tar(home / "x.tar.gz", extra=[bad])
    with pytest.raises(Refused) as refused:
        opened(archive, home / "x")
    assert "x.tar.gz" in str(refused.value) and repr(bad.name) in str(refused.value)
    assert [p.name for p in home.iterdir()] == ["x.tar.gz"] and [p.name for p in tmp_path.iterdir()] == ["home"]


def test_a_damaged_record_is_refused(tmp_path):
    opened(tar(tmp_path / "x.tar.gz"), tmp_path / "x")
    for text in ("[]", "{", '{"files": []}', ""):
        (tmp_path / "x" / RECORD).write_text(text)
        with pytest.raises(Refused, match="cannot be read"):
            unpacked(tmp_path / "x")
