"""A headless Chromium of this machine, spoken to by its DevTools protocol over loopback. No page it opens can reach a network from here."""

import base64
import itertools
import json
import shutil
import subprocess
import time
import urllib.request
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from websockets.sync.client import connect

COMMAND = shutil.which("chromium")
KEYS = {"Escape": 27, "ArrowDown": 40, "ArrowUp": 38, "ArrowLeft": 37, "ArrowRight": 39, "Enter": 13, "Tab": 9}


class Chromium:
    """One window with one page. A context manager. `errors`: what the page's console and exceptions said, `requests`: addresses it asked for."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.errors, self.requests = folder, list[str](), list[str]()
        self._numbers = itertools.count(1)

    def __enter__(self) -> Self:
        assert COMMAND, "the caller skips without one"
        options = [
            "--headless=new",
            "--no-sandbox",
            "--disable-gpu",
            "--disable-dev-shm-usage",
            "--remote-debugging-port=0",
        ]
        profile = self.folder / "profile"
        self._log = (self.folder / "chromium.log").open("w")
        self._process = subprocess.Popen(
            [COMMAND, *options, f"--user-data-dir={profile}", "about:blank"], stdout=self._log, stderr=self._log
        )
        try:
            port_file = profile / "DevToolsActivePort"
            port = self._wait(lambda: port_file.exists() and port_file.read_text().split("\n")[0], 60)
            pages = self._wait(lambda: self._pages(port), 60)
            self._socket = connect(pages[0], max_size=None, proxy=None)
        except BaseException:
            self.__exit__(None, None, None)
            raise
        for domain in ("Runtime", "Log", "Page", "Network"):
            self.call(f"{domain}.enable")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._process.terminate()
        self._process.wait(20)
        self._log.close()

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """One command of the protocol → its result. What the page says meanwhile is noted."""
        number = next(self._numbers)
        self._socket.send(json.dumps({"id": number, "method": method, "params": parameters}))
        while True:
            said = json.loads(self._socket.recv(timeout=120))
            if said.get("id") == number:
                assert "error" not in said, f"{method}: {said['error']}"
                return said["result"]
            self._note(said)

    def _note(self, said: dict[str, Any]) -> None:
        method, about = said.get("method"), said.get("params", {})
        if method == "Runtime.exceptionThrown":
            details = about["exceptionDetails"]
            self.errors.append(details.get("exception", {}).get("description") or details["text"])
        elif method == "Runtime.consoleAPICalled" and about["type"] in ("error", "warning", "assert"):
            self.errors.append(" ".join(str(one.get("value", one.get("description"))) for one in about["args"]))
        elif method == "Log.entryAdded" and about["entry"]["level"] in ("error", "warning"):
            self.errors.append(about["entry"]["text"])
        elif method == "Network.requestWillBeSent":
            self.requests.append(about["request"]["url"][:200])

    def open(self, page: Path, fragment: str = "", seconds: float = 60) -> None:
        """Load the file and wait until its script says that it is ready."""
        self.call("Page.navigate", url="about:blank")
        self.call("Page.navigate", url=page.as_uri() + fragment)
        self.wait("document.documentElement.dataset.ready !== undefined", seconds)

    def ask(self, expression: str) -> Any:
        """The value of a JavaScript expression, awaited."""
        found = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in found, f"{expression}: {found['exceptionDetails']}"
        return found["result"].get("value")

    def wait(self, expression: str, seconds: float = 30) -> None:
        """Until the expression is true; what it asks of may not be there yet."""
        soon = f"(() => {{ try {{ return Boolean({expression}) }} catch {{ return false }} }})()"
        self._wait(lambda: self.ask(soon), seconds, expression)

    def press(self, key: str) -> None:
        text = {"text": key} if len(key) == 1 else {}
        code = {"windowsVirtualKeyCode": KEYS[key]} if key in KEYS else {}
        self.call("Input.dispatchKeyEvent", type="keyDown", key=key, **text, **code)
        self.call("Input.dispatchKeyEvent", type="keyUp", key=key, **code)

    def drag(self, start: tuple[float, float], end: tuple[float, float]) -> None:
        for kind, (x, y), buttons in (
            ("mouseMoved", start, 0),
            ("mousePressed", start, 1),
            ("mouseMoved", ((start[0] + end[0]) / 2, (start[1] + end[1]) / 2), 1),
            ("mouseMoved", end, 1),
            ("mouseReleased", end, 0),
        ):
            button = "none" if kind == "mouseMoved" and not buttons else "left"
            self.call("Input.dispatchMouseEvent", type=kind, x=x, y=y, button=button, buttons=buttons, clickCount=1)

    def look(self, width: int, height: int, *, dark: bool = False, phone: bool = False) -> None:
        """Size of the window, colour scheme, and whether it is a phone's."""
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=phone)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])

    def screenshot(self, path: Path) -> None:
        path.write_bytes(base64.b64decode(self.call("Page.captureScreenshot", format="png")["data"]))

    def print(self) -> bytes:
        """The page as PDF."""
        return base64.b64decode(self.call("Page.printToPDF")["data"])

    def _pages(self, port: str) -> list[str]:
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        with opener.open(f"http://127.0.0.1:{port}/json", timeout=10) as answer:
            return [one["webSocketDebuggerUrl"] for one in json.loads(answer.read()) if one["type"] == "page"]

    def _wait(self, ask: Any, seconds: float, what: str = "chromium") -> Any:
        until = time.monotonic() + seconds
        while not (found := ask()):
            assert time.monotonic() < until, f"waited {seconds} s for {what}; the page said {self.errors}"
            time.sleep(0.05)
        return found
