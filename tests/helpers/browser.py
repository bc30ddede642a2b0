"""Drives a headless Chromium over its debugging pipe, for tests of pages; nothing but the browser
itself is needed.
"""

import base64
import json
import os
import shutil
import subprocess
import time
from pathlib import Path
from types import TracebackType
from typing import Any, Self

CHROMIUM = (
    shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
)
FLAGS = (
    *(
        "--headless=new",
        "--no-sandbox",
        "--disable-gpu",
        "--no-first-run",
        "--hide-scrollbars",
        "--disable-dev-shm-usage",
    ),
    *(
        "--disable-background-networking",
        "--disable-component-update",
        "--disable-sync",
        "--disable-extensions",
        "--remote-debugging-pipe",
    ),
)
CODES = {"Escape": 27}
"""Of keys whose meaning is the browser's own."""


class Browser:
    """Context manager: one page; `errors` collects what the page's scripts throw and what its
    policy refuses.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.errors: list[str] = []

    def __enter__(self) -> Self:
        assert CHROMIUM
        read_ours, write_theirs = os.pipe()
        read_theirs, write_ours = os.pipe()

        def wire() -> None:  # Chromium reads commands from 3 and writes answers to 4
            os.dup2(os.dup(read_theirs), 63)
            os.dup2(os.dup(write_theirs), 64)
            os.dup2(63, 3)
            os.dup2(64, 4)

        self.process = subprocess.Popen(
            [CHROMIUM, *FLAGS, f"--user-data-dir={self.folder}"],
            preexec_fn=wire,
            close_fds=False,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(read_theirs)
        os.close(write_theirs)
        self.reader, self.writer = (
            os.fdopen(read_ours, "rb"),
            os.fdopen(write_ours, "wb", buffering=0),
        )
        self.number, self.session, self.left = 0, "", b""
        target = self.tell("Target.createTarget", url="about:blank")["targetId"]
        self.session = self.tell("Target.attachToTarget", targetId=target, flatten=True)[
            "sessionId"
        ]
        for domain in ("Page", "Runtime", "Log"):
            self.tell(f"{domain}.enable")
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.process.kill()
        self.process.wait()
        self.reader.close()
        self.writer.close()

    def tell(self, method: str, **params: Any) -> dict[str, Any]:
        """Send a command of the DevTools protocol and return its result."""
        self.number += 1
        message = {"id": self.number, "method": method, "params": params} | (
            {"sessionId": self.session} if self.session else {}
        )
        self.writer.write(json.dumps(message).encode() + b"\0")
        while True:
            answer = self._next()
            if answer.get("id") == self.number:
                assert "error" not in answer, answer
                return dict(answer["result"])

    def go(self, url: str) -> None:
        """Open a page and wait until its scripts have run."""
        self.tell("Page.navigate", url=url)
        self.until("location.href != 'about:blank' && document.readyState == 'complete'")

    def run(self, script: str) -> Any:
        """Return the value of a JavaScript expression; awaits a promise."""
        found = self.tell(
            "Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True
        )
        assert "exceptionDetails" not in found, found["exceptionDetails"]
        return found["result"].get("value")

    def until(self, script: str, seconds: float = 30) -> Any:
        """Wait until an expression is true, and return its value."""
        deadline = time.monotonic() + seconds
        while not (value := self.run(script)):
            assert time.monotonic() < deadline, f"{script} did not become true; {self.errors}"
            time.sleep(0.05)
        return value

    def press(self, key: str, text: str = "") -> None:
        """Press and release one key."""
        code = {"windowsVirtualKeyCode": CODES[key]} if key in CODES else {}
        for kind in ("keyDown", "keyUp"):
            self.tell(
                "Input.dispatchKeyEvent",
                type=kind,
                key=key,
                **code,
                **({"text": text} if text and kind == "keyDown" else {}),
            )

    def look(self, file: Path, width: int = 1280, height: int = 900, is_dark: bool = False) -> None:
        """Save a screenshot at that size and colour scheme."""
        self.tell(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=1,
            mobile=width < 600,
        )
        scheme = {"name": "prefers-color-scheme", "value": "dark" if is_dark else "light"}
        self.tell("Emulation.setEmulatedMedia", features=[scheme])
        self.run("new Promise((done) => setTimeout(done, 300))")
        file.write_bytes(
            base64.b64decode(self.tell("Page.captureScreenshot", format="png")["data"])
        )

    def _next(self) -> dict[str, Any]:
        while b"\0" not in self.left:
            piece = self.reader.read1(1 << 16)  # type: ignore[attr-defined]
            assert piece, "the browser has gone"
            self.left += piece
        line, _, self.left = self.left.partition(b"\0")
        event = dict(json.loads(line))
        if event.get("method") == "Runtime.exceptionThrown":
            self.errors.append(json.dumps(event["params"]["exceptionDetails"])[:500])
        if event.get("method") == "Log.entryAdded" and event["params"]["entry"]["level"] == "error":
            self.errors.append(
                f"{event['params']['entry']['text']} {event['params']['entry'].get('url', '')}"
            )
        return event
