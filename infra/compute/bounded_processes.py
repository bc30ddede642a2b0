"""Work on hostile files in processes of their own, whose memory and time are limited.

A module with such work calls `serve` when it runs as a script. `BoundedProcesses` starts it, once
for each thread that calls at that time, and ends it if it takes too long. A process reads requests
from stdin (HEAD and the bytes) and writes answers to stdout (ANSWER and the bytes).
"""

import os
import resource
import signal
import struct
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

HEAD = struct.Struct("<Qd")
"""Bytes of the request, seconds that the work may take."""
ANSWER = struct.Struct("<?Q")
"""Whether the work was done, bytes that follow: its result, or why it was refused."""
STANDARD_FILES = 3
START = "import runpy, sys; sys.path.append(sys.argv[1]); runpy.run_module(sys.argv[2], None, '__main__')"  # noqa: E501
"""Finds the module where this package is, without a folder before the standard library's."""
PACKAGES = Path(__file__).parents[2]

Process = subprocess.Popen[bytes]


class RefusedError(ValueError):
    """The work refused its input; the message is the reason."""


class ProcessEndedError(Exception):
    """The process ended over its input: it needed too much memory, or crashed."""


class OverTimeError(ProcessEndedError):
    """The work took longer than it may."""


class ClosedError(Exception):
    """The processes were closed."""


def serve(
    work: Callable[[bytes], bytes], memory_bytes: int, *, may_open_files: bool = True
) -> None:
    """Answer the requests of stdin with `work` until there are no more.

    `work` raises RefusedError for an input that it does not take. `memory_bytes` bounds the address
    space. Without `may_open_files` the kernel refuses this process every file and every connection
    from now on, whatever library asks for one.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # who started this process ends it
    resource.setrlimit(resource.RLIMIT_AS, (memory_bytes, memory_bytes))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if not may_open_files:
        resource.setrlimit(resource.RLIMIT_NOFILE, (STANDARD_FILES, STANDARD_FILES))
    requests, answers = sys.stdin.buffer, sys.stdout.buffer
    while head := requests.read(HEAD.size):
        size_bytes, limit_s = HEAD.unpack(head)
        request = requests.read(size_bytes)
        signal.setitimer(signal.ITIMER_REAL, limit_s)  # SIGALRM ends the process
        try:
            is_done, answer = True, work(request)
        except RefusedError as error:
            is_done, answer = False, str(error).encode("utf-8", "replace")
        signal.setitimer(signal.ITIMER_REAL, 0)
        answers.write(ANSWER.pack(is_done, len(answer)))
        answers.write(answer)
        answers.flush()


class BoundedProcesses:
    """Processes that run one module's work, one for each thread that calls at that time."""

    def __init__(self, module: str, limit_s: float) -> None:
        """`module` is the dotted name of a module that calls `serve`; `limit_s` the maximum seconds
        of one call.
        """
        self.module, self.limit_s = module, limit_s
        self._lock = threading.Lock()
        self._idle: list[Process] = []
        self._busy: set[Process] = set()
        self._is_closed = False

    def call(self, request: bytes) -> bytes:
        """Return the result of the work. Raises RefusedError with its reason, OverTimeError,
        ProcessEndedError, and ClosedError after `close`.
        """
        process = self._take()
        try:
            is_done, answer = _exchange(process, request, self.limit_s)
        except (OSError, struct.error):  # the process has ended
            process.kill()
            if process.wait() == -signal.SIGALRM:
                raise OverTimeError(f"it takes more than {self.limit_s:g} s") from None
            raise ProcessEndedError("it needs too much memory, or crashes its reader") from None
        finally:
            self._put_back(process)
        if not is_done:
            raise RefusedError(answer.decode())
        return answer

    def close(self) -> None:
        """End all processes; calls in progress fail."""
        with self._lock:
            self._is_closed = True
            idle, busy = list(self._idle), list(self._busy)
            self._idle.clear()
        for process in busy:
            process.kill()
        for process in idle:
            process.kill()
            process.communicate()

    def _take(self) -> Process:
        with self._lock:
            if self._is_closed:
                raise ClosedError
            process = self._idle.pop() if self._idle else _start(self.module)
            self._busy.add(process)
            return process

    def _put_back(self, process: Process) -> None:
        with self._lock:
            self._busy.discard(process)
            if process.poll() is None and not self._is_closed:
                self._idle.append(process)
                return
        process.kill()
        process.communicate()


def _start(module: str) -> Process:
    """Start a process; its libraries use one thread, for several run side by side."""
    return subprocess.Popen(
        [sys.executable, "-P", "-c", START, str(PACKAGES), module],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env=os.environ | {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"},
    )


def _exchange(process: Process, request: bytes, limit_s: float) -> tuple[bool, bytes]:
    """Return whether the work was done, and the answer. Raises OSError or struct.error if the
    process ends.
    """
    assert process.stdin is not None and process.stdout is not None
    process.stdin.write(HEAD.pack(len(request), limit_s))
    process.stdin.write(request)
    process.stdin.flush()
    is_done, size_bytes = ANSWER.unpack(process.stdout.read(ANSWER.size))
    answer = process.stdout.read(size_bytes)
    if len(answer) != size_bytes:
        raise OSError("the process ended while it answered")
    return is_done, answer
