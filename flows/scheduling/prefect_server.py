"""Start Prefect servers on loopback: a temporary one for a run, or a lasting one with a web page.

If `PREFECT_API_URL` is set, a run uses that server with the user's settings, and none is started.
Otherwise no `PREFECT_*` variable of the user reaches our server or its clients. Prefect's own
ephemeral server outlives a killed run and writes to the user's home; ours keeps its state under
ROOT and is killed by the kernel when its parent dies. That state is only for display: where it
cannot be read, a run begins a new one. Clients need the server's token, which is
passed in environments and, for a lasting server, stored in a file that only its user can read.
"""

import ctypes
import fcntl
import os
import secrets
import shutil
import signal
import socket
import sqlite3
import stat
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, closing, contextmanager, suppress
from importlib.metadata import version
from pathlib import Path
from urllib.parse import quote

from flows.scheduling.prefect_app import HOSTS
from infra.environment import changed_environment
from infra.errors import CallerError, UnclipError
from infra.storage.locks import is_being_read, unread_lock
from infra.storage.store import one_line_errors

START_LIMIT_S = 120
CODE = Path(__file__).parents[2]
DATABASE = "prefect.db"
IN_USE = "prefect.db.reading"
"""Lock file that all servers of runs share that use a database."""
TOKEN_FILE = "password"
"""File with a lasting server's token, `user:password`.

Its page asks for it, and commands need it as `PREFECT_API_AUTH_STRING`.
"""
LOOPBACK = ("127.0.0.1", "localhost", "::1")
EMPTY_DATABASE = "~/.cache/unclip/prefect-{}.db"
"""Cached empty database of a Prefect version ({}); migrating a new one takes 4 s, a copy none."""
PR_SET_PDEATHSIG = 1
QUIET = {
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    "DO_NOT_TRACK": "1",
    "PREFECT_LOGGING_COLORS": "false",
    "PREFECT_CLI_COLORS": "false",
    # In `quiet_terminal` stdout is the log; Prefect's handlers would write to the terminal.
    "PREFECT_LOGGING_HANDLERS_CONSOLE_STREAM": "ext://sys.stdout",
    "PREFECT_LOGGING_HANDLERS_DEBUG_STREAM": "ext://sys.stdout",
}


class ServerStartError(UnclipError):
    """A server that ended while it started; its database may be of another version of Prefect."""


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


@contextmanager
def prefect_server(home: Path, say: Callable[[str], None] = _say) -> Iterator[str]:
    """Provide a Prefect API while the block runs; yield its URL. `home` holds Prefect's database.

    Sets environment variables that Prefect reads at import, so enter it before `import prefect`.
    Moves a database that cannot be used aside, and reports it through `say`. Raises UnclipError if
    the server does not start.
    """
    os.environ.update(QUIET)
    url = os.environ.get("PREFECT_API_URL")
    if url:
        with changed_environment(loopback_without_proxy(os.environ)):
            yield url
        return
    home = home.resolve()
    home.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        if _database_fault(home / DATABASE):
            with one_line_errors(home), unread_lock(home / IN_USE, str(home / DATABASE), say):
                fault = _database_fault(home / DATABASE)  # another run may have mended it
                if fault:
                    _move_aside(home, fault, say)
        is_old = (home / DATABASE).exists()
        # The same for a second try: Prefect reads them when it is imported, in the first.
        port, token = _free_port(), _new_token()
        try:
            url = stack.enter_context(_private_server(home, port, token))
        except ServerStartError:
            if not is_old or is_being_read(home / IN_USE):
                raise
            _move_aside(home, "Prefect's server does not start with it", say)
            url = stack.enter_context(_private_server(home, port, token))
        yield url


@contextmanager
def _private_server(home: Path, port: int, token: str) -> Iterator[str]:
    """Run a server for one run, and note for others that its database is in use."""
    short_lived = {
        "PREFECT_UI_ENABLED": "0",
        "PREFECT__SERVER_EPHEMERAL": "1",
        "PREFECT__SERVER_FINAL": "1",
    }
    with (home / IN_USE).open("a") as in_use:
        fcntl.flock(in_use, fcntl.LOCK_SH)  # writes nothing, so that a full disk does not matter
        with _server(home, port, token, short_lived) as url:
            yield url


@contextmanager
def lasting_server(home: Path, port: int) -> Iterator[str]:
    """Run a complete Prefect server (scheduler, automations, page) while the block runs.

    Yields the URL of its API, on `port` of loopback. Its token is in `home`/TOKEN_FILE and stays
    the same as long as that file exists. Raises CallerError if the port is in use, and UnclipError
    if the server does not start or its database, which holds the schedules, is damaged.
    """
    os.environ.update(QUIET)
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            raise CallerError(f"--port {port} is taken on this machine: choose another") from None
    home.mkdir(parents=True, exist_ok=True)
    fault = _database_fault(home / DATABASE)
    if fault:
        raise UnclipError(
            f"{home / DATABASE}, which holds the schedules, cannot be read ({fault}): restore it, "
            "or move it away and schedule the recipes again"
        )
    with _server(home, port, _lasting_token(home / TOKEN_FILE), {}) as url:
        yield url


@contextmanager
def _server(home: Path, port: int, token: str, more: dict[str, str]) -> Iterator[str]:
    """Run a server with the additional variables `more`, and point this process's Prefect at it."""
    home = home.resolve()
    home.mkdir(parents=True, exist_ok=True)
    is_new = _copy_database(home)
    url = f"http://127.0.0.1:{port}/api"
    shared = QUIET | loopback_without_proxy(os.environ)
    shared |= {"PREFECT_HOME": str(home), "PREFECT_PROFILES_PATH": str(home / "profiles.toml")}
    inherited = {
        name: value for name, value in os.environ.items() if not name.startswith("PREFECT_")
    }
    ours = {
        "PREFECT_SERVER_API_AUTH_STRING": token,
        "PREFECT_UI_API_URL": url,
        # Relative to `home`, the server's working directory, whose name may hold a `?`.
        "PREFECT_SERVER_DATABASE_CONNECTION_URL": f"sqlite+aiosqlite:///{DATABASE}",
        HOSTS: f"127.0.0.1:{port},localhost:{port}",
    }
    server = _start_uvicorn(home, port, inherited | shared | ours | more)
    try:
        with changed_environment(
            shared | {"PREFECT_API_URL": url, "PREFECT_API_AUTH_STRING": token}, without="PREFECT_"
        ):
            # Imported while the server starts, because both take seconds.
            import prefect.flows  # noqa: F401

            _wait_until_healthy(server, url)
            if is_new:
                _keep_database(home)
            yield url
    finally:
        server.terminate()
        try:
            server.wait(timeout=20)  # it still writes the last events
        except subprocess.TimeoutExpired:
            server.kill()
            server.wait()


def _start_uvicorn(
    home: Path, port: int, environment: Mapping[str, str]
) -> "subprocess.Popen[bytes]":
    """Start the server process in `home`; the kernel kills it when this process dies."""
    app = ["flows.scheduling.prefect_app:create_app", "--app-dir", str(CODE)]
    address = ["--host", "127.0.0.1", "--port", str(port)]
    behaviour = ["--log-level", "error", "--lifespan", "on"]
    return subprocess.Popen(
        [sys.executable, "-m", "uvicorn", "--factory", *app, *address, *behaviour],
        env=environment,
        cwd=home,  # Prefect also reads settings from files of the working directory
        stdin=subprocess.DEVNULL,
        stdout=1,  # the log while `quiet_terminal` is open
        stderr=2,
        # Ctrl-C must not stop the server: without it Prefect retries for a minute before it ends.
        start_new_session=True,
        preexec_fn=die_with_parent,
    )


def loopback_without_proxy(environment: Mapping[str, str]) -> dict[str, str]:
    """Return the variables that exclude loopback addresses from the environment's proxy."""
    listed = environment.get("no_proxy") or environment.get("NO_PROXY") or ""
    hosts = [host.strip() for host in listed.split(",") if host.strip()]
    every = ",".join(hosts + [host for host in LOOPBACK if host not in hosts and "*" not in hosts])
    return {"no_proxy": every, "NO_PROXY": every}


def _new_token() -> str:
    return f"unclip:{secrets.token_urlsafe(32)}"


def _lasting_token(file: Path) -> str:
    """Return the token stored in `file`, which only this user can read.

    Creates a new token if there is none, or if other users could have read it.
    """
    with suppress(FileNotFoundError):
        about = file.lstat()
        if (
            stat.S_ISREG(about.st_mode)
            and about.st_uid == os.getuid()
            and not about.st_mode & 0o077
        ):
            token = file.read_text().strip()
            if token.startswith("unclip:"):
                return token
    token = _new_token()
    part = file.with_name(f"{file.name}.{os.getpid()}")
    part.unlink(missing_ok=True)
    part.touch(mode=0o600, exist_ok=False)
    part.write_text(f"{token}\n")
    part.replace(file)
    return token


def _copy_database(home: Path) -> bool:
    """Copy the cached empty database into a new home; return whether Prefect must create it."""
    template = Path(EMPTY_DATABASE.format(version("prefect"))).expanduser()
    if (home / DATABASE).exists():
        return False
    if template.is_file() and not _database_fault(template):
        part = home / f"{DATABASE}.part"
        shutil.copyfile(template, part)
        part.replace(home / DATABASE)
        return False
    return True


def _database_fault(database: Path) -> str:
    """Return in one line what is wrong with a SQLite database, or "".

    A missing file is in order. So is one that cannot be opened or is locked: the server will say.
    """
    if not database.is_file():
        return ""
    address = f"file:{quote(str(database))}?mode=rw"
    try:
        with closing(sqlite3.connect(address, timeout=0, uri=True)) as opened:
            faults = [str(row[0]) for row in opened.execute("PRAGMA quick_check(1)")]
    except sqlite3.DatabaseError as error:
        code = getattr(error, "sqlite_errorcode", 0) & 0xFF
        return str(error) if code in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB) else ""
    return "" if faults == ["ok"] else " ".join(" ".join(faults).split())[:100]


def _move_aside(home: Path, fault: str, say: Callable[[str], None]) -> None:
    """Rename a home's database, with the files that belong to it, and report it."""
    name = f"{DATABASE}.damaged-{time.strftime('%Y%m%d-%H%M%S')}"
    for suffix in ("", "-wal", "-shm", "-journal"):
        with suppress(FileNotFoundError):
            (home / f"{DATABASE}{suffix}").rename(home / f"{name}{suffix}")
    say(
        f"unclip: Prefect's database {home / DATABASE} cannot be used ({fault}): it is now {name}, "
        "and a new one begins; no run needs its history"
    )


def _keep_database(home: Path) -> None:
    """Cache the database that Prefect has just created, while it is empty, for later homes."""
    template = Path(EMPTY_DATABASE.format(version("prefect"))).expanduser()
    with suppress(OSError):  # the user's home is read-only: then every new ROOT takes 4 s
        template.parent.mkdir(parents=True, exist_ok=True)
        part = template.with_name(f"{template.name}.{os.getpid()}")
        with (
            closing(sqlite3.connect(home / DATABASE)) as source,
            closing(sqlite3.connect(part)) as copy,
        ):
            source.backup(copy)
        part.replace(template)


def die_with_parent() -> None:
    """Make the kernel kill this process when its parent dies; for `preexec_fn`."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _wait_until_healthy(server: "subprocess.Popen[bytes]", url: str) -> None:
    limit = time.monotonic() + START_LIMIT_S
    # Ignores the proxy that the environment names.
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    while time.monotonic() < limit:
        if server.poll() is not None:
            raise ServerStartError(
                f"Prefect's server stopped with exit code {server.returncode} while starting: "
                "see the run's log under ROOT/logs"
            )
        try:
            with opener.open(f"{url}/health", timeout=2) as answer:
                if answer.status == 200:
                    return
        except (urllib.error.URLError, OSError):
            time.sleep(0.1)
    raise UnclipError(
        f"Prefect's server did not answer within {START_LIMIT_S} s: "
        "see the run's log under ROOT/logs"
    )
