"""Downloads by the real clients from servers on loopback; no network otherwise."""

import hashlib
import io
import os
import re
import select
import subprocess
import sys
import tarfile
import time

import h5py
import numpy as np
import pytest
import yaml

from steph import Refused
from steph.data import fetch
from steph.data.archives import unpacked
from steph.data.inventory import inventory
from steph.data.manifest import load_study
from steph.files import atomic
from steph.files.lock import exclusive
from tests.data.test_archives import member, packed
from tests.helpers import hub as loopback
from tests.helpers.command import steph
from tests.helpers.hub import Hub, dropped, flipped, ignores_range, serving, shifted, status, truncated, wrong_range

DIM = 16
SLEEP = time.sleep
PIECE = 1000


def slide(n, seed=0):
    """A feature file in the hub's layout, as bytes."""
    rng = np.random.default_rng(seed)
    file = io.BytesIO()
    with h5py.File(file, "w") as h5:
        h5["features"] = rng.standard_normal((1, n, DIM), dtype=np.float32)
        h5["coords"] = rng.integers(0, 9999, (1, n, 2))
    return file.getvalue()


def archive(project, slides=3, extra=(), patches=40):
    """An archive of slides as the hub has it, as bytes."""
    names = [f"TCGA-{project}/TCGA-AA-{project[::2]}{i:02}-01Z-00-DX1.{i:08}.h5" for i in range(slides)]
    return packed({name: slide(patches + i, seed=i) for i, name in enumerate(names)}, extra)


CDR = os.urandom(50_000)
FILES = {
    "README.md": b"# features",
    "TCGA/TCGA-SARC.tar.gz": archive("SARC"),
    "TCGA/TCGA-BRCA_IDC.tar.gz": archive("BRCA", 2),
    "TCGA/TCGA-BRCA_OTHERS.tar.gz": archive("BROT", 1),
    "TCGA/TCGA-UCEC.tar.gz": archive("UCEC"),
    "CPTAC/BRCA.tar.gz": b"not this one",
    "tcga_sarc/splits_0.csv": b"train,test\nTCGA-AA-SA00,TCGA-AA-SA01\n",
    "tcga_brca/splits_0.csv": b"train,test\nTCGA-AA-BR00,TCGA-AA-BR01\n",
}


@pytest.fixture
def server(monkeypatch, tmp_path):
    """The hub with the features, the splits and the outcomes; waits take no time."""
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    for name in [n for n in os.environ if n.startswith("HF_") or n.lower().endswith("_proxy")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HF_TOKEN_PATH", str(tmp_path / "token"))
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "token"))
    monkeypatch.setattr("huggingface_hub.constants.DOWNLOAD_CHUNK_SIZE", PIECE)
    with serving(Hub(files=dict(FILES), small={"README.md"}, plain={"cdr.xlsx": CDR})) as hub:
        hub.small |= {name for name in FILES if name.endswith(".csv")}
        monkeypatch.setenv("HF_ENDPOINT", hub.address)
        yield hub


@pytest.fixture
def study(server, tmp_path, monkeypatch):
    """A study whose sources are the server's."""
    monkeypatch.delenv("STEPH_DATA", raising=False)
    hub = {"address": f"https://huggingface.co/datasets/{server.repo}", "licence": "test"}
    plain = {"size_bytes": len(CDR), "md5": hashlib.md5(CDR).hexdigest(), "licence": "test"}
    manifest = {
        "name": "fetched",
        "title": "Fetched",
        "data_root": str(tmp_path / "data"),
        "features": {
            "encoder": "UNI2-h",
            "dim": DIM,
            "folders": ["features/TCGA/TCGA-{project}", "features/TCGA/TCGA-{project}_*"],
        },
        "datasets": {"BRCA": {"projects": ["BRCA"]}, "SARC": {"projects": ["SARC"]}},
        "sources": [
            {"name": "UNI", "provides": "features", **hub, "gated": True}
            | {"files": ["TCGA/TCGA-{project}.*", "TCGA/TCGA-{project}_*"]},
            {"name": "CDR", "provides": "labels", "address": f"{server.address}/plain/cdr.xlsx", **plain}
            | {"files": ["CDR.xlsx"]},
            {"name": "Splits", "provides": "splits", **hub, "files": ["tcga_{dataset}/splits_?.csv"]},
            {"name": "Code", "provides": "code", "address": "https://example.org", "licence": "see there"},
        ],
    }
    path = tmp_path / "fetched.yaml"
    path.write_text(yaml.safe_dump(manifest))
    return load_study(path)


def slides(root):
    return sorted(path.name.split(".")[0] for path in root.rglob("*.h5"))


def leftovers(root):
    return [str(path) for path in root.rglob(".*")]


def test_everything_arrives_where_the_study_looks_for_it_and_only_once(study, server):
    server.page_size = 3  # The listing comes in pages, as that of a large set does,
    server.api_faults += [503, 500]  # and fails now and then.
    server.files["TCGA/TCGA-SARC_loose/one.h5"] = slide(4)  # A slide file that is in no archive.
    found = fetch.fetch(study)
    root = study.data
    assert (root / "labels" / "CDR.xlsx").read_bytes() == CDR
    assert (root / "splits" / "tcga_sarc" / "splits_0.csv").read_bytes() == FILES["tcga_sarc/splits_0.csv"]
    assert len(slides(root / "features" / "TCGA" / "TCGA-BRCA_IDC")) == 2
    assert len(slides(root / "features" / "TCGA" / "TCGA-BRCA_OTHERS")) == 1
    assert (root / "features/TCGA/TCGA-SARC_loose/one.h5").is_file()
    assert len(slides(root / "features")) == 7 and not (root / "features" / "TCGA" / "TCGA-UCEC").exists()
    assert not list(root.rglob("*.tar.gz")) and not leftovers(root) and len(found) == 7
    record = unpacked(root / "features" / "TCGA" / "TCGA-SARC")
    assert f"{server.repo}/resolve/{loopback.COMMIT}/TCGA/TCGA-SARC.tar.gz" in record["source"]
    assert record["checksum"] == "sha256:" + hashlib.sha256(FILES["TCGA/TCGA-SARC.tar.gz"]).hexdigest()
    server.asked.clear()
    again = fetch.fetch(study)
    assert not server.asked and set(again.values()) == {"was there"}


def test_one_data_set_one_source_and_another_folder(study, tmp_path):
    assert list(fetch.fetch(study, ["SARC"], ["features"])) == [study.data / "features/TCGA/TCGA-SARC"]
    elsewhere = tmp_path / "elsewhere"
    assert list(fetch.fetch(study, ["SARC"], ["labels"], elsewhere)) == [elsewhere / "labels/CDR.xlsx"]
    assert not (study.data / "labels").exists() and len(slides(study.data)) == 3


# ------------------------------------------------------------------------------------------------ faults on the way

SOURCES = {"features": "features/TCGA/TCGA-SARC", "labels": "labels/CDR.xlsx"}
PASSING = {
    "connection dropped": [dropped(0.4)],
    "dropped again and again": [dropped(0.1) for _ in range(9)],
    "dropped before anything came": [dropped(0)] * 3,
    "busy, then well": [status(503), status(500), status(502), status(429)],
    "truncated, with a header that agrees": [truncated(0.5)],
    "wrong range": [dropped(0.4), wrong_range],
    "wrong range of the right length": [dropped(0.4), shifted],
    "range ignored": [dropped(0.4), ignores_range],
    "a bit flipped": [flipped],
    "flipped after a drop": [dropped(0.4), flipped],
}


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("name", PASSING)
def test_faults_that_pass_leave_no_trace(study, server, name, source):
    server.faults += PASSING[name]
    fetch.fetch(study, ["SARC"], [source])
    path = study.data / SOURCES[source]
    assert path.read_bytes() == CDR if source == "labels" else len(slides(path)) == 3
    assert not server.faults and not leftovers(study.data)


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (status(503), r"the server has a fault of its own \(503\). What has arrived is kept"),
        (status(404), r"not there any more \(404\)"),
        (status(403), r"not there, or not shown to you \(403\)"),
        (status(410), r"the server refuses \(410\)"),
        (dropped(0.0), r"cannot be reached, or breaks off"),
        (truncated(0.5), r"breaks off: \d+ of \d+ bytes arrived.*What has arrived is kept"),
        (flipped, r"the checksum is wrong \(expected .*, twice; nothing of it was kept"),
    ],
    ids=["busy", "gone", "forbidden", "gone for good", "dropped", "truncated", "flipped"],
)
def test_faults_that_stay_end_in_a_sentence_and_nothing_half(study, server, source, fault, message):
    server.faults += [fault] * 40
    with pytest.raises(Refused, match=message):
        fetch.fetch(study, ["SARC"], [source])
    assert not (study.data / SOURCES[source]).exists()
    server.faults.clear()
    fetch.fetch(study, ["SARC"], [source])
    assert (study.data / SOURCES[source]).exists()


@pytest.mark.parametrize("source", SOURCES)
def test_an_interrupted_download_goes_on_where_it_stopped(study, server, source, monkeypatch):
    size = len(CDR if source == "labels" else FILES["TCGA/TCGA-SARC.tar.gz"])
    monkeypatch.setattr(fetch, "WAITS", ())
    server.faults += [dropped(0.5), status(503)]
    with pytest.raises(Refused):
        fetch.fetch(study, ["SARC"], [source])
    [part] = study.data.rglob("*.part")
    kept = part.stat().st_size
    assert size // 2 - PIECE < kept <= size // 2
    fetch.fetch(study, ["SARC"], [source])
    assert server.asked[-1][2] == f"bytes={kept}-"


def test_a_killed_fetch_goes_on(study, server, tmp_path, monkeypatch):
    """SIGKILL in the middle of a body, from outside; the next call asks for the rest only."""
    content = archive("SARC", patches=2000)
    server.files["TCGA/TCGA-SARC.tar.gz"] = content

    def stalls(handler, body):
        handler.send_response(200)
        handler.send_header("Content-Length", str(len(body)))
        handler.end_headers()
        handler.wfile.write(body[: len(body) // 2])
        handler.wfile.flush()
        select.select([handler.connection], [], [], 30)  # until the client is gone
        handler.close_connection = True

    server.faults.append(stalls)
    code = (
        "import sys\nfrom huggingface_hub import constants\nfrom steph.data.fetch import fetch\n"
        "from steph.data.manifest import load_study\nconstants.DOWNLOAD_CHUNK_SIZE = 1000\n"
        "fetch(load_study(sys.argv[1]), ['SARC'], ['features'])"
    )
    process = subprocess.Popen([sys.executable, "-c", code, str(tmp_path / "fetched.yaml")], stderr=subprocess.DEVNULL)
    monkeypatch.setattr(time, "sleep", SLEEP)
    deadline, kept = time.monotonic() + 20, 0
    while not kept and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.02)
        kept = sum(part.stat().st_size for part in study.data.rglob("*.part"))
    process.kill()
    process.wait(10)
    [part] = study.data.rglob("*.part")
    kept = part.stat().st_size
    assert 0 < kept < len(content) and not (study.data / "features/TCGA/TCGA-SARC").exists()
    fetch.fetch(study, ["SARC"], ["features"])
    assert server.asked[-1][2] == f"bytes={kept}-" and len(slides(study.data)) == 3


def test_a_whole_download_that_was_not_unpacked_is_not_asked_for_again(study, server, monkeypatch):
    def interrupted(*arguments):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(fetch, "unpack", interrupted)
        fetch.fetch(study, ["SARC"], ["features"])
    sent = server.sent
    fetch.fetch(study, ["SARC"], ["features"])
    assert server.sent == sent and len(slides(study.data)) == 3 and not leftovers(study.data)


def test_what_is_too_large_for_a_plain_download_is_named(study, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.MAX_HTTP_DOWNLOAD_SIZE", 100)
    with pytest.raises(Refused, match=r"TCGA-SARC\.tar\.gz: The file is too large.*`hf download`"):
        fetch.fetch(study, ["SARC"], ["features"])


def test_one_bad_archive_does_not_keep_the_others(study, server):
    link = member("link.h5", tarfile.SYMTYPE, linkname="/etc/passwd")
    server.files["TCGA/TCGA-BRCA_IDC.tar.gz"] = archive("BRCA", 2, [link])
    with pytest.raises(Refused, match=r"1 of 3 files are incomplete:\n.*TCGA-BRCA_IDC.*'link.h5' is a link") as refused:
        fetch.fetch(study, kinds=["features"])
    assert "The others are there" in str(refused.value)
    assert {path.parent.name for path in study.data.rglob("*.h5")} == {"TCGA-SARC", "TCGA-BROT"}


def test_names_from_the_server_stay_in_the_folder(study, server, tmp_path):
    server.files = {"TCGA/TCGA-SARC_/../../../../outside.h5": slide(3)}
    with pytest.raises(Refused, match=r"outside.h5' leads out of the folder"):
        fetch.fetch(study, ["SARC"], ["features"])
    assert not list(tmp_path.rglob("outside.h5"))


# ------------------------------------------------------------------------------------------------ access

ACCESS = r"given to people who asked for it.*accept the terms.*hf auth login.*HF_TOKEN"


@pytest.mark.parametrize(
    ("token", "reason"), [("", r"no token was sent \(401\)"), ("hf_right", r"that was sent has no access \(403\)")]
)
def test_a_gated_set_without_access(study, server, monkeypatch, token, reason):
    monkeypatch.setenv("HF_TOKEN", token)
    server.token, server.granted = "hf_right", False
    with pytest.raises(Refused, match=reason) as refused:
        fetch.fetch(study)
    assert re.search(ACCESS, str(refused.value)) and "https://huggingface.co/datasets/MahmoodLab" in str(refused.value)
    assert not slides(study.data) and "hf_right" not in str(refused.value)


def test_a_token_from_the_environment_and_one_from_a_login(study, server, monkeypatch, tmp_path):
    server.token = "hf_right"
    monkeypatch.setenv("HF_TOKEN", "hf_right")
    fetch.fetch(study, ["SARC"], ["features"])
    monkeypatch.delenv("HF_TOKEN")
    (tmp_path / "token").write_text("hf_right")  # where `hf auth login` keeps it
    fetch.fetch(study, ["BRCA"], ["features"])
    assert len(slides(study.data)) == 6


def test_the_token_goes_to_the_hub_alone(study, server, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    seen = []

    def spy(handler, content):
        seen.append(handler.headers.get("authorization"))
        return content

    server.faults.append(spy)
    fetch.fetch(study, ["SARC"], ["labels"])
    assert seen == [None]


def test_a_hub_that_gives_no_list_is_a_sentence(study, server, monkeypatch):
    page = b"<html>Please log in to the clinic's network</html>"
    for message, patched in (
        (r"not there, or not shown to you \(404\)", (server, "repo", "somebody/else")),
        ("cannot be reached.*HF_HUB_OFFLINE", ("huggingface_hub.constants.HF_HUB_OFFLINE", True)),
        ("no list of files that can be read", (loopback.Handler, "do_GET", lambda self: self.answer(200, page))),
        ("cannot be reached.*HTTPS_PROXY", (os, "environ", os.environ | {"HF_ENDPOINT": "http://127.0.0.1:9"})),
    ):
        with monkeypatch.context() as patch, pytest.raises(Refused, match=message):
            patch.setattr(*patched)
            fetch.fetch(study, ["SARC"], ["features"])


# ------------------------------------------------------------------------------------------------ room


def test_too_little_room_is_said_before_anything_is_sent(study, server, monkeypatch):
    monkeypatch.setattr(atomic, "free_bytes", lambda path: 20_000)
    message = r"no space for 3 file\(s\), archives unpacked: .* are needed.* too little.*STEPH_DATA.*--dataset"
    with pytest.raises(Refused, match=message):
        fetch.fetch(study, kinds=["features"])
    assert not server.sent


@pytest.mark.parametrize("name", ["while downloading", "while unpacking"])
def test_a_disk_that_is_really_full(study, server, small_disk, monkeypatch, name):
    monkeypatch.setattr(atomic, "free_bytes", lambda path: 1 << 40)  # The check beforehand did not see it coming.
    large = os.urandom(600_000) if name == "while downloading" else packed({"a.h5": bytes(600_000)})
    server.files["TCGA/TCGA-SARC.tar.gz"] = large
    with pytest.raises(Refused, match="no space left in"):
        fetch.fetch(study, ["SARC"], ["features"], small_disk)
    assert not list(small_disk.rglob("TCGA-SARC"))
    server.files["TCGA/TCGA-SARC.tar.gz"] = FILES["TCGA/TCGA-SARC.tar.gz"]
    [part] = small_disk.rglob("*.part")
    part.unlink()
    fetch.fetch(study, ["SARC"], ["features"], small_disk)
    assert len(slides(small_disk)) == 3


# ------------------------------------------------------------------------------------------------ what lies there


@pytest.mark.parametrize("share", [1, 0.5])
def test_an_archive_that_was_put_there_is_used_where_it_is_whole_and_kept(study, server, share):
    content, own = FILES["TCGA/TCGA-SARC.tar.gz"], study.data / "features/TCGA/TCGA-SARC.tar.gz"
    own.parent.mkdir(parents=True)
    own.write_bytes(content[: int(share * len(content))])
    [note] = fetch.fetch(study, ["SARC"], ["features"]).values()
    assert own.stat().st_size == int(share * len(content)) and len(slides(study.data)) == 3
    assert (share == 1) == (not server.sent) == ("TCGA-SARC.tar.gz, which lay there, is not whole" not in note)


def test_lost_slides_are_named_and_fetched_again_and_a_newer_version_replaces_nothing(study, server, capsys):
    fetch.fetch(study, ["SARC"], ["features"])
    lost = next(study.data.rglob("*SR01*.h5"))
    content = lost.read_bytes()
    lost.unlink()
    fetch.fetch(study, ["SARC"], ["features"])
    assert "TCGA-AA-SR01" in capsys.readouterr().err and lost.read_bytes() == content
    server.files["TCGA/TCGA-SARC.tar.gz"] = archive("SARC", 5)
    [note] = fetch.fetch(study, ["SARC"], ["features"]).values()
    assert "another version" in note and len(slides(study.data)) == 3


def test_slides_that_cannot_be_used_are_listed(study, server):
    files = {"whole.h5": slide(9), "cut.h5": slide(9)[:700], "empty.h5": slide(0)}
    server.files["TCGA/TCGA-SARC.tar.gz"] = packed(files)
    [note] = fetch.fetch(study, ["SARC"], ["features"]).values()
    assert "2 of 3 slides cannot be used" in note and "cut" in note and "empty (0 patches)" in note


def test_a_folder_unpacked_by_hand_is_left_alone(study, server):
    folder = study.data / "features" / "TCGA" / "TCGA-SARC"
    folder.mkdir(parents=True)
    [note] = fetch.fetch(study, ["SARC"], ["features"]).values()
    assert "not unpacked by this command" in note and not server.sent and not list(folder.iterdir())


def test_a_file_of_another_content_is_not_overwritten(study):
    path = study.data / "labels" / "CDR.xlsx"
    path.parent.mkdir(parents=True)
    path.write_bytes(b"mine")
    with pytest.raises(Refused, match="is not what CDR has now"):
        fetch.fetch(study, kinds=["labels"])
    assert path.read_bytes() == b"mine"


def test_two_at_once(study):
    with exclusive(study.data / "fetch"), pytest.raises(Refused, match="another process is fetching"):
        fetch.fetch(study)


# ------------------------------------------------------------------------------------------------ what a person gives


def test_mistakes_are_named(study, server, tmp_path):
    def changed(**values):
        return study.model_copy(update={"sources": [study.sources[1].model_copy(update=values)]})

    server.files = {"TCGA/sarc.tar.gz": b""}
    for of, arguments, message in (
        (study, (["SARK"],), "unknown data set 'SARK'"),
        (study, (None, ["feature"]), "no source of feature .*labels, splits, features"),
        (load_study("tiny"), (), "synthetic"),
        (study, (["SARC"], ["features"]), r"nothing there for SARC .*There are: TCGA/sarc\.tar\.gz\. Correct `files`"),
        (study, (["SARC"], ["labels"], tmp_path / "fetched.yaml" / "below"), "cannot write"),
        (changed(md5=None), (), "a download could not be checked"),
        (changed(), (None, ["splits"]), "names no source of splits"),
        (changed(address="file:///etc/passwd"), (), "no web address"),
        (study, (["SARC"], ["labels"], tmp_path / "fetched.yaml" / "below"), "cannot write"),
    ):
        with pytest.raises(Refused, match=message):
            fetch.fetch(of, *arguments)


def test_the_manifest_of_tcga_can_be_fetched_from():
    found = {source.provides: source for source in fetch.sources(load_study("tcga"))}
    assert set(found) == set(fetch.KINDS)
    features = fetch.names_of(found["features"], "BRCA", "BRCA")
    real = ["TCGA/TCGA-BRCA_IDC.tar.gz", "TCGA/TCGA-BRCA_OTHERS.tar.gz", "TCGA/TCGA-BRCA.tar.gz"]
    assert all(fetch.is_like(name, features) for name in real) and not fetch.is_like("TCGA/TCGA-BLCA.tar.gz", features)
    assert fetch.is_like("tcga_brca/splits_4.csv", fetch.names_of(found["splits"], "BRCA", "BRCA"))


# ------------------------------------------------------------------------------------------------ commands


def test_fetch_then_list(study, server, tmp_path):
    path = tmp_path / "fetched.yaml"
    server.faults += [truncated(0.5)] * 40
    done = steph("data", "fetch", "--study", path, "--dataset", "SARC", "--source", "features")
    assert done.exit_code == 1 and "bytes arrived" in done.output and "Traceback" not in done.output
    server.faults.clear()
    row = inventory(study).set_index("dataset").loc["SARC"]
    assert (row["archives"], row["features"], row["labels"], row["store"]) == ("1 begun", "-", "-", "-")
    done = steph("data", "fetch", "--study", path, "--dataset", "SARC")
    assert done.exit_code == 0, done.output
    assert "TCGA-SARC: 3 files" in done.output and "checksum right" in done.output
    done = steph("data", "list", "--study", path)
    assert done.exit_code == 0 and "3 slides" in done.output and "gated; licence: test" in done.output


def test_what_is_there_is_counted_whatever_the_case_of_its_letters(study, server):
    fetch.fetch(study)
    next(study.data.rglob("*SR01*.h5")).unlink()
    (study.data / "features/TCGA/TCGA-brca_idc.TAR.GZ").write_bytes(b"")
    (study.data / "features/TCGA/.tcga-BRCA.tar.gz.0123456789ab.part").write_bytes(b"")
    (study.data / "labels/SARC.csv").write_text(
        "patient_id,slide_id,project,time_days,event\nP1,S1,SARC,10,1\nP1,S2,SARC,10,1\nP2,S3,SARC,20,0\n"
    )
    (study.data / "labels/BRCA.csv").write_text("nonsense")
    table = inventory(study).set_index("dataset")
    assert table.loc["SARC", ["labels", "archives", "features"]].tolist() == ["2 patients", "-", "2 slides, 1 lost"]
    assert table.loc["BRCA", ["labels", "archives", "features"]].tolist() == ["unusable", "1, 1 begun", "3 slides"]
