"""The Ray cluster of a run: started or joined when a stage first needs it, left when the run ends.

A run whose stages are all current never starts Ray. Stops only what it started. Knows nothing of
stages; callers submit their work through `ray` after `Cluster.start()`.
"""

import logging
import os
import secrets
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from itertools import islice
from pathlib import Path
from types import TracebackType
from typing import Any, ClassVar, Self, TypeVar

from pydantic import Field

from infra.compute import orphan_reaper
from infra.environment import changed_environment
from infra.errors import UnclipError
from infra.settings import Section
from infra.storage.locks import turn_lock

KNOCK_LIMIT_S = 10
SPIN_COUNT = "300000"
"""GOMP_SPINCOUNT, read when torch loads OpenMP: threads wait for each other by spinning for about a
millisecond, then sleep. Sleeping at once (OMP_WAIT_POLICY=passive) made training a third slower;
spinning for ever (active) made it five times slower if another process used the core too."""


START_ATTEMPTS = 4
TOO_SLOW = "timed out during startup"
"""Part of Ray's message when its node was not up in 30 s, as on a busy machine."""
SOCKET_BYTES, SESSION_BYTES = 107, 70
"""Longest path of a Unix socket (unix(7)), and what Ray appends to the temporary folder for one."""
SOCKET_TOO_LONG = "AF_UNIX path length"
SHORT_FOLDER = "/tmp/ray"
"""Ray's own place where no TMPDIR is set."""
LOOPBACK_ALONE = "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"
"""Read when Ray is imported and when its processes start: with 0 a Ray of one machine listens on
loopback only. Clients also need Ray's token, unless RAY_AUTH_MODE turns it off."""


MARK = "UNCLIP_RAY"
"""Environment variable of a local Ray's processes, by which `orphan_reaper` finds them. With
SPT_NOENV, Ray's workers do not write their titles over their environment."""


class StageResources(Section):
    """Resources that a submitted stage's driver process requests; its workers request their own."""

    cpus: float = Field(default=1, ge=0)
    """CPU cores."""
    gpus: float = Field(default=0, ge=0)
    """GPUs."""
    memory_bytes: int = Field(default=0, ge=0)
    """Memory in bytes; 0 requests none."""
    labels: dict[str, str] = Field(default_factory=dict)
    """Labels that the node must have, in Ray's form: `{"market-type" = "!spot"}` keeps a stage off
    nodes that may be taken away."""


class ClusterConfig(Section):
    """Where the work runs and with how many workers; nothing here changes what a stage makes."""

    address: str = ""
    """Ray address (`auto`, `ray://host:10001` or `host:6379`); empty starts a small Ray on this
    machine for the run."""
    num_cpus: int | None = Field(default=None, ge=1)
    """CPU cores for the local Ray; by default all cores that this process may use."""
    ingest_workers: int = Field(default=0, ge=0, le=1024)
    """Shards that are downloaded at the same time, each by a Ray task with one CPU core on any
    node; 0 takes `[data] processes`."""
    clip_workers: int = Field(default=1, ge=1)
    """Processes that train CLIP data-parallel."""
    embed_workers: int | None = Field(default=None, ge=1)
    """Processes that embed at the same time; by default as many as the cluster has room for."""
    prior_workers: int = Field(default=1, ge=1)
    """Processes that train the prior."""
    decoder_workers: int = Field(default=1, ge=1)
    """Processes that train the decoder."""
    upsampler_workers: int = Field(default=1, ge=1)
    """Processes that train an up-sampler."""
    cpus_per_worker: float = Field(default=1, gt=0)
    """CPU cores that Ray reserves for each worker; a worker uses as many torch threads, rounded
    down, but at least one."""
    use_gpu: bool = False
    """Give each worker one GPU."""
    object_store_memory_bytes: int = Field(default=200 << 20, ge=80 << 20)
    """Shared memory of the local Ray's object store; the stages pass files, so little is needed."""
    max_failures: int = Field(default=2, ge=0)
    """Restarts of a training group from its last checkpoint before the stage fails (Ray's default
    is 0)."""
    collective_timeout_s: int = Field(default=1800, ge=1)
    """Seconds that a worker waits for the others of its group: for the slowest to read its data,
    for the first to write the state. A worker that ended is noticed at once."""
    stages: dict[str, StageResources] = Field(default_factory=dict)
    """Under `unclip submit`: resources of a stage's driver process, such as `{ curate = { cpus = 4
    } }`: cpus, gpus, memory_bytes, labels. By default downloads and training request none, and an
    ingest that serves local images requests the cores of its download tasks."""
    attempts: int = Field(default=3, ge=1, le=100)
    """Under `unclip submit`: attempts of a stage's job; raise it on nodes that may be taken
    away."""
    upload_code: bool = True
    """Under `unclip submit`: send this checkout with each job; set it to false if the cluster's
    image has the code. Packages come from the image."""
    python: str = "python"
    """Under `unclip submit`: the interpreter on the cluster."""

    outside_key: ClassVar[frozenset[str]] = frozenset(
        {
            *(
                "address",
                "num_cpus",
                "cpus_per_worker",
                "use_gpu",
                "object_store_memory_bytes",
                "max_failures",
                "collective_timeout_s",
            ),
            *("stages", "attempts", "upload_code", "python"),
            *(
                "ingest_workers",
                "clip_workers",
                "embed_workers",
                "prior_workers",
                "decoder_workers",
                "upsampler_workers",
            ),
        }
    )


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


class Cluster:
    """Ray for one run.

    `start()` does nothing if Ray runs already. Leaving the block stops only a Ray that it started.
    """

    def __init__(self, config: ClusterConfig, say: Callable[[str], None] = _say) -> None:
        self.config, self.say = config, say
        self.is_ours = False
        self._reaper: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.stop()

    def start(self) -> None:
        """Start Ray on this machine, or join the cluster at `[cluster] address`.

        Waits, and reports it, while another run of this user starts its Ray here: two that start at
        the same time disturb each other. Raises UnclipError if it fails.
        """
        # Ray, gRPC and OpenMP read these when they are loaded, so they are set before the import of
        # ray; a local Ray's workers inherit them.
        for name, value in {
            "RAY_USAGE_STATS_ENABLED": "0",
            "GRPC_VERBOSITY": "NONE",
            "RAY_BACKEND_LOG_LEVEL": "error",
            "GOMP_SPINCOUNT": SPIN_COUNT,
            # Ray Train checks its workers at this interval and notices their end this late (its
            # default: 2).
            "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",
            "RAY_TRAIN_METRICS_ENABLED": "0",
            # A process that watches for nodes to be taken away: not needed, because a group that
            # lost a node resumes from our own state.
            "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
            # Serve kills a proxy that is not up in this time (its default: 5) and starts another;
            # on a busy machine that never ends.
            "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "60",
        }.items():
            os.environ.setdefault(name, value)
        is_local = not self.config.address
        mark = secrets.token_hex(16)
        # Only while Ray's processes start: this process may later join a cluster of several
        # machines.
        with changed_environment(
            {LOOPBACK_ALONE: "0", MARK: mark, "SPT_NOENV": "1"} if is_local else {}
        ):
            self._join(is_local, mark)

    def _join(self, is_local: bool, mark: str) -> None:
        import ray

        if ray.is_initialized():
            return
        try:
            _knock(self.config.address)
            turns = turn_file() if is_local else None
            with turn_lock(turns, "Ray", self.say) if turns else nullcontext():
                if is_local:
                    self._reaper = _start_reaper(mark)
                self._init(is_local)
        except Exception as error:
            where = (
                "start Ray on this machine" if is_local else f"reach Ray at {self.config.address}"
            )
            detail = " ".join(str(error).split())[:300]
            mend = "check the section [cluster] and RAY_AUTH_MODE"
            if SOCKET_TOO_LONG in detail:
                mend = "set RAY_TMPDIR to a folder with a shorter path"
            raise UnclipError(f"cannot {where}: {detail}; {mend}") from error
        self.is_ours = True

    def _init(self, is_local: bool) -> None:
        """Call `ray.init`; retry if a local Ray was not up in the 30 s that it allows itself."""
        import ray

        for attempt in range(1, START_ATTEMPTS + 1):
            try:
                ray.init(
                    address=self.config.address or "local",
                    num_cpus=(self.config.num_cpus or len(os.sched_getaffinity(0)))
                    if is_local
                    else None,
                    object_store_memory=self.config.object_store_memory_bytes if is_local else None,
                    include_dashboard=False if is_local else None,
                    log_to_driver=False,
                    logging_level=logging.ERROR,
                    _temp_dir=short_folder() if is_local else None,
                )
                return
            except Exception as error:
                if not is_local or attempt == START_ATTEMPTS or TOO_SLOW not in str(error):
                    raise
                ray.shutdown()

    def stop(self) -> None:
        """Leave the cluster and stop a Ray that `start()` started, with all its processes."""
        if self.is_ours:
            import ray

            ray.shutdown()
            self.is_ours = False
        if self._reaper:
            self._reaper.kill()
            self._reaper.wait()
            self._reaper = None


def _start_reaper(mark: str) -> "subprocess.Popen[bytes]":
    """Start the process that kills the local Ray's processes if this process is killed.

    It has a session of its own, so that Ctrl-C and a closed terminal do not end it.
    """
    return subprocess.Popen(
        [sys.executable, "-I", "-S", orphan_reaper.__file__, str(os.getpid()), f"{MARK}={mark}"],
        env={name: value for name, value in os.environ.items() if name != MARK},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )


def turn_file() -> Path | None:
    """Return the lock file of a user's runs that start Ray on this machine.

    Returns None where the user's home cannot be written, as in a container: nothing shares it.
    """
    folder = Path(os.path.expanduser("~"), ".cache", "unclip")  # noqa: PTH111
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        return None
    return folder / f"ray-{socket.gethostname()}.lock" if os.access(folder, os.W_OK) else None


def short_folder() -> str | None:
    """Return the folder for a local Ray's sockets where the environment's own has too long a path
    for them, else None.
    """
    folder = os.environ.get("RAY_TMPDIR") or tempfile.gettempdir()
    return SHORT_FOLDER if len(os.fsencode(folder)) > SOCKET_BYTES - SESSION_BYTES else None


Result = TypeVar("Result")


def spread(
    config: ClusterConfig,
    function: Callable[..., Result],
    arguments: Iterable[tuple[Any, ...]],
    gpus: int = 0,
    at_once: int | None = None,
) -> Iterator[list[Result]]:
    """Call `function` with each tuple of arguments as a task on the running Ray.

    Yields the results of finished tasks once a second, in the order in which they finish. At most
    `at_once` tasks run at the same time, by default as many as the cluster has room for. A task
    that is lost with its process or node is repeated up to three times, so it must write to a
    temporary path and rename. Raises an UnclipError of a task as that error.
    """
    import ray
    from ray.exceptions import RayTaskError

    task = ray.remote(num_cpus=config.cpus_per_worker, num_gpus=gpus, max_retries=3)(function)
    begun = (task.remote(*args) for args in arguments)
    waiting = list(islice(begun, at_once))
    try:
        while waiting:
            ready, waiting = ray.wait(waiting, num_returns=len(waiting), timeout=1)
            waiting += islice(begun, len(ready))
            yield ray.get(ready)
    except RayTaskError as error:
        if isinstance(error.cause, UnclipError):
            raise type(error.cause)(str(error.cause)) from error
        raise
    finally:
        for task_ref in waiting:
            ray.cancel(task_ref)


def _knock(address: str) -> None:
    """Raise OSError if nothing listens at `host:port`; Ray itself would try for minutes."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if host and port.isdigit():
        socket.create_connection((host, int(port)), timeout=KNOCK_LIMIT_S).close()
