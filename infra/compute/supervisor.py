"""Run a service in a process of its own and start it again after a crash.

A crash is an end by a signal, such as SIGBUS for a mapped file that was cut, or SIGKILL for too
much memory. A worker that is told to end, or that ends by itself before any crash, is not started
again. The worker's stdin stays open as long as the supervisor lives.
"""

import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable
from types import FrameType

FIRST_PAUSE_S = 0.5
MAX_PAUSE_S = 15.0
STEADY_S = 60.0
"""A worker that ran so long is started again without a longer pause than the first."""

Process = subprocess.Popen[bytes]


class Supervisor:
    """Keeps one worker running until SIGINT or SIGTERM, which it passes on as SIGTERM."""

    def __init__(self, start: Callable[[], Process], report: Callable[[str], None]) -> None:
        """`start` starts the worker; `report` receives a line about each crash."""
        self.start, self.report = start, report
        self._stop = threading.Event()
        self._signal = 0
        self._worker: Process | None = None

    def run(self) -> int:
        """Return the exit code of the worker. Ends this process as the signal does that ended it.

        To be called from the main thread.
        """
        before = {
            number: signal.signal(number, self._end) for number in (signal.SIGINT, signal.SIGTERM)
        }
        try:
            code = self._keep_running()
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
        if self._signal:
            signal.raise_signal(self._signal)
        return code

    def _keep_running(self) -> int:
        pause_s = 0.0
        while True:
            started_s = time.monotonic()
            self._worker = self.start()
            if self._stop.is_set():  # the signal came while it was started
                self._worker.terminate()
            code = self._worker.wait()
            if self._stop.is_set() or code == 0 or (code > 0 and not pause_s):
                return code
            is_steady = time.monotonic() - started_s > STEADY_S
            pause_s = FIRST_PAUSE_S if is_steady or not pause_s else min(MAX_PAUSE_S, 2 * pause_s)
            self.report(f"{_name_end(code)}: it starts again in {pause_s:g} s")
            if self._stop.wait(pause_s):
                return 0

    def _end(self, number: int, _: FrameType | None) -> None:
        self._signal = number
        self._stop.set()
        if self._worker is not None:
            self._worker.terminate()


def end_with(supervisor_fd: int) -> None:
    """End this process as SIGTERM does once the supervisor, at the other end of a pipe, is gone."""

    def wait() -> None:
        while os.read(supervisor_fd, 4096):
            pass
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=wait, name="await-supervisor", daemon=True).start()


def _name_end(code: int) -> str:
    if code > 0:
        return f"the service cannot start (exit code {code})"
    name = signal.Signals(-code).name
    causes = {
        signal.SIGBUS: ", which a file that is cut or a broken disk causes",
        signal.SIGKILL: ", which the system sends when memory runs out",
    }
    return f"the service crashed ({name}{causes.get(signal.Signals(-code), '')})"
