"""Progress tells count, rate and the time that is left, in lines that read in a log file."""

import io
import re
from pathlib import Path
from typing import Any

import fsspec
import pytest

from infra.console import progress
from infra.console.progress import Progress, duration, transfer
from infra.storage import commits, store
from infra.storage.stage_files import pinned_copy
from tests.helpers.manifest_facts import FACTS


class Clock:
    """The time, as the test has it."""

    def __init__(self) -> None:
        self.now_s = 1000.0

    def monotonic(self) -> float:
        return self.now_s


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(progress, "time", made)
    return made


def test_a_log_file_gets_a_whole_line_now_and_then_with_rate_and_time_left(clock: Clock) -> None:
    log = io.StringIO()
    with Progress("download", 10_000, "images", log) as shown:
        for second in range(1, 41):
            clock.now_s += 1
            shown.update(100 * second, f"note {second}")
    lines = log.getvalue().splitlines()
    assert (
        len(lines) == 40 / progress.LOG_EVERY_S + 1
        and "\r" not in log.getvalue()
        and "\x1b" not in log.getvalue()
    )
    assert re.split(r" {2,}", lines[1]) == [
        "download",
        "2,000/10,000",
        "images",
        "20%",
        "95/s",
        "1 min 24 s left",
        "note 20",
    ]
    assert re.split(r" {2,}", lines[-1]) == [
        "download",
        "4,000/10,000",
        "images",
        "40%",
        "98/s",
        "in 40 s",
    ]


def test_what_was_done_before_is_not_claimed_as_speed(clock: Clock) -> None:
    log = io.StringIO()
    with Progress("clip", 1000, "images", log) as shown:
        shown.update(900)
        clock.now_s += 20
        shown.update(920)
    assert "1.0/s" in log.getvalue() and "1 min 20 s left" in log.getvalue()


def test_a_terminal_gets_one_line_that_is_rewritten(clock: Clock) -> None:
    screen = Terminal()
    with Progress("embed", None, "pairs", screen) as shown:
        for _ in range(5):
            clock.now_s += 1
            shown.update(shown.done + 7)
    assert screen.getvalue().count("\n") == 1 and screen.getvalue().count("\r\x1b[2K") == 6
    assert "35  pairs" in screen.getvalue() and "left" not in screen.getvalue(), (
        "without a total nobody knows"
    )


def test_durations_are_for_people() -> None:
    assert [duration(seconds) for seconds in (0.4, 59, 126, 12_000)] == [
        "0 s",
        "59 s",
        "2 min 6 s",
        "3 h 20 min",
    ]


def test_a_large_transfer_is_shown_in_megabytes_and_a_small_one_is_not(clock: Clock) -> None:
    log = io.StringIO()
    with transfer("clip up", progress.MIN_PROGRESS_BYTES - 1, log) as tell:
        clock.now_s += 60
        tell(5)
    assert log.getvalue() == ""
    with transfer("clip up", 400 * progress.MB, log) as tell:
        for _ in range(4):
            clock.now_s += 12
            tell(120 * progress.MB)
            tell(-20 * progress.MB)  # what went wrong goes again
    lines = log.getvalue().splitlines()
    assert len(lines) == 5 and re.split(r" {2,}", lines[-1])[1:4] == ["400/400", "MB", "100%"]


def test_a_store_tells_of_every_byte_once_however_often_it_is_tried(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = store.open_root(f"memory://bucket-{tmp_path.name}", tmp_path / "scratch")
    monkeypatch.setattr(progress, "MIN_PROGRESS_BYTES", 0)
    monkeypatch.setattr("infra.storage.retry.FIRST_PAUSE_S", 0.001)
    told: dict[str, int] = {}
    show = progress.Progress

    class Shown(show):
        def update(self, done: int, note: str = "") -> None:
            told[self.label] = done
            super().update(done, note)

    monkeypatch.setattr(progress, "Progress", Shown)
    monkeypatch.setattr(progress, "MB", 1)
    failures = iter([True, False, True, False])
    for name in ("put_file", "get_file"):
        whole = getattr(root.fs, name)

        def cut(source: str, target: str, callback: Any, whole: Any = whole) -> None:
            if next(failures, False):
                callback.relative_update(4)
                raise TimeoutError("cut")
            whole(source, target, callback=callback)

        monkeypatch.setattr(type(root.fs), name, staticmethod(cut), raising=False)
    out = tmp_path / "out"
    out.mkdir()
    (out / "a.bin").write_bytes(bytes(3000))
    (out / "b.bin").write_bytes(bytes(500))
    committed = commits.commit(root, "clip", "k", out, FACTS)
    assert sum(path.stat().st_size for path in pinned_copy(committed.files).glob("*.bin")) == 3500
    assert told == {"clip up": 3500, "clip down": 3500}
    fsspec.filesystem("memory").store.clear()
