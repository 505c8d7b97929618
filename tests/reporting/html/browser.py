"""Chromium without a window, told what to do over two pipes (the DevTools protocol): for one test, where it is."""

import base64
import json
import os
import shutil
import subprocess
from pathlib import Path
from types import TracebackType
from typing import Any, Self

FOUND = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
_COMPLAINTS = ("Runtime.exceptionThrown", "Log.entryAdded", "Network.requestWillBeSent", "Runtime.consoleAPICalled")


class Browser:
    """One page; a context manager. `complaints` holds what went wrong on it, and what it asked the network for."""

    def __init__(self, profile: Path) -> None:
        assert FOUND is not None
        reads, self._write = os.pipe()
        self._read, writes = os.pipe()
        command = [
            FOUND, "--headless=new", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-dev-shm-usage",
            f"--user-data-dir={profile}", "--remote-debugging-pipe", "about:blank",
        ]  # fmt: skip

        def place_pipes() -> None:  # Chromium reads from 3 and writes to 4
            ours, theirs = os.dup(reads), os.dup(writes)
            os.dup2(ours, 3)
            os.dup2(theirs, 4)

        self._process = subprocess.Popen(
            command, preexec_fn=place_pipes, pass_fds=(3, 4, reads, writes), stderr=subprocess.DEVNULL
        )
        os.close(reads)
        os.close(writes)
        self._begun, self._number, self._session = b"", 0, ""
        self._events: list[dict[str, Any]] = []
        targets = self.call("Target.getTargets")["targetInfos"]
        page = next(target["targetId"] for target in targets if target["type"] == "page")
        self._session = self.call("Target.attachToTarget", targetId=page, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def open(self, path: Path, width: int, height: int = 800, dark: bool = False) -> None:
        """Load a page as a screen of this width (CSS pixels) shows it."""
        self.call(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 600
        )
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])
        self._events.clear()
        self.call("Page.navigate", url=path.as_uri())
        while not any(event["method"] == "Page.loadEventFired" for event in self._events):
            self._events.append(self._next())

    def evaluate(self, expression: str) -> Any:
        return self.call("Runtime.evaluate", expression=expression, returnByValue=True)["result"].get("value")

    @property
    def complaints(self) -> list[dict[str, Any]]:
        self.evaluate("0")  # what was sent before has arrived then
        found = [event for event in self._events if event["method"] in _COMPLAINTS]
        own = ("file://", "data:")
        return [e for e in found if not e["params"].get("request", {}).get("url", "").startswith(own)]

    def picture(self) -> bytes:
        """The whole page as PNG."""
        size = self.call("Page.getLayoutMetrics")["cssContentSize"]
        clip = {"x": 0, "y": 0, "width": size["width"], "height": min(size["height"], 12_000), "scale": 1}
        return base64.b64decode(self.call("Page.captureScreenshot", captureBeyondViewport=True, clip=clip)["data"])

    def call(self, method: str, **params: Any) -> Any:
        self._number += 1
        message: dict[str, Any] = {"id": self._number, "method": method, "params": params}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._write, json.dumps(message).encode() + b"\0")
        while "id" not in (answer := self._next()):
            self._events.append(answer)
        assert answer["id"] == self._number and "error" not in answer, answer
        return answer["result"]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._process.terminate()
        self._process.wait(20)
        os.close(self._read)
        os.close(self._write)

    def _next(self) -> dict[str, Any]:
        while b"\0" not in self._begun:
            new = os.read(self._read, 2**20)
            assert new, "the browser has ended"
            self._begun += new
        message, _, self._begun = self._begun.partition(b"\0")
        return dict(json.loads(message))
