"""A run does not need Prefect's history: a database that cannot be used is moved aside."""

import fcntl
import json
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import pytest

from flows.scheduling import prefect_server
from flows.scheduling.prefect_server import (
    DATABASE,
    IN_USE,
    ServerStartError,
    _database_fault,
    lasting_server,
)
from infra.errors import UnclipError
from tests.flows.scheduling.test_prefect_server import PRIVATE, environment
from tests.helpers.s3_server import free_ports


def write_database(path: Path) -> bytes:
    """Write a database of some pages, without a `-wal` file, and return its bytes."""
    with closing(sqlite3.connect(path)) as opened, opened:
        opened.execute("CREATE TABLE alembic_version (version_num TEXT)")
        opened.execute("INSERT INTO alembic_version VALUES ('of-another-version')")
        opened.execute("CREATE TABLE rows (text TEXT)")
        opened.executemany("INSERT INTO rows VALUES (?)", [("x" * 500,)] * 200)
    return path.read_bytes()


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home with a sound database, whose server starts nothing."""
    folder = tmp_path / "what? it's #1"
    folder.mkdir()
    write_database(folder / DATABASE)

    @contextmanager
    def start(home: Path, port: int, token: str) -> Iterator[str]:
        yield "http://127.0.0.1:1/api"

    monkeypatch.setattr(prefect_server, "_private_server", start)
    monkeypatch.delenv("PREFECT_API_URL", raising=False)
    return folder


def test_a_sound_database_stays(home: Path) -> None:
    before, lines = (home / DATABASE).read_bytes(), list[str]()
    with prefect_server.prefect_server(home, lines.append):
        assert (home / DATABASE).read_bytes() == before
    (home / DATABASE).write_bytes(b"")  # an empty database
    (home / "missing").mkdir()
    for folder in (home, home / "missing"):
        with prefect_server.prefect_server(folder, lines.append):
            pass
    assert lines == [] and not list(home.glob("*.damaged-*"))


@pytest.mark.parametrize("damage", ["cut", "zeroed", "text", "half zeroed"])
def test_a_damaged_database_is_moved_aside_with_its_log_and_said_so(
    home: Path, damage: str
) -> None:
    data = (home / DATABASE).read_bytes()
    damaged = {
        "cut": data[: len(data) // 2],
        "zeroed": bytes(len(data)),
        "text": b"no database at all" * 100,
        "half zeroed": data[:8192] + bytes(len(data) - 8192),
    }[damage]
    (home / DATABASE).write_bytes(damaged)
    (home / f"{DATABASE}-wal").write_bytes(b"log")
    lines: list[str] = []
    with prefect_server.prefect_server(home, lines.append) as url:
        assert url and not (home / DATABASE).exists()
    (line,) = lines
    assert str(home / DATABASE) in line and "a new one begins" in line and "\n" not in line
    moved = sorted(path for path in home.glob(f"{DATABASE}.damaged-*"))
    assert [path.read_bytes() for path in moved if not path.name.endswith("-wal")] == [damaged]
    assert not (home / f"{DATABASE}-wal").exists()
    (home / DATABASE).write_bytes(damaged)
    with (
        pytest.raises(UnclipError, match="which holds the schedules, cannot be read") as caught,
        lasting_server(home, free_ports(1)[0]),
    ):
        pass
    assert "\n" not in str(caught.value)


def test_a_damaged_database_is_not_moved_under_a_run_that_uses_it(home: Path) -> None:
    (home / DATABASE).write_bytes(bytes(9000))
    lines: list[str] = []

    def run() -> None:
        with prefect_server.prefect_server(home, lines.append):
            pass

    with (home / IN_USE).open("a") as in_use:
        fcntl.flock(in_use, fcntl.LOCK_SH)
        second = threading.Thread(target=run)
        second.start()
        while not lines:
            time.sleep(0.01)
        assert "waiting until it has finished" in lines[0] and (home / DATABASE).exists()
    second.join()
    assert len(lines) == 2 and not (home / DATABASE).exists()


def test_a_server_that_starts_with_no_database_is_an_error(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    @contextmanager
    def start(home: Path, port: int, token: str) -> Iterator[str]:
        raise ServerStartError("it stopped")
        yield ""

    monkeypatch.setattr(prefect_server, "_private_server", start)
    lines: list[str] = []
    for _ in range(2):  # the second time there is no database to blame
        with (
            pytest.raises(ServerStartError),
            prefect_server.prefect_server(home, lines.append),
        ):
            pass
    assert len(lines) == 1 and "does not start with it" in lines[0]


def test_a_missing_or_locked_database_is_no_damage(tmp_path: Path) -> None:
    assert _database_fault(tmp_path / DATABASE) == ""
    write_database(tmp_path / DATABASE)
    with closing(sqlite3.connect(tmp_path / DATABASE)) as writer:
        writer.execute("PRAGMA locking_mode = EXCLUSIVE")
        writer.execute("BEGIN EXCLUSIVE")
        assert _database_fault(tmp_path / DATABASE) == ""


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_run_goes_on_though_its_database_is_not_one_of_this_prefect(tmp_path: Path) -> None:
    home = tmp_path / "home"
    home.mkdir()
    write_database(home / DATABASE)
    done = subprocess.run(
        [sys.executable, "-c", PRIVATE, str(home)],
        cwd=tmp_path,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads(done.stdout.splitlines()[-1])["flows"] == ["ours"]
    assert "Prefect's server does not start with it" in done.stderr
    (moved,) = home.glob(f"{DATABASE}.damaged-*[0-9]")
    with closing(sqlite3.connect(moved)) as opened:
        assert opened.execute("SELECT count(*) FROM rows").fetchone() == (200,)
