"""Prefect servers on loopback: one for a run, gone with it, or a lasting one with page and scheduler; their state under ROOT.

Where `PREFECT_API_URL` is set a run uses that server, with what else is set for it, and nothing is started. Otherwise no `PREFECT_*`
variable of the user reaches our server or its clients. Prefect's own ephemeral server would outlive a run that is killed and write to
the user's home; ours gets a signal from the kernel when its parent dies. Who may ask ours must have its token; it travels in
environments and, for a lasting server, lies in a file that only its user can read.
"""

import ctypes
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
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager, suppress
from importlib.metadata import version
from pathlib import Path

from flows.scheduling.prefect_app import HOSTS
from infra.errors import CallerError, UnclipError

START_LIMIT_S = 120
CODE = Path(__file__).parent.parent
DATABASE = "prefect.db"
TOKEN_FILE = "password"
"""Holds a lasting server's token as `user:password`: what its page asks for, and `PREFECT_API_AUTH_STRING` for commands."""
LOOPBACK = ("127.0.0.1", "localhost", "::1")
EMPTY_DATABASE = "~/.cache/unclip/prefect-{}.db"
"""Prefect's tables without a row of ours: to make them step by step takes 4 s, to copy them none. {} is Prefect's version."""
PR_SET_PDEATHSIG = 1
QUIET = {
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    "DO_NOT_TRACK": "1",
    "PREFECT_LOGGING_COLORS": "false",
    "PREFECT_CLI_COLORS": "false",
    # While the terminal is kept quiet, stdout is the log; Prefect's console handlers would otherwise find the terminal.
    "PREFECT_LOGGING_HANDLERS_CONSOLE_STREAM": "ext://sys.stdout",
    "PREFECT_LOGGING_HANDLERS_DEBUG_STREAM": "ext://sys.stdout",
}


@contextmanager
def prefect_server(home: Path) -> Iterator[str]:
    """Give this process a Prefect API while the block runs and return its URL; `home` keeps Prefect's database.

    Sets environment variables that Prefect reads at import, so enter it before `import prefect`.
    Raises UnclipError if it does not start.
    """
    os.environ.update(QUIET)
    url = os.environ.get("PREFECT_API_URL")
    if url:
        with _environment(loopback_without_proxy(os.environ)):
            yield url
        return
    short_lived = {
        "PREFECT_UI_ENABLED": "0",
        "PREFECT__SERVER_EPHEMERAL": "1",
        "PREFECT__SERVER_FINAL": "1",
    }
    with _server(home, _free_port(), _new_token(), short_lived) as url:
        yield url


@contextmanager
def lasting_server(home: Path, port: int) -> Iterator[str]:
    """Run a whole Prefect server (scheduler, automations, page) on a port of loopback while the block runs; returns its API's URL.

    Its token is in `home`/TOKEN_FILE, the same as long as the file is there.
    Raises CallerError where the port is taken, UnclipError if it does not start.
    """
    os.environ.update(QUIET)
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            raise CallerError(f"--port {port} is taken on this machine: choose another") from None
    home.mkdir(parents=True, exist_ok=True)
    with _server(home, port, _lasting_token(home / TOKEN_FILE), {}) as url:
        yield url


@contextmanager
def _server(home: Path, port: int, token: str, more: dict[str, str]) -> Iterator[str]:
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
        HOSTS: f"127.0.0.1:{port},localhost:{port}",
    }
    command = [
        sys.executable,
        "-m",
        "uvicorn",
        "--factory",
        "flows.scheduling.prefect_app:create_app",
        "--app-dir",
        str(CODE),
    ]
    server = subprocess.Popen(
        [
            *command,
            "--host",
            "127.0.0.1",
            "--port",
            str(port),
            "--log-level",
            "error",
            "--lifespan",
            "on",
        ],
        env=inherited | shared | ours | more,
        cwd=home,  # Prefect reads settings from files of the working directory, too
        stdin=subprocess.DEVNULL,
        stdout=1,  # the log while `quiet_terminal` is open
        stderr=2,
        start_new_session=True,  # a Ctrl-C is for us: without its server Prefect would retry for a minute instead of ending
        preexec_fn=die_with_parent,
    )
    try:
        with _environment(
            shared | {"PREFECT_API_URL": url, "PREFECT_API_AUTH_STRING": token}, without="PREFECT_"
        ):
            import prefect.flows  # noqa: F401  (takes seconds, as the server's start does: both at once)

            _wait_until_healthy(server, url)
            if is_new:
                _keep_database(home)
            yield url
    finally:
        server.terminate()
        try:
            server.wait(timeout=20)  # it writes down what it has heard last
        except subprocess.TimeoutExpired:
            server.kill()
            server.wait()


@contextmanager
def _environment(variables: Mapping[str, str], without: str | None = None) -> Iterator[None]:
    """Set variables of this process while the block runs, and take away the others that begin with `without`."""
    hidden = {
        name for name in os.environ if without and name.startswith(without)
    } - variables.keys()
    before = {name: os.environ.get(name) for name in hidden | variables.keys()}
    try:
        for name in hidden:
            del os.environ[name]
        os.environ.update(variables)
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def loopback_without_proxy(environment: Mapping[str, str]) -> dict[str, str]:
    """Return the variables that keep requests to this machine away from a proxy that the environment names."""
    listed = environment.get("no_proxy") or environment.get("NO_PROXY") or ""
    hosts = [host.strip() for host in listed.split(",") if host.strip()]
    every = ",".join(hosts + [host for host in LOOPBACK if host not in hosts and "*" not in hosts])
    return {"no_proxy": every, "NO_PROXY": every}


def _new_token() -> str:
    return f"unclip:{secrets.token_urlsafe(32)}"


def _lasting_token(file: Path) -> str:
    """Return the token in a file that only this user can read; make it where there is none, or where others could have read it."""
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
    """Give a new home the empty database that an earlier one has left, if there is one; say whether Prefect has to make it."""
    kept = Path(EMPTY_DATABASE.format(version("prefect"))).expanduser()
    if (home / DATABASE).exists():
        return False
    if kept.is_file():
        aside = home / f"{DATABASE}.part"
        shutil.copyfile(kept, aside)
        aside.replace(home / DATABASE)
        return False
    return True


def _keep_database(home: Path) -> None:
    """Keep the database that Prefect has just made, before it holds anything, for the homes to come."""
    kept = Path(EMPTY_DATABASE.format(version("prefect"))).expanduser()
    with suppress(OSError):  # a read-only home of the user: then every new ROOT takes its 4 s
        kept.parent.mkdir(parents=True, exist_ok=True)
        aside = kept.with_name(f"{kept.name}.{os.getpid()}")
        with (
            closing(sqlite3.connect(home / DATABASE)) as made,
            closing(sqlite3.connect(aside)) as copy,
        ):
            made.backup(copy)
        aside.replace(kept)


def die_with_parent() -> None:
    """Have the kernel end this process when the one that started it ends; for `preexec_fn`."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _wait_until_healthy(server: "subprocess.Popen[bytes]", url: str) -> None:
    limit = time.monotonic() + START_LIMIT_S
    opener = urllib.request.build_opener(
        urllib.request.ProxyHandler({})
    )  # whatever proxy the environment names
    while time.monotonic() < limit:
        if server.poll() is not None:
            raise UnclipError(
                f"Prefect's server stopped with exit code {server.returncode} while starting: see the run's log under ROOT/logs"
            )
        try:
            with opener.open(f"{url}/health", timeout=2) as answer:
                if answer.status == 200:
                    return
        except (urllib.error.URLError, OSError):
            time.sleep(0.1)
    raise UnclipError(
        f"Prefect's server did not answer within {START_LIMIT_S} s: see the run's log under ROOT/logs"
    )
