"""Ray starts when it is first needed, once, and what was started goes again, also after a
SIGKILL.
"""

import json
import os
import secrets
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from infra.compute import cluster
from infra.compute.cluster import Cluster, ClusterConfig, spread
from infra.compute.orphan_reaper import marked
from infra.errors import UnclipError
from infra.storage.locks import _holder, turn_lock

HERE = Path(__file__).parents[3]
SMALL = ClusterConfig(num_cpus=2, object_store_memory_bytes=100 << 20)
USE = """
import os, signal, sys
from infra.compute.cluster import Cluster, ClusterConfig
with Cluster(ClusterConfig(num_cpus=2, object_store_memory_bytes=100 << 20)) as cluster:
    assert "ray" not in sys.modules
    cluster.start()
    cluster.start()
    if sys.argv[1:]:  # while Ray's agents and workers still look for each other
        os.kill(os.getpid(), signal.SIGKILL)
    import ray
    @ray.remote
    def work():
        print("from a worker")
        return 41
    assert ray.get(work.remote()) == 41 and ray.cluster_resources()["CPU"] == 2
assert not ray.is_initialized()
"""


def end_within(mark: bytes, limit_s: float) -> bool:
    """Wait for the processes with a mark in their environment; return whether all have ended."""
    limit = time.monotonic() + limit_s
    while marked(mark) and time.monotonic() < limit:
        time.sleep(0.2)
    return not marked(mark)


@pytest.mark.slow
@pytest.mark.parametrize("killed", [False, True])
def test_ray_is_quiet_and_leaves_with_its_run(killed: bool) -> None:
    mark = f"OUR_RAY={secrets.token_hex(8)}"
    done = subprocess.run(
        [sys.executable, "-c", USE, *["kill"] * killed],
        cwd=HERE,
        env=os.environ | dict([mark.split("=")]),
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == (-9 if killed else 0), done.stderr
    assert done.stdout == "" and "from a worker" not in done.stderr
    assert end_within(mark.encode(), 20)  # Ray's agents alone would stay for a minute


@pytest.mark.slow
@pytest.mark.timeout(200)
def test_runs_that_start_together_start_ray_one_after_the_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    file = cluster.turn_file()
    assert file and file.parent == tmp_path / ".cache" / "unclip"
    with turn_lock(file, "Ray", print):
        second = subprocess.Popen(
            [sys.executable, "-c", USE], cwd=HERE, stderr=subprocess.PIPE, text=True
        )
        assert second.stderr
        assert second.stderr.readline() == (
            f"Ray is being started by {_holder(file)}: waiting until it has finished\n"
        )
        assert second.poll() is None
    assert second.wait(timeout=120) == 0, second.stderr.read()
    second.stderr.close()


def test_a_home_that_cannot_be_written_has_no_turns(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("HOME", str(tmp_path / "file"))
    assert cluster.turn_file() is None


def test_a_cluster_that_is_never_needed_never_imports_ray() -> None:
    code = "import sys\nfrom infra.compute.cluster import *\nwith Cluster(ClusterConfig()): pass\nprint('ray' in sys.modules)"  # noqa: E501
    assert (
        subprocess.run(
            [sys.executable, "-c", code], cwd=HERE, capture_output=True, text=True
        ).stdout
        == "False\n"
    )


@pytest.mark.timeout(100)
def test_a_cluster_that_does_not_answer_is_one_line_and_soon() -> None:
    with pytest.raises(
        UnclipError, match=r"cannot reach Ray at 127\.0\.0\.1:1: .*check the section \[cluster\]"
    ) as caught:
        Cluster(SMALL.model_copy(update={"address": "127.0.0.1:1"})).start()
    assert "\n" not in str(caught.value)


def test_nothing_in_the_section_changes_what_a_stage_makes() -> None:
    assert SMALL.keyed() == {}


@pytest.mark.parametrize(("at_once", "most"), [(None, 7), (1, 1), (3, 3)])
def test_no_more_tasks_are_begun_than_may_run_at_once(
    at_once: int | None, most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    import ray

    in_flight: set[int] = set()
    peaks: list[int] = []

    class Task:
        def remote(self, number: int) -> int:
            in_flight.add(number)
            peaks.append(len(in_flight))
            return number

    def wait(waiting: list[int], num_returns: int, timeout: float) -> tuple[list[int], list[int]]:
        in_flight.discard(waiting[-1])
        return waiting[-1:], waiting[:-1]

    monkeypatch.setattr(ray, "remote", lambda **_: lambda _: Task())
    monkeypatch.setattr(ray, "wait", wait)
    monkeypatch.setattr(ray, "get", lambda ready: [number * 10 for number in ready])
    made = [
        each
        for some in spread(
            ClusterConfig(), abs, ((number,) for number in range(7)), at_once=at_once
        )
        for each in some
    ]
    assert sorted(made) == [number * 10 for number in range(7)] and max(peaks) == most


LISTENING = """
import json, os, time
from pathlib import Path
from infra.compute.cluster import Cluster, ClusterConfig

with Cluster(ClusterConfig(num_cpus=1)) as cluster:
    cluster.start()
    import ray
    ray.get(ray.remote(lambda: 1).remote())
    addresses, limit = set(), time.monotonic() + 8
    while time.monotonic() < limit:  # Ray's agents come up one by one
        listening = {}
        for name in ("tcp", "tcp6"):
            for line in Path(f"/proc/net/{name}").read_text().splitlines()[1:]:
                columns = line.split()
                if columns[3] == "0A":
                    listening[f"socket:[{columns[9]}]"] = columns[1].partition(":")[0]
        for process in Path("/proc").glob("[0-9]*"):
            try:
                if process.name == str(os.getpid()) or b"OUR_RAY=1" in (process / "environ").read_bytes():
                    addresses |= {listening.get(os.readlink(each), "") for each in (process / "fd").iterdir()}
            except OSError:
                continue
        time.sleep(0.5)
    print(json.dumps([sorted(addresses - {""}), os.environ["RAY_AUTH_MODE"], "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER" in os.environ]))
"""  # noqa: E501


@pytest.mark.slow
@pytest.mark.timeout(200)
def test_a_ray_of_this_machine_listens_on_loopback_alone_and_asks_for_a_token() -> None:
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    environment = inherited | {"OUR_RAY": "1", "RAY_USAGE_STATS_ENABLED": "0"}
    done = subprocess.run(
        [sys.executable, "-c", LISTENING],
        cwd=HERE,
        env=environment,
        capture_output=True,
        text=True,
        timeout=180,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    addresses, mode, is_left_behind = json.loads(done.stdout.splitlines()[-1])
    loopback = {"0100007F", "0000000000000000FFFF00000100007F", "00000000000000000000000001000000"}
    assert addresses and set(addresses) <= loopback, addresses
    assert (mode, is_left_behind) == ("token", False)


def test_a_ray_that_was_too_slow_to_start_is_started_again(monkeypatch: pytest.MonkeyPatch) -> None:
    import ray

    calls: list[str] = []

    def init(**_: object) -> None:
        calls.append("init")
        if len(calls) < 4:
            raise Exception("The current node timed out during startup. This could happen because")

    monkeypatch.setattr(ray, "init", init)
    monkeypatch.setattr(ray, "shutdown", lambda: calls.append("shutdown"))
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    with Cluster(ClusterConfig(num_cpus=1)) as starting:
        starting.start()
        assert calls == ["init", "shutdown", "init", "shutdown", "init"]


def test_a_temporary_folder_with_a_long_path_is_not_used_for_sockets(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delenv("RAY_TMPDIR", raising=False)
    session = "/ray/session_2026-11-29_12-34-02_154548_4194304/sockets/plasma_store"
    for length, expected in ((36, None), (80, cluster.SHORT_FOLDER)):
        monkeypatch.setattr(tempfile, "tempdir", "/" + "x" * (length - 1))
        assert cluster.short_folder() == expected
        assert (
            len(
                (expected or tempfile.gettempdir())
                + session.removeprefix("/ray" if expected else "")
            )
            <= 107
        )
    monkeypatch.setenv("RAY_TMPDIR", "/short")
    assert cluster.short_folder() is None
