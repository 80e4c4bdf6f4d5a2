"""A headless Chromium, driven over the DevTools protocol's pipe: no port, no client to install.

Protocol: https://chromedevtools.github.io/devtools-protocol/. Messages are JSON with a zero byte
between them; Chromium reads descriptor 3 and writes descriptor 4 with `--remote-debugging-pipe`.
"""

from __future__ import annotations

import base64
import contextlib
import json
import os
import select
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run",
    "--disable-extensions", "--disable-component-update", "--disable-background-networking",
    "--disable-sync", "--no-default-browser-check", "--force-color-profile=srgb",
    "--host-resolver-rules=MAP * ~NOTFOUND", "--remote-debugging-pipe",
)  # fmt: skip
PATIENCE_S = 30.0
SETTLED = "new Promise(done => requestAnimationFrame(() => requestAnimationFrame(() => done(1))))"


def find_browser() -> str | None:
    """Returns the command that starts a Chromium, None where there is none."""
    return next((found for name in NAMES if (found := shutil.which(name))), None)


class Browser:
    """A running Chromium; ends with `close`, and with it everything that it started."""

    def __init__(self, command: str):
        self._folder = tempfile.mkdtemp(prefix="fsdpq-browser-")
        to_read, self._write = os.pipe()
        self._read, to_write = os.pipe()
        script = f'exec "$@" 3<&{to_read} 4>&{to_write}'
        self._process = subprocess.Popen(
            ["bash", "-c", script, "bash", command, *FLAGS, f"--user-data-dir={self._folder}"],
            pass_fds=(to_read, to_write),
            stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
            start_new_session=True,
        )  # fmt: skip
        os.close(to_read)
        os.close(to_write)
        self._buffer = b""
        self._count = 0
        self.events: list[dict[str, Any]] = []

    def call(self, method: str, session: str | None = None, **params: Any) -> dict[str, Any]:
        """Calls a method of the protocol; events that arrive before its answer are kept."""
        self._count += 1
        message: dict[str, Any] = {"id": self._count, "method": method, "params": params}
        message |= {"sessionId": session} if session else {}
        os.write(self._write, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._receive(method)
            if answer.get("id") == self._count:
                if "error" in answer:
                    raise RuntimeError(f"{method}: {answer['error']}")
                return answer["result"]
            self.events.append(answer)

    def wait_for(self, method: str, session: str) -> None:
        """Waits until an event of a page has arrived."""
        while not any(e["method"] == method and e.get("sessionId") == session for e in self.events):
            self.events.append(self._receive(method))

    def _receive(self, waiting_for: str) -> dict[str, Any]:
        until = time.monotonic() + PATIENCE_S
        while b"\0" not in self._buffer:
            if not select.select([self._read], [], [], max(0.0, until - time.monotonic()))[0]:
                raise TimeoutError(f"no answer of the browser to {waiting_for}")
            chunk = os.read(self._read, 1 << 20)
            if not chunk:
                raise RuntimeError(f"the browser ended while it was asked for {waiting_for}")
            self._buffer += chunk
        message, _, self._buffer = self._buffer.partition(b"\0")
        return json.loads(message)

    def open_page(self) -> Page:
        """Returns a new, empty tab."""
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        page = Page(self, session)
        for domain in ("Page", "Runtime", "Network", "Log"):
            page.call(f"{domain}.enable")
        return page

    def close(self) -> None:
        """Ends the browser and all of its processes, and removes its profile."""
        with contextlib.suppress(OSError, RuntimeError, TimeoutError):
            self.call("Browser.close")
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait(timeout=PATIENCE_S)
        os.close(self._read)
        os.close(self._write)
        shutil.rmtree(self._folder, ignore_errors=True)


@dataclass
class Page:
    """One tab.

    Attributes:
        browser: that has it.
        session: of the protocol.
        requests: addresses that were asked for since `show`, that of the page left out.
        messages: what was written into the console, violations of the page's policy included.
    """

    browser: Browser
    session: str
    requests: list[str] = field(default_factory=list)
    messages: list[str] = field(default_factory=list)

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        """Calls a method of the protocol for this tab."""
        return self.browser.call(method, self.session, **params)

    def show(self, path: Path) -> None:
        """Loads a file and waits until it is laid out; collects what it asked for and said."""
        self.browser.events.clear()
        self.call("Page.navigate", url=path.absolute().as_uri())
        self.browser.wait_for("Page.loadEventFired", self.session)
        self.evaluate(SETTLED)
        events = [e for e in self.browser.events if e.get("sessionId") == self.session]
        self.requests = [
            event["params"]["request"]["url"]
            for event in events
            if event["method"] == "Network.requestWillBeSent"
        ]
        self.requests.remove(path.absolute().as_uri())
        self.messages = [_message(event) for event in events if event["method"] in MESSAGES]

    def emulate(self, *, theme: str, width: int = 1100, height: int = 900) -> None:
        """Takes the place of a screen of ``width`` CSS pixels whose owner likes ``theme``."""
        features = [{"name": "prefers-color-scheme", "value": theme}]
        self.call("Emulation.setEmulatedMedia", features=features)
        self.call(
            "Emulation.setDeviceMetricsOverride",
            width=width, height=height, deviceScaleFactor=1, mobile=width < 600,
        )  # fmt: skip

    def evaluate(self, expression: str) -> Any:
        """Returns the value of JavaScript, which runs although the page allows no scripts."""
        answer = self.call(
            "Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True
        )
        if "exceptionDetails" in answer:
            raise RuntimeError(f"{expression}: {answer['exceptionDetails']}")
        return answer["result"].get("value")

    def screenshot(self) -> bytes:
        """Returns a PNG of the whole page."""
        taken = self.call("Page.captureScreenshot", format="png", captureBeyondViewport=True)
        return base64.b64decode(taken["data"])


MESSAGES = ("Log.entryAdded", "Runtime.consoleAPICalled", "Runtime.exceptionThrown")


def _message(event: dict[str, Any]) -> str:
    params = event["params"]
    return params["entry"]["text"] if "entry" in params else json.dumps(params)


@contextlib.contextmanager
def open_browser(command: str) -> Iterator[Browser]:
    """Yields a running browser and ends it, whatever happens."""
    browser = Browser(command)
    try:
        yield browser
    finally:
        browser.close()
