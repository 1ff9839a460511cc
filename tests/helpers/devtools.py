"""A small client of Chromium's DevTools protocol: visits pages without a window and tells what happened there."""

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import websocket

from tests.helpers.waiting import until

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")


def find_browser() -> str | None:
    """The first of Chromium's names that is a command here."""
    return next(filter(None, map(shutil.which, NAMES)), None)


class Browser:
    """One page of a headless Chromium. `events` holds what the browser reported since the last visit began."""

    def __init__(self, command: str, folder: Path) -> None:
        self.process = subprocess.Popen(
            [
                command, "--headless=new", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-extensions",
                "--disable-background-networking", "--disable-component-update", "--disable-dev-shm-usage",
                "--remote-debugging-port=0", f"--user-data-dir={folder}", "about:blank",
            ],
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        port = folder / "DevToolsActivePort"
        until(lambda: port.is_file() and len(port.read_text().splitlines()) == 2, "the browser to start")
        number, path = port.read_text().splitlines()
        address = f"ws://127.0.0.1:{number}"
        self.events: list[dict[str, Any]] = []
        self._last, self._session = 0, ""
        self.socket = websocket.create_connection(f"{address}{path}", suppress_origin=True, timeout=60)
        page = next(t for t in self.call("Target.getTargets")["targetInfos"] if t["type"] == "page")
        attached = self.call("Target.attachToTarget", targetId=page["targetId"], flatten=True)
        self._session = attached["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """Send a command and wait for its answer; events that come meanwhile are kept."""
        self._last += 1
        message = {"id": self._last, "method": method, "params": parameters}
        if self._session:
            message["sessionId"] = self._session
        self.socket.send(json.dumps(message))
        while True:
            answer = json.loads(self.socket.recv())
            if answer.get("id") == self._last:
                assert "error" not in answer, f"{method}: {answer['error']}"
                return answer["result"]
            self.events.append(answer)

    def visit(self, address: str) -> None:
        """Open a page and wait until it, and the formulas in it, are there."""
        self.events.clear()
        self.call("Page.navigate", url=address)
        self.wait("document.readyState === 'complete'")
        # The theme loads MathJax only on pages with formulas.
        self.wait("!document.querySelector('script[src*=mathjax]') || !!(window.MathJax?.startup?.promise)")
        self.evaluate("(async () => { await window.MathJax?.startup?.promise; return true })()")

    def evaluate(self, expression: str) -> Any:
        """The value of a JavaScript expression in the page."""
        done = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in done, done["exceptionDetails"]
        return done["result"].get("value")

    def wait(self, expression: str) -> None:
        """Wait until a JavaScript expression is true."""
        until(lambda: self.evaluate(expression), expression)

    def width(self, pixels: int, height: int = 900) -> None:
        """Make the page so wide."""
        self.call(
            "Emulation.setDeviceMetricsOverride", width=pixels, height=height, deviceScaleFactor=1, mobile=pixels < 600
        )

    def found(self, *methods: str) -> list[dict[str, Any]]:
        """Parameters of the events of some kinds since the last visit began."""
        return [event["params"] for event in self.events if event.get("method") in methods]

    def problems(self) -> list[str]:
        """Errors since the last visit began: of requests, of scripts, on the console."""
        failed = [e["errorText"] for e in self.found("Network.loadingFailed") if not e.get("canceled")]
        thrown = [json.dumps(e["exceptionDetails"])[:500] for e in self.found("Runtime.exceptionThrown")]
        logged = [f"{e['entry']['text']} {e['entry'].get('url')}" for e in self.found("Log.entryAdded")
                  if e["entry"]["level"] == "error"]  # fmt: skip
        said = [json.dumps(e["args"])[:500] for e in self.found("Runtime.consoleAPICalled") if e["type"] == "error"]
        return [*failed, *thrown, *logged, *said]

    def close(self) -> None:
        """End the browser."""
        self.socket.close()
        self.process.terminate()
        self.process.wait(timeout=30)
