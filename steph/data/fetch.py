"""Getting a study's data from the sources that its manifest names: labels, the authors' splits, patch features.

What arrives is compared with the source's own size and checksum before anything is made of it. A download that was
interrupted goes on where it stopped, which `hf_hub_download` does not; what is there and whole is not downloaded again.
Archives are unpacked below ``features/`` and then removed (`steph.data.archives`).
"""

from __future__ import annotations

import hashlib
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, TypeVar

from steph import Refused
from steph.data.archives import folder_of, is_archive, missing_files, safe_name, unpack, unpacked
from steph.data.features import check_slides, find_slides, problems_message
from steph.data.manifest import Features, Source, Study
from steph.files.atomic import DiskFull, disk_errors, refuse_full_disk
from steph.files.lock import exclusive
from steph.files.progress import track
from steph.files.tables import shortened

KINDS = ("labels", "splits", "features")
"""What can be fetched: the sources that provide it, and the folders of the data root where it goes."""
HUB = "https://huggingface.co/datasets/"
WAITS = (1, 2, 4, 8, 16)
"""Seconds before each further try after a fault of the network or the server."""
TIMEOUT = 60.0
UNPACKED = 1.15
"""How much larger unpacked features are taken to be than their archive: numbers like these hardly shrink."""
Result = TypeVar("Result")


@dataclass(frozen=True, eq=False)
class Item:
    """A file of a source. name: the source's own for it, revision: of the source, checksum: "md5:...", "sha256:..." or
    "git:...", path: where it goes; an archive goes into the folder of that name without its ending."""

    source: Source
    name: str
    url: str
    size: int
    checksum: str
    revision: str
    path: Path

    @property
    def part(self) -> Path:
        """The file while it is downloaded; another content has another one."""
        return self.path.with_name(f".{self.path.name}.{self.checksum.split(':')[1][:12]}.part")

    @property
    def on_hub(self) -> bool:
        """Whether the hub of Hugging Face has it."""
        return self.source.address.startswith(HUB)


@dataclass(frozen=True)
class Fetched:
    """What became of a file: where it is now, and what a person should know of it."""

    item: Item
    path: Path
    note: str


class Unavailable(Refused):
    """What would refuse every other file as well: no way to the source, no access."""


def fetch(
    study: Study, datasets: Sequence[str] | None = None, kinds: Sequence[str] | None = None, out: Path | None = None
) -> list[Fetched]:
    """Fetch what `study` needs of its data sets (default: all) and kinds (of `KINDS`; default: all) to its data root.

    out: another folder than the data root. Returns what is there now, in the order of the manifest's sources.
    Raises `Refused` for an unknown data set or kind, a source without access, too little room, and at the end for all
    files that could not be had; the rest is kept, and the same call goes on from there.
    """
    if study.synthetic:
        raise Refused(f"study {study.name} is synthetic: its data are made when it is run, there is nothing to fetch.")
    root = (out or study.data).expanduser().resolve()
    names = list(datasets or study.datasets)
    for name in names:
        study.entry(name)
    with exclusive(root / "fetch", busy=f"another process is fetching to {root}; wait for it, or stop it."):
        items = [
            item
            for source in sources(study, kinds)
            for item in (_hub_items if source.address.startswith(HUB) else _plain_items)(study, source, names, root)
        ]
        results = {item: _present(item) for item in items}
        missing = [item for item in items if results[item] is None]
        _check_access(missing)
        _refuse_full_disk(root, missing)
        problems = []
        for item in track(missing, f"{study.name}: fetch"):
            try:
                results[item] = _get(item, study.features)
            except (Unavailable, DiskFull):
                raise
            except Refused as error:
                problems.append(f"  {error}\n")
    if problems:
        raise Refused(
            f"{len(problems)} of {len(items)} files are incomplete:\n{''.join(problems)}The others are there. "
            "The same command tries these again."
        )
    return [result for result in results.values() if result is not None]


def sources(study: Study, kinds: Sequence[str] | None = None) -> list[Source]:
    """The sources of a study that can be fetched. Raises `Refused` for a kind that it has no source of."""
    for kind in kinds or ():
        if kind not in KINDS:
            raise Refused(f"--source {kind}: expected {', '.join(KINDS)}.")
        if not any(source.provides == kind for source in study.sources):
            raise Refused(f"the manifest of study {study.name} names no source of {kind} (`sources`).")
    usable = [source for source in study.sources if source.provides in (kinds or KINDS) and source.files]
    if not usable:
        raise Refused(f"the manifest of study {study.name} names no source (`sources`) with `files` to fetch.")
    return usable


# ------------------------------------------------------------------------------------------------ what there is to get


def _plain_items(study: Study, source: Source, names: list[str], root: Path) -> list[Item]:
    """The one file of an ordinary address."""
    if len(source.files) != 1 or source.md5 is None or source.size_bytes is None:
        raise Refused(
            f"{source.name}: the manifest must give one file name (`files`), `size_bytes` and `md5`; without them a "
            f"download could not be checked. Or get it yourself: {source.address}"
        )
    if not source.address.startswith(("https://", "http://")):
        raise Refused(f"{source.name}: {source.address} is no web address.")
    path = root / source.provides / safe_name(source.files[0], source.name)
    return [Item(source, source.files[0], source.address, source.size_bytes, f"md5:{source.md5}", "", path)]


def _hub_items(study: Study, source: Source, names: list[str], root: Path) -> list[Item]:
    """The files of a data set of Hugging Face that belong to a study's data sets."""
    from huggingface_hub import HfApi, hf_hub_url
    from huggingface_hub.hf_api import RepoFile

    repo, endpoint = source.address.removeprefix(HUB).strip("/"), os.environ.get("HF_ENDPOINT") or None
    api = HfApi(endpoint=endpoint, library_name="steph")
    with _in_sentences(source):
        try:
            revision = str(_patiently(lambda: api.dataset_info(repo, timeout=TIMEOUT)).sha)
            tree = api.list_repo_tree(repo, recursive=True, revision=revision, repo_type="dataset")
            listed = {file.path: file for file in tree if isinstance(file, RepoFile)}
        except (ValueError, KeyError, TypeError) as error:
            raise Unavailable(
                f"{source.name}: {source.address} gave no list of files that can be read ({error!r}). Is the address "
                "right, and does a proxy or a login page stand in between?"
            ) from None
    items: dict[str, Item] = {}
    for name in names:
        for project in study.entry(name).projects:
            patterns = names_of(source, project, name)
            paths = [path for path in listed if is_like(path, patterns)]
            if not paths:
                raise Refused(
                    f"{source.name}: nothing there for {project} ({name}): no file like {' or '.join(patterns)}. There "
                    f"are: {shortened(sorted(listed), 20)}. Correct `files` of this source in the study's manifest."
                )
            for path in paths:
                file = listed[path]
                url = hf_hub_url(repo, path, repo_type="dataset", revision=revision, endpoint=endpoint)
                checksum = f"sha256:{file.lfs.sha256}" if file.lfs else f"git:{file.blob_id}"
                to = root / source.provides / safe_name(path, source.name)
                items[path] = Item(source, path, url, file.size, checksum, revision, to)
    return list(items.values())


def names_of(source: Source, project: str, dataset: str) -> list[str]:
    """`Source.files` for a project of a data set."""
    return [name.replace("{project}", project).replace("{dataset}", dataset) for name in source.files]


def is_like(path: str, patterns: Iterable[str]) -> bool:
    """Does a path in a source have one of its names, small and capital letters alike?"""
    return any(fnmatch(path.lower(), pattern.lower()) for pattern in patterns)


def _present(item: Item) -> Fetched | None:
    """What is there already; None where the file has to be fetched. Raises `Refused` for a file of another content."""
    if not is_archive(item.path.name):
        if not item.path.exists():
            return None
        if _matches(item.path, item):
            return Fetched(item, item.path, "was there")
        raise Refused(
            f"{item.path} is there, but is not what {item.source.name} has now ({item.size} bytes, {item.checksum}). "
            "Move it away, and it is fetched; or name only the other sources (--source)."
        )
    folder = folder_of(item.path)
    record = unpacked(folder)
    if record is None:
        note = "was there; not unpacked by this command, so nobody knows whether it is whole: `steph data check`"
        return Fetched(item, folder, note) if folder.is_dir() else None
    lost = missing_files(folder, record)
    if lost:
        print(f"{folder}: {len(lost)} file(s) are gone or have another size: {shortened(lost)}", file=sys.stderr)
        return None
    newer = "" if record.get("checksum") == item.checksum else "; the source has another version now"
    return Fetched(item, folder, f"was there{newer}")


def _refuse_full_disk(root: Path, missing: list[Item]) -> None:
    """Refuse to begin what cannot end: archives are there one at a time, unpacked ones all."""
    arriving = {item: max(item.size - max(_size(item.part), _size(item.path)), 0) for item in missing}
    archives = [item for item in missing if is_archive(item.path.name)]
    needed = sum(n for item, n in arriving.items() if item not in archives)
    needed += max((arriving[item] for item in archives), default=0)
    unpacked_bytes = sum(item.size for item in archives) * UNPACKED
    what = f"{len(missing)} file(s)" + (", archives unpacked" if archives else "")
    refuse_full_disk(root, needed + unpacked_bytes, what, ", take fewer data sets (--dataset), or name one (--out)")


# ------------------------------------------------------------------------------------------------ getting it


def _check_access(missing: list[Item]) -> None:
    """Ask for a file of each gated place, before anything is begun. Raises `Unavailable` where access is refused."""
    from huggingface_hub import get_hf_file_metadata

    for item in {item.source.address: item for item in missing if item.on_hub}.values():
        with _in_sentences(item.source):
            _patiently(lambda item=item: get_hf_file_metadata(item.url, timeout=TIMEOUT, headers=_headers(item)))  # type: ignore[misc]


def _get(item: Item, features: Features) -> Fetched:
    """Fetch one file and put it, or what is in it, to its place."""
    with disk_errors(item.path):
        item.path.parent.mkdir(parents=True, exist_ok=True)
    if not is_archive(item.path.name):
        _download(item)
        item.part.replace(item.path)
        return Fetched(item, item.path, f"fetched, {item.size / 1e6:.1f} MB, checksum right")
    folder = folder_of(item.path)
    note, archive = "", item.path
    if not _matches(item.path, item):  # else a person put it there: it stays
        _download(item)
        archive = item.part
        if item.path.is_file():
            note = f"; {item.path}, which lay there, is not whole or not the source's and was not used"
    origin = {"source": item.source.address, "revision": item.revision, "checksum": item.checksum}
    n_files = unpack(archive, folder, item.path.name, origin)
    item.part.unlink(missing_ok=True)
    slides = find_slides([folder])
    problems = problems_message(check_slides(slides, slides, features))
    return Fetched(item, folder, f"{n_files} files{note}" + (f"\n{problems}" if problems else ""))


def _download(item: Item) -> None:
    """Make ``item.part`` whole: its size and checksum are the source's. Goes on with what is there of it."""
    for _ in range(2):
        with _in_sentences(item.source), disk_errors(item.part):
            _patiently(lambda: _receive(item))
        if _matches(item.part, item):
            return
        item.part.unlink()
    raise Refused(
        f"{item.name}: the checksum is wrong (expected {item.checksum}), twice; nothing of it was kept. "
        "Something on the way changes the file, or the source is being changed: try again later."
    )


def _receive(item: Item) -> None:
    """Ask for what is still missing of ``item.part``, and again after a drop, as long as something comes."""
    from huggingface_hub.errors import HTTPError
    from huggingface_hub.file_download import http_get

    if _size(item.part) > item.size:
        item.part.unlink()
    try:
        with item.part.open("ab") as file:
            http_get(
                item.url,
                file,
                resume_size=_size(item.part),
                headers=_headers(item),
                expected_size=item.size,
                displayed_filename=item.path.name,
            )
    except HTTPError:
        raise
    except ValueError as error:  # more than 50 GB
        raise Refused(
            f"{item.name}: {error} Or get it with the hub's own client (`hf download`) and put it to {item.path}; then "
            "the same command unpacks it."
        ) from None
    except OSError as error:
        if error.errno is None:  # of the client itself: another size than expected
            raise _Incomplete(f"{_size(item.part)} of {item.size} bytes arrived") from None
        raise


def _headers(item: Item) -> dict[str, str]:
    """What is sent with a request. Only the hub gets the user's token."""
    from huggingface_hub.utils import build_hf_headers

    headers = build_hf_headers(library_name="steph") if item.on_hub else {"user-agent": "steph"}
    return {**headers, "accept-encoding": "identity"}


class _Incomplete(Exception):
    """A download ended early, though nothing looked wrong."""


def _patiently(attempt: Callable[[], Result]) -> Result:
    """The result of `attempt`, which is repeated after faults of the network or the server that may pass."""
    from huggingface_hub.errors import HTTPError

    for wait in WAITS:
        try:
            return attempt()
        except (HTTPError, _Incomplete) as error:
            status = getattr(getattr(error, "response", None), "status_code", 500)
            if status < 500 and status not in (408, 416, 429):
                raise
            time.sleep(wait)
    return attempt()


@contextmanager
def _in_sentences(source: Source) -> Iterator[None]:
    """Faults of the network and the server become sentences."""
    from huggingface_hub import errors, get_token

    where = f"{source.name} ({source.address})"
    try:
        yield
    except errors.GatedRepoError as error:
        reason = "the token that was sent has no access" if get_token() else "no token was sent"
        raise Unavailable(
            f"{where} is given to people who asked for it, and {reason} ({error.response.status_code}). 1. Open its "
            "page, log in, accept the terms there and wait until they are confirmed. 2. Make a token that may read "
            "gated repositories (https://huggingface.co/settings/tokens). 3. `hf auth login`, or set HF_TOKEN. Then "
            "run the same command again."
        ) from None
    except errors.RepositoryNotFoundError as error:
        raise Unavailable(
            f"{where}: no such data set, or it is not shown to you ({error.response.status_code}). Is the address "
            "right? If you have a token, is it still valid (`hf auth whoami`)?"
        ) from None
    except errors.HTTPError as error:
        response = getattr(error, "response", None)
        if response is None:
            raise Unavailable(
                f"{where} cannot be reached: {error}. Is there a network, a proxy (HTTPS_PROXY), a mirror "
                "(HF_ENDPOINT)? What has arrived is kept; the same command goes on from there."
            ) from None
        status = response.status_code
        if status == 404:
            raise Refused(f"{where}: not there any more (404): {response.url}.") from None
        if status in (401, 403):
            raise Unavailable(
                f"{where} refuses the download ({status}). Where a token is needed, make one that may read it "
                "(https://huggingface.co/settings/tokens) and `hf auth login`, or set HF_TOKEN."
            ) from None
        fault = "has a fault of its own" if status >= 500 else "refuses the request"
        raise Unavailable(
            f"{where}: the server {fault} ({status}). What has arrived is kept; try again later."
        ) from None
    except errors.OfflineModeIsEnabled:
        raise Unavailable(f"{where}: HF_HUB_OFFLINE is set, so nothing is fetched. Unset it, and run again.") from None
    except _Incomplete as error:
        raise Unavailable(
            f"{where}: {error}, {len(WAITS) + 1} times. What has arrived is kept; the same command goes on from there."
        ) from None


def _size(path: Path) -> int:
    return path.stat().st_size if path.is_file() else 0


def _matches(path: Path, item: Item) -> bool:
    """Is the file of the source's size and checksum?"""
    if not path.is_file() or _size(path) != item.size:
        return False
    kind, expected = item.checksum.split(":")
    digest: Any = hashlib.new("sha1" if kind == "git" else kind, usedforsecurity=False)
    if kind == "git":  # the name that git gives a file
        digest.update(f"blob {item.size}\0".encode())
    with path.open("rb") as file:
        while piece := file.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest() == expected
