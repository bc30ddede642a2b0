"""Bounds of memory and of processor time around a block of a test.

Neither depends on what else the machine does, as a clock would.
"""

import resource
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

SELF = Path("/proc/self")
RESET_PEAK = "5"
"""What makes the kernel forget the peak of a process's memory (proc(5), clear_refs)."""
RESERVED = 4
"""How many times its memory a block may reserve: allocators reserve a gigabyte at once."""


class TooLong(BaseException):
    """The block took more processor time than allowed; no `except Exception` swallows it."""


def _too_long(number: int, frame: FrameType | None) -> None:
    raise TooLong


@contextmanager
def bounded(memory_bytes: int = 1 << 30, processor_s: float = 20) -> Iterator[None]:
    """Fail a block that takes more memory or processor time, even where the code under test turns
    that into an error of its own. For the main thread only.
    """
    limits = resource.getrlimit(resource.RLIMIT_AS)
    handler = signal.signal(signal.SIGVTALRM, _too_long)
    is_measured = True
    try:
        (SELF / "clear_refs").write_text(RESET_PEAK)
    except OSError:  # not in every container; the address space is bounded all the same
        is_measured = False
    before_bytes = _status_bytes("VmRSS")
    reserved_bytes = _status_bytes("VmSize") + RESERVED * memory_bytes
    resource.setrlimit(resource.RLIMIT_AS, (reserved_bytes, limits[1]))
    signal.setitimer(signal.ITIMER_VIRTUAL, processor_s)
    try:
        yield
    except BaseException as error:
        if any(isinstance(cause, MemoryError | TooLong) for cause in _causes(error)):
            raise AssertionError(
                f"it took more than {processor_s:g} s of a processor, or far too much memory"
            ) from error
        raise
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        resource.setrlimit(resource.RLIMIT_AS, limits)
        signal.signal(signal.SIGVTALRM, handler)
    taken_bytes = _status_bytes("VmHWM") - before_bytes
    assert not is_measured or taken_bytes <= memory_bytes, f"it took {taken_bytes >> 20} MiB"


def _status_bytes(field: str) -> int:
    (line,) = (
        line for line in (SELF / "status").read_text().splitlines() if line.startswith(f"{field}:")
    )
    return int(line.split()[1]) << 10


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__
