"""Getting a study's data from the sources that its manifest names: labels, the authors' splits, patch features.

What arrives is compared with the source's own size and checksum before anything is made of it. A download that was
interrupted goes on where it stopped, which `hf_hub_download` does not. Archives are unpacked and then removed.
"""

import hashlib
import os
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from functools import partial
from pathlib import Path
from typing import Any

from steph import Refused
from steph.data.archives import folder_of, safe_name, unpack, unpacked
from steph.data.features import find_slides
from steph.data.manifest import Features, Source, Study
from steph.data.preflight import check_slides, problems_message
from steph.files.atomic import DiskFull, disk_errors, refuse_full_disk
from steph.files.lock import exclusive
from steph.files.progress import track
from steph.files.tables import shortened

KINDS = ("labels", "splits", "features")  # what sources provide, and the folders of the data root where it goes
HUB = "https://huggingface.co/datasets/"
WAITS = (1, 2, 4, 8, 16)  # seconds before each further try after a fault of the network or the server
LOG_IN = (
    "Make a token that may read gated repositories (https://huggingface.co/settings/tokens); `hf auth login`, or set "
    "HF_TOKEN."
)
KEPT = "What has arrived is kept; the same command goes on from there."


@dataclass(frozen=True, repr=False)  # the headers hold the user's token
class Item:
    """A file of a source. checksum: "md5:...", "sha256:..." or "git:...". path: where it would lie as it is there."""

    source: Source
    url: str
    size: int
    checksum: str
    headers: dict[str, str]
    path: Path

    @property
    def target(self) -> Path:
        """The file at the end; of an archive, the folder that it is unpacked to."""
        return folder_of(self.path) or self.path

    @property
    def part(self) -> Path:
        """The file while it is downloaded; another content has another one."""
        return self.path.with_name(f".{self.path.name}.{self.checksum.split(':')[1][:12]}.part")


class Unavailable(Refused):
    """What would refuse every other file as well: no way to the source, no access."""


def fetch(
    study: Study, datasets: Sequence[str] | None = None, kinds: Sequence[str] | None = None, out: Path | None = None
) -> dict[Path, str]:
    """Fetch what `study` needs of its data sets (default: all) and kinds (of `KINDS`; default: all) to its data root.

    out: another folder than the data root. Returns what is there now, in the order of the manifest's sources: paths,
    and what a person should know of each. Raises `Refused` for an unknown data set or kind, a source without access,
    too little room, and at the end for all files that could not be had; the rest is kept, and the same call goes on.
    """
    if study.synthetic:
        raise Refused(f"study {study.name} is synthetic: its data are made when it is run, there is nothing to fetch.")
    root = (out or study.data).expanduser().resolve()
    projects = [(name, p) for name in datasets or study.datasets for p in study.entry(name).projects]
    with exclusive(root / "fetch", busy=f"another process is fetching to {root}; wait for it, or stop it."):
        items = [item for source in sources(study, kinds) for item in _items(source, projects, root)]
        notes = {item.target: _present(item) for item in items}
        missing = [item for item in items if notes[item.target] is None]
        # Archives are there one at a time, unpacked ones all; numbers like these hardly shrink when packed.
        archives = [item.size for item in missing if item.target != item.path]
        needed = sum(item.size - _size(item.part) for item in missing) + 0.15 * sum(archives) + max(archives, default=0)
        what = f"{len(missing)} file(s)" + (", archives unpacked" if archives else "")
        refuse_full_disk(root, needed, what, ", take fewer data sets (--dataset), or name one (--out)")
        problems = []
        for item in track(missing, f"{study.name}: fetch"):
            try:
                notes[item.target] = _get(item, study.features)
            except (Unavailable, DiskFull):
                raise
            except Refused as error:
                problems.append(f"  {error}\n")
    if problems:
        raise Refused(
            f"{len(problems)} of {len(items)} files are incomplete:\n{''.join(problems)}The others are there. "
            "The same command tries these again."
        )
    return {path: note for path, note in notes.items() if note is not None}


def sources(study: Study, kinds: Sequence[str] | None = None) -> list[Source]:
    """The sources of a study that can be fetched. Raises `Refused` for a kind that it has no source of."""
    chosen = [source for source in study.sources if source.provides in KINDS and source.files]
    lacking = set(kinds or ()) - {source.provides for source in chosen}
    if lacking or not chosen:
        raise Refused(
            f"the manifest of study {study.name} names no source of {' or '.join(sorted(lacking or KINDS))} "
            f"(`sources`, with `files`); it may name sources of {', '.join(KINDS)}."
        )
    return [source for source in chosen if source.provides in (kinds or KINDS)]


def _items(source: Source, projects: list[tuple[str, str]], root: Path) -> list[Item]:
    """What a source has for projects (data set, project): the one file of an ordinary address, or files of the hub."""
    if source.address.startswith(HUB):
        return _hub_items(source, projects, root)
    if len(source.files) != 1 or source.md5 is None or source.size_bytes is None:
        raise Refused(
            f"{source.name}: the manifest must give one file name (`files`), `size_bytes` and `md5`; without them a "
            f"download could not be checked. Or get it yourself: {source.address}"
        )
    if not source.address.startswith(("https://", "http://")):
        raise Refused(f"{source.name}: {source.address} is no web address.")
    path = root / source.provides / safe_name(source.files[0], source.name)
    headers = {"user-agent": "steph", "accept-encoding": "identity"}
    return [Item(source, source.address, source.size_bytes, f"md5:{source.md5}", headers, path)]


def _hub_items(source: Source, projects: list[tuple[str, str]], root: Path) -> list[Item]:
    from huggingface_hub import HfApi, hf_hub_url
    from huggingface_hub.hf_api import RepoFile
    from huggingface_hub.utils import build_hf_headers

    repo, endpoint = source.address.removeprefix(HUB).strip("/"), os.environ.get("HF_ENDPOINT") or None
    headers = {**build_hf_headers(library_name="steph"), "accept-encoding": "identity"}  # with the user's token
    api = HfApi(endpoint=endpoint, library_name="steph")

    def listing() -> tuple[str | None, dict[str, RepoFile]]:
        revision = api.dataset_info(repo, timeout=60.0).sha
        tree = api.list_repo_tree(repo, recursive=True, revision=revision, repo_type="dataset")
        return revision, {file.path: file for file in tree if isinstance(file, RepoFile)}

    try:
        revision, listed = _patiently(source, listing)
    except (ValueError, KeyError, TypeError) as error:
        raise Unavailable(
            f"{source.name}: {source.address} gave no list of files that can be read ({error!r}). Is the address "
            "right, and does a proxy or a login page stand in between?"
        ) from None
    items: dict[str, Item] = {}
    for dataset, project in projects:
        patterns = names_of(source, project, dataset)
        matching = [name for name in listed if is_like(name, patterns)]
        if not matching:
            raise Refused(
                f"{source.name}: nothing there for {project} ({dataset}): no file like {' or '.join(patterns)}. There "
                f"are: {shortened(sorted(listed), 20)}. Correct `files` of this source in the study's manifest."
            )
        for name in matching:
            file, path = listed[name], root / source.provides / safe_name(name, source.name)
            url = hf_hub_url(repo, name, repo_type="dataset", revision=revision, endpoint=endpoint)
            checksum = f"sha256:{file.lfs.sha256}" if file.lfs else f"git:{file.blob_id}"
            items[name] = Item(source, url, file.size, checksum, headers, path)
    return list(items.values())


def names_of(source: Source, project: str, dataset: str) -> list[str]:
    """`Source.files` for a project of a data set."""
    return [name.replace("{project}", project).replace("{dataset}", dataset) for name in source.files]


def is_like(path: str, patterns: Iterable[str]) -> bool:
    """Does a path in a source have one of its names, small and capital letters alike?"""
    return any(fnmatch(path.lower(), pattern.lower().replace("[", "[[]")) for pattern in patterns)


def _present(item: Item) -> str | None:
    """What to know of what is there already; None where it has to be fetched. Raises `Refused` for another content."""
    target = item.target
    if not target.exists():
        return None
    if target == item.path:
        if _matches(target, item):
            return "was there"
        raise Refused(
            f"{target} is there, but is not what {item.source.name} has now ({item.size} bytes, {item.checksum}). "
            "Move it away, and it is fetched; or name only the other sources (--source)."
        )
    record = unpacked(target)
    if record is None:
        return "was there; not unpacked by this command, so nobody knows whether it is whole: `steph data check`"
    if lost := record["missing"]:
        print(f"{target}: {len(lost)} file(s) are gone or have another size: {shortened(lost)}", file=sys.stderr)
        return None
    return "was there" + ("" if record.get("checksum") == item.checksum else "; the source has another version now")


def _get(item: Item, features: Features) -> str:
    """Fetch one file and put it, or what is in it, to its place."""
    if item.target == item.path:
        _download(item)
        item.part.replace(item.path)
        return f"fetched, {item.size / 1e6:.1f} MB, checksum right"
    archive, note = item.path, ""  # that a person put there: it stays
    if not _matches(archive, item):
        if archive.is_file():
            note = f"; {archive}, which lay there, is not whole or not the source's and was not used"
        _download(item)
        archive = item.part
    n_files = unpack(archive, item.target, item.path.name, {"source": item.url, "checksum": item.checksum})
    item.part.unlink(missing_ok=True)
    slides = find_slides([item.target])
    problems = problems_message(check_slides(slides, slides, features))
    return f"{n_files} files{note}" + (f"\n{problems}" if problems else "")


def _download(item: Item) -> None:
    """Make ``item.part`` whole: its size and checksum are the source's. Goes on with what is there of it."""
    for _ in range(2):
        with disk_errors(item.path):
            item.path.parent.mkdir(parents=True, exist_ok=True)
            _patiently(item.source, lambda: _receive(item))
        if _matches(item.part, item):
            return
        item.part.unlink()
    raise Refused(
        f"{item.path.name}: the checksum is wrong (expected {item.checksum}), twice; nothing of it was kept. "
        "Something on the way changes the file, or the source is being changed: try again later."
    )


def _receive(item: Item) -> None:
    """Ask for what is still missing of ``item.part``, and again after a drop, as long as something comes."""
    from huggingface_hub.errors import HTTPError, OfflineModeIsEnabled
    from huggingface_hub.file_download import http_get

    if _size(item.part) > item.size:
        item.part.unlink()
    try:
        with item.part.open("ab") as file:
            get = partial(http_get, item.url, headers=item.headers, displayed_filename=item.path.name)
            get(file, resume_size=_size(item.part), expected_size=item.size)
    except ValueError as error:  # more than 50 GB
        raise Refused(
            f"{item.path.name}: {error} Or get it with the hub's own client (`hf download`) and put it to {item.path}; "
            "then the same command unpacks it."
        ) from None
    except (HTTPError, OfflineModeIsEnabled):
        raise
    except OSError as error:
        if error.errno is None:  # of the client itself: another size than expected
            raise EOFError(f"{_size(item.part)} of {item.size} bytes arrived") from error
        raise


def _patiently(source: Source, attempt: Callable[[], Any]) -> Any:
    """The result of `attempt`, which is repeated after faults of the network or the server that may pass; what remains
    becomes a sentence."""
    from huggingface_hub.errors import HTTPError, OfflineModeIsEnabled

    for wait in (*WAITS, None):
        try:
            return attempt()
        except (HTTPError, OfflineModeIsEnabled, EOFError) as error:
            status = getattr(getattr(error, "response", None), "status_code", 500)
            passes = status >= 500 or status in (408, 416, 429)
            if wait is None or not passes or isinstance(error, OfflineModeIsEnabled):
                raise _in_a_sentence(source, error) from None
            time.sleep(wait)


def _in_a_sentence(source: Source, error: Exception) -> Refused:
    from huggingface_hub import errors, get_token

    response = getattr(error, "response", None)
    status = getattr(response, "status_code", 0)
    if isinstance(error, errors.GatedRepoError):
        reason = "the token that was sent has no access" if get_token() else "no token was sent"
        fault = (
            f" is given to people who asked for it, and {reason} ({status}). 1. Open its page, log in, accept the "
            f"terms there and wait until they are confirmed. 2. {LOG_IN} Then run the same command again."
        )
    elif isinstance(error, errors.RepositoryNotFoundError) or status in (401, 403):
        fault = f": not there, or not shown to you ({status}). Is its address right, is a token needed? {LOG_IN}"
    elif response is None:
        reason = "Is there a network, a proxy (HTTPS_PROXY), a mirror (HF_ENDPOINT)?"
        fault = f" cannot be reached, or breaks off: {error}. {reason} {KEPT}"
    elif status == 404:  # the only one that does not keep other files from being fetched
        return Refused(f"{source.name} ({source.address}): not there any more (404): {response.url}.")
    else:
        fault = f": the server {'has a fault of its own' if status >= 500 else 'refuses'} ({status}). {KEPT}"
    return Unavailable(f"{source.name} ({source.address}){fault}")


def _size(path: Path) -> int:
    return path.stat().st_size if path.is_file() else 0


def _matches(path: Path, item: Item) -> bool:
    """Is the file of the source's size and checksum?"""
    if not path.is_file() or _size(path) != item.size:
        return False
    kind, expected = item.checksum.split(":")
    # The name that git gives a file is the sha1 of a header and the content.
    kind, header = ("sha1", f"blob {item.size}\0".encode()) if kind == "git" else (kind, b"")
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, lambda: hashlib.new(kind, header, usedforsecurity=False))
    return digest.hexdigest() == expected
