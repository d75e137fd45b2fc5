"""A headless Chromium over its DevTools pipe, with the standard library alone."""

from __future__ import annotations

import base64
import contextlib
import json
import os
import select
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-dev-shm-usage",
    "--disable-background-networking", "--disable-component-update", "--disable-sync", "--remote-debugging-pipe",
    "--disable-extensions", "--hide-scrollbars",
)  # fmt: skip
LIMIT = 60.0  # seconds that anything may take


def find() -> str | None:
    """The path of a browser, if there is one."""
    return next((path for path in map(shutil.which, NAMES) if path), None)


class Browser:
    """One page of a browser of its own. `problems` are what its console says and the exceptions nobody caught."""

    def __init__(self, program: str, profile: Path, width: int = 1280, height: int = 800) -> None:
        there, here = os.pipe(), os.pipe()
        ends = there[0], here[1]

        def connect() -> None:
            kept = [os.dup(end) for end in ends]
            for end, place in zip(kept, (3, 4), strict=True):
                os.dup2(end, place)

        self.process = subprocess.Popen(
            [program, *FLAGS, f"--user-data-dir={profile}", f"--window-size={width},{height}", "about:blank"],
            stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
            preexec_fn=connect, pass_fds=(3, 4), start_new_session=True,
        )  # fmt: skip
        for end in ends:
            os.close(end)
        self.write, self.read = there[1], here[0]
        self.buffer = b""
        self.number = 0
        self.session: str | None = None
        self.problems: list[str] = []
        self.requests: list[str] = []
        try:
            targets = self.call("Target.getTargets")["targetInfos"]
            page = next(target["targetId"] for target in targets if target["type"] == "page")
            self.session = self.call("Target.attachToTarget", targetId=page, flatten=True)["sessionId"]
            for domain in ("Page", "Runtime", "Log", "Network"):
                self.call(f"{domain}.enable")
            self.size(width, height)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """End the browser."""
        with contextlib.suppress(OSError, AssertionError):
            self.session = None
            self.call("Browser.close")
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        for end in (self.write, self.read):
            os.close(end)

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        """A command of the DevTools protocol, and its answer."""
        self.number += 1
        message: dict[str, Any] = {"id": self.number, "method": method, "params": params}
        if self.session:
            message["sessionId"] = self.session
        data = json.dumps(message).encode() + b"\0"
        while data:
            data = data[os.write(self.write, data) :]
        while True:
            answer = self._receive()
            if answer.get("id") == self.number:
                assert "error" not in answer, f"{method}: {answer['error']}"
                result: dict[str, Any] = answer["result"]
                return result

    def _receive(self) -> dict[str, Any]:
        until = time.monotonic() + LIMIT
        while b"\0" not in self.buffer:
            ready = select.select([self.read], [], [], max(0.0, until - time.monotonic()))[0]
            assert ready, f"the browser is silent for {LIMIT} s"
            piece = os.read(self.read, 1 << 20)
            assert piece, "the browser ended"
            self.buffer += piece
        text, _, self.buffer = self.buffer.partition(b"\0")
        message: dict[str, Any] = json.loads(text)
        params = message.get("params", {})
        if message.get("method") == "Runtime.exceptionThrown":
            self.problems.append(json.dumps(params["exceptionDetails"]))
        elif message.get("method") == "Runtime.consoleAPICalled" and params["type"] in ("error", "warning", "assert"):
            self.problems.append(json.dumps(params["args"]))
        elif message.get("method") == "Log.entryAdded" and params["entry"]["level"] in ("error", "warning"):
            self.problems.append(params["entry"]["text"])
        elif message.get("method") == "Network.requestWillBeSent":
            self.requests.append(params["request"]["url"])
        elif message.get("method") == "Page.javascriptDialogOpening":
            self.problems.append(f"dialog: {params['message']}")
            self._answer_dialog()
        return message

    def _answer_dialog(self) -> None:
        self.number += 1
        message = {"id": self.number, "sessionId": self.session, "method": "Page.handleJavaScriptDialog"}
        os.write(self.write, json.dumps({**message, "params": {"accept": True}}).encode() + b"\0")

    def open(self, page: Path) -> None:
        """Open a file and wait until the browser has read all of it."""
        self.call("Page.navigate", url=page.resolve().as_uri())
        self.until("document.readyState === 'complete' && location.protocol === 'file:'")

    def ask(self, expression: str) -> Any:
        """The value of an expression in the page."""
        answer = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in answer, f"{expression}: {answer['exceptionDetails']}"
        return answer["result"].get("value")

    def until(self, expression: str) -> Any:
        """Wait until an expression is true; its value."""
        limit = time.monotonic() + LIMIT
        while time.monotonic() < limit:
            if value := self.ask(expression):
                return value
            time.sleep(0.02)
        raise AssertionError(f"never true: {expression}")

    def move(self, selector: str, click: bool = False) -> None:
        """Put the pointer on an element (and click)."""
        box = f"(e => [e.left + e.width / 2, e.top + e.height / 2])({_one(selector)}.getBoundingClientRect())"
        x, y = self.ask(box)
        self.call("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)
        for kind in ("mousePressed", "mouseReleased") if click else ():
            self.call("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)

    def click(self, selector: str) -> None:
        self.move(selector, click=True)

    def key(self, name: str, code: int = 0) -> None:
        """Press a key: a letter, or a name such as ArrowRight with its key code."""
        text = {"text": name} if len(name) == 1 else {"text": "\r"} if name == "Enter" else {}
        self.call("Input.dispatchKeyEvent", type="keyDown", key=name, windowsVirtualKeyCode=code, **text)
        self.call("Input.dispatchKeyEvent", type="keyUp", key=name, windowsVirtualKeyCode=code)

    def type(self, text: str) -> None:
        self.call("Input.insertText", text=text)

    def choose(self, selector: str, value: str) -> None:
        """Set a select as its user would."""
        element = _one(selector)
        self.ask(f"({element}.value = {json.dumps(value)}, {element}.dispatchEvent(new Event('change')))")

    def size(self, width: int, height: int, dark: bool = False) -> None:
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])

    def screenshot(self, path: Path) -> None:
        path.write_bytes(base64.b64decode(self.call("Page.captureScreenshot", format="png")["data"]))


def _one(selector: str) -> str:
    return f"document.querySelector({json.dumps(selector)})"
