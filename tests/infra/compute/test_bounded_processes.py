"""Hostile work costs at most the process that does it."""

from collections.abc import Iterator

import pytest

from infra.compute.bounded_processes import (
    BoundedProcesses,
    ClosedError,
    OverTimeError,
    ProcessEndedError,
    RefusedError,
)
from tests.helpers import hostile_work


@pytest.fixture(scope="module")
def processes() -> Iterator[BoundedProcesses]:
    processes = BoundedProcesses(hostile_work.__name__, limit_s=60)
    yield processes
    processes.close()


def test_one_process_answers_many_requests(processes: BoundedProcesses) -> None:
    assert [processes.call(b"echo %d" % number) for number in range(9)][-1] == b"echo 8"
    with pytest.raises(RefusedError, match=r"^too large$"):
        processes.call(b"refuse too large")
    assert len(processes._idle) == 1


def test_no_file_is_opened(processes: BoundedProcesses) -> None:
    assert processes.call(b"open /dev/zero") == b"Too many open files"


def test_too_much_memory_or_time_or_a_crash_ends_one_process_only(
    processes: BoundedProcesses,
) -> None:
    for request in (b"hold %d" % (1 << 30), b"crash"):
        with pytest.raises(ProcessEndedError, match="memory"):
            processes.call(request)
    limited = BoundedProcesses(hostile_work.__name__, limit_s=0.2)
    with pytest.raises(OverTimeError, match=r"0\.2 s"):
        limited.call(b"sleep 600")
    limited.close()
    with pytest.raises(ClosedError):
        limited.call(b"echo")
    assert processes.call(b"hold 1000") == b"1000"
