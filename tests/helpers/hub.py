"""Small servers on loopback for tests of downloads: the protocol of Hugging Face's hub, plain HTTP, and faults."""

import hashlib
import json
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

COMMIT = "c0ffee" + "0" * 34


@dataclass
class Hub:
    """What the server has, and how it behaves. Faults are taken in turn, one per GET of a file; then all is well.

    token: what a request must carry; None asks for nothing. granted: does that token have access?
    """

    repo: str = "MahmoodLab/UNI2-h-features"
    files: dict[str, bytes] = field(default_factory=dict)
    small: set[str] = field(default_factory=set)
    plain: dict[str, bytes] = field(default_factory=dict)
    token: str | None = None
    granted: bool = True
    faults: "list[Callable[[Handler, bytes], bytes | None]]" = field(default_factory=list)
    api_faults: list[int] = field(default_factory=list)
    page_size: int = 1000
    address: str = ""
    asked: list[tuple[str, str, str]] = field(default_factory=list)
    """Method, path and range of each request for a file."""
    sent: int = 0
    """Bytes of files that were sent."""


class Handler(BaseHTTPRequestHandler):
    """Answers as the hub does."""

    protocol_version = "HTTP/1.1"
    hub: Hub

    def log_message(self, *_: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        url = urlsplit(self.path)
        path, hub = unquote(url.path), self.hub
        api, resolve = f"/api/datasets/{hub.repo}", f"/datasets/{hub.repo}/resolve/{COMMIT}/"
        if path.startswith("/plain/"):
            return self.file(hub.plain.get(path.removeprefix("/plain/")), {})
        if path.startswith("/api/") and hub.api_faults:
            return self.answer(hub.api_faults.pop(0))
        if path in (api, f"{api}/revision/main"):
            return self.answer(200, json.dumps({"id": hub.repo, "sha": COMMIT, "gated": "manual"}).encode())
        if path == f"{api}/tree/{COMMIT}":
            return self.tree(int(dict(re.findall(r"(\w+)=(\w+)", url.query)).get("cursor", 0)))
        if path.startswith(resolve):
            if hub.token and (self.headers.get("authorization") != f"Bearer {hub.token}" or not hub.granted):
                code = 403 if self.headers.get("authorization") else 401
                return self.answer(code, headers={"X-Error-Code": "GatedRepo", "X-Error-Message": "Access restricted"})
            name = path.removeprefix(resolve)
            found = hub.files.get(name)
            etag = '"' + hashlib.sha256(found or b"").hexdigest() + '"'
            return self.file(found, {"ETag": etag, "X-Repo-Commit": COMMIT, "X-Linked-Etag": etag})
        self.answer(404, headers={"X-Error-Code": "RepoNotFound"})

    def tree(self, start: int) -> None:
        hub = self.hub
        listed = []
        for name, content in sorted(hub.files.items()):
            oid = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
            listed.append({"type": "file", "path": name, "size": len(content), "oid": oid})
            if name not in hub.small:
                sha256 = hashlib.sha256(content).hexdigest()
                listed[-1]["lfs"] = {"oid": sha256, "size": len(content), "pointerSize": 134}
        listed.insert(0, {"type": "directory", "path": "TCGA", "oid": "0" * 40, "size": 0})
        end = start + hub.page_size
        more = f'<{hub.address}/api/datasets/{hub.repo}/tree/{COMMIT}?recursive=True&cursor={end}>; rel="next"'
        self.answer(200, json.dumps(listed[start:end]).encode(), {"Link": more} if end < len(listed) else {})

    def file(self, content: bytes | None, headers: dict[str, str]) -> None:
        hub, asked = self.hub, self.headers.get("range", "")
        hub.asked.append((self.command, self.path, asked))
        if content is None:
            return self.answer(404, headers={"X-Error-Code": "EntryNotFound"})
        if self.command == "GET" and hub.faults:
            replaced = hub.faults.pop(0)(self, content)
            if replaced is None:
                return
            content = replaced
        start = int(asked.removeprefix("bytes=").removesuffix("-")) if asked else 0
        if asked and start >= len(content):
            return self.answer(416, headers={"Content-Range": f"bytes */{len(content)}"})
        if asked:
            headers = {**headers, "Content-Range": f"bytes {start}-{len(content) - 1}/{len(content)}"}
        self.answer(206 if asked else 200, content[start:], {**headers, "Accept-Ranges": "bytes"})
        hub.sent += len(content) - start if self.command == "GET" else 0

    def answer(self, code: int, body: bytes = b"", headers: dict[str, str] | None = None) -> None:
        self.send_response(code)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)


# ------------------------------------------------------------------------------------------------ faults


def status(code: int) -> Callable[[Handler, bytes], None]:
    """Answers with a status alone."""
    return lambda handler, content: handler.answer(code)


def dropped(share: float) -> Callable[[Handler, bytes], None]:
    """Promises what was asked for, sends a part of it and hangs up."""

    def fault(handler: Handler, content: bytes) -> None:
        asked = handler.headers.get("range", "bytes=0-")
        start = int(asked.removeprefix("bytes=").removesuffix("-"))
        handler.send_response(206 if start else 200)
        if start:
            handler.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        handler.send_header("Content-Length", str(len(content) - start))
        handler.end_headers()
        handler.wfile.write(content[start : start + int(share * len(content))])
        handler.wfile.flush()
        handler.close_connection = True
        handler.hub.sent += int(share * len(content))

    return fault


def truncated(share: float) -> Callable[[Handler, bytes], None]:
    """A shorter body, and a header that agrees with it: nothing looks wrong."""
    return lambda handler, content: handler.answer(200, content[: int(share * len(content))])


def wrong_range(handler: Handler, content: bytes) -> None:
    """Another part than was asked for, honestly labelled."""
    headers = {"Content-Range": f"bytes 0-{len(content) - 1}/{len(content)}"}
    handler.answer(206, content, headers)


def shifted(handler: Handler, content: bytes) -> None:
    """As many bytes as were asked for, from the start of the file, honestly labelled."""
    n = len(content) - int(handler.headers["range"].removeprefix("bytes=").removesuffix("-"))
    handler.answer(206, content[:n], {"Content-Range": f"bytes 0-{n - 1}/{len(content)}"})


def ignores_range(handler: Handler, content: bytes) -> None:
    """The whole file, whatever was asked for."""
    handler.answer(200, content)


def flipped(handler: Handler, content: bytes) -> bytes:
    """One bit of the file is another."""
    middle = len(content) // 2
    return content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]


@contextmanager
def serving(hub: Hub) -> Iterator[Hub]:
    """Serve `hub` on loopback; its address is filled in."""
    handler = type("Bound", (Handler,), {"hub": hub})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    hub.address = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
