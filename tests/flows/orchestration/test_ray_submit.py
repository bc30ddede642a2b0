"""Stages as jobs of a real Ray cluster: found again after the driver's death, tried again under a
fence, stopped with the driver.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from flows.orchestration import ray_job, ray_submit
from flows.runs.stage import key_of
from infra.compute import ray_jobs
from infra.compute.ray_jobs import Job, JobServer
from infra.errors import CallerError, StorageAwayError, UnclipError
from infra.storage import manifests, store
from tests.helpers.fake_stages import FAKES, FakeConfig, FakeSection
from tests.helpers.ray_cluster import HERE, RayCluster

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]
DRIVER = """
import signal
import sys
from pathlib import Path
from flows.orchestration import ray_submit
from tests.flows.orchestration import test_ray_submit
ray_submit.ENTRYPOINT = "tests.helpers.fake_job"
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell that runs the tests in the background has it ignored
test_ray_submit.drive(Path(sys.argv[1]), sys.argv[2], float(sys.argv[3]))
"""  # noqa: E501


@pytest.fixture(scope="module")
def cluster() -> Iterator[RayCluster]:
    with RayCluster() as running, running.joined():
        yield running


def drive(
    folder: Path, address: str, seconds: float, word: str = "a", stages: int = 1
) -> list[str]:
    """Submit the first fake stages; return what was shown."""
    shown: list[str] = []
    root = store.open_root(str(folder))
    config: Any = FakeConfig(data=FakeSection(word=word, seconds=seconds))
    config = config.model_copy(
        update={"cluster": config.cluster.model_copy(update={"upload_code": False, "attempts": 2})}
    )
    done: dict[str, Any] = {}
    for stage in FAKES[:stages]:
        result = ray_submit.submit_stage(
            stage,
            root,
            config,
            {name: done[name].committed for name in stage.needs},
            address,
            lambda line: shown.append(line),
        )
        done[stage.name] = result
        shown.append(f"{stage.name} {result.state}")
    return shown


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray_submit, "ENTRYPOINT", "tests.helpers.fake_job")


def driver(folder: Path, address: str, seconds: float) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [sys.executable, "-c", DRIVER, str(folder), address, str(seconds)],
        cwd=HERE,
        stderr=subprocess.PIPE,
        text=True,
    )


def jobs(cluster: RayCluster, folder: Path) -> dict[str, str]:
    """Return the states of the jobs that were submitted for a ROOT, by their ids."""
    from ray.job_submission import JobSubmissionClient

    found = JobSubmissionClient(cluster.address).list_jobs()
    return {
        str(each.submission_id): str(each.status.value)
        for each in found
        if str(folder) in each.entrypoint
    }


def until(condition: Callable[[], Any], limit_s: float = 240) -> Any:
    limit = time.monotonic() + limit_s
    while not (found := condition()):
        assert time.monotonic() < limit
        time.sleep(0.1)
    return found


def claim_of(folder: Path) -> dict[str, Any]:
    """Return the one claim that stands in a ROOT."""
    (file,) = (folder / "jobs").glob("*.json")
    claim: dict[str, Any] = json.loads(file.read_text())
    return claim | {"stage": file.stem.partition("-")[0], "key": file.stem.partition("-")[2]}


def test_stages_run_as_jobs_under_ids_of_their_keys_and_only_once(
    cluster: RayCluster, tmp_path: Path, quick: None
) -> None:
    shown = drive(tmp_path, cluster.address, 0, stages=2)
    assert shown[-2:] == ["data ran", "clip ran"]
    root = store.open_root(str(tmp_path))
    for stage in ("data", "clip"):
        made = manifests.newest(root, stage)
        assert made and manifests.verify(made) == []
        (submitted,) = [
            each
            for each in jobs(cluster, tmp_path)
            if each.startswith(f"unclip-{stage}-{made.key}-")
        ]
        assert submitted.endswith("-1")
    assert (
        drive(tmp_path, cluster.address, 0, stages=2) == ["data current", "clip current"]
        and len(jobs(cluster, tmp_path)) == 2
    )
    assert store.list_names(root, "jobs") == []  # no claim is left


def test_a_driver_that_was_killed_joins_its_job_again(
    cluster: RayCluster, tmp_path: Path, quick: None
) -> None:
    lost = driver(tmp_path, cluster.address, 12)
    until(lambda: "RUNNING" in jobs(cluster, tmp_path).values())
    lost.kill()
    lost.communicate()
    shown = drive(tmp_path, cluster.address, 12)
    assert shown[0].endswith("-1 runs already: joined") and shown[-1] == "data ran"
    assert [name[-2:] for name in jobs(cluster, tmp_path)] == ["-1"]


def test_a_killed_job_is_tried_again_and_the_late_writer_commits_nothing(
    cluster: RayCluster, tmp_path: Path, quick: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first attempt's process is killed; the second makes the stage; a writer of the first that
    comes late is refused.
    """
    running = driver(tmp_path, cluster.address, 6)
    until(lambda: "RUNNING" in jobs(cluster, tmp_path).values())
    (pid,) = until(
        lambda: [
            each
            for each in cluster.processes("tests.helpers.fake_job")
            if b"-m\0tests.helpers.fake_job\0" in argv(each)
        ][:1]
    )
    os.kill(pid, signal.SIGKILL)
    until(lambda: claim_of(tmp_path)["attempt"] == 2)
    claim = claim_of(tmp_path)
    monkeypatch.setattr(ray_job.stages, "STAGES", FAKES)
    monkeypatch.setattr(ray_job, "load", FakeConfig.model_validate)
    with pytest.raises(
        UnclipError, match=r"attempt 1 of data .* is fenced off, attempt 2 has taken over"
    ):
        ray_job.run(store.open_root(str(tmp_path)), claim["stage"], claim["key"], 1)
    assert running.wait(timeout=120) == 0, running.communicate()
    states = jobs(cluster, tmp_path)
    assert sorted((name.split("-")[1], name[-1], state) for name, state in states.items()) == [
        ("data", "1", "FAILED"),
        ("data", "2", "SUCCEEDED"),
    ]
    with pytest.raises(UnclipError, match="its claim has gone: nothing is committed"):
        ray_job.run(store.open_root(str(tmp_path)), claim["stage"], claim["key"], 1)


def test_a_driver_that_wakes_late_follows_the_attempt_that_has_been_claimed_meanwhile(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It slept while another driver saw attempts 1 and 2 fail and claimed the third; lowering the
    claim would fence off the live one.
    """
    root = store.open_root(str(tmp_path))
    submitted: list[int] = []
    config: Any = FakeConfig()
    name = ray_job.claim_name("data", key_of(FAKES[0], config, {}))

    def claim_of_another(server: JobServer, job: Job, number: int, show: Any) -> tuple[str, str]:
        if number == 1:
            store.write_json(root, name, store.read_json(root, name) | {"attempt": 3})
            return "FAILED", "it was killed"
        assert number == 3 and store.read_json(root, name)["attempt"] == 3
        ray_job.run(root, "data", key_of(FAKES[0], config, {}), number)
        return "SUCCEEDED", ""

    class Client:
        def submit_job(self, submission_id: str, **_: Any) -> None:
            submitted.append(int(submission_id.rpartition("-")[2]))

    monkeypatch.setattr(ray_job.stages, "STAGES", FAKES)
    monkeypatch.setattr(ray_job, "load", FakeConfig.model_validate)
    monkeypatch.setattr(JobServer, "_client", lambda self: Client())
    monkeypatch.setattr(ray_jobs, "RETRY_AFTER_S", 0)
    monkeypatch.setattr(JobServer, "_follow", claim_of_another)
    monkeypatch.setattr(JobServer, "_exit_code", lambda *_: 1)
    result = ray_submit.submit_stage(FAKES[0], root, config, {}, "http://head:8265", print)
    assert result.state == "ran" and submitted == [1, 3]


def argv(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""


def test_the_fence_holds_at_the_commit_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An attempt that was overtaken while it worked finds out when it wants to commit."""
    monkeypatch.setattr(ray_job.stages, "STAGES", FAKES)
    monkeypatch.setattr(ray_job, "load", FakeConfig.model_validate)
    root = store.open_root(str(tmp_path))
    config: Any = FakeConfig()
    key = key_of(FAKES[0], config, {})
    name = ray_job.claim_name("data", key)
    store.write_json(
        root, name, {"attempt": 1, "config": config.model_dump(mode="json"), "inputs": {}}
    )

    def overtaken(job: Any) -> dict[str, Any]:
        store.write_json(
            root, name, {"attempt": 2, "config": config.model_dump(mode="json"), "inputs": {}}
        )
        return FAKES[0].run(job)

    monkeypatch.setattr(
        ray_job.stages, "STAGES", (FAKES[0].__class__(**{**vars(FAKES[0]), "run": overtaken}),)
    )
    with pytest.raises(UnclipError, match="attempt 2 has taken over: nothing is committed"):
        ray_job.run(root, "data", key, 1)
    assert manifests.newest(root, "data") is None and not list((root.scratch / "aside").iterdir())
    ray_job.run(root, "data", key, 2)
    assert manifests.newest(root, "data")


def test_an_interrupted_driver_stops_its_job(cluster: RayCluster, tmp_path: Path) -> None:
    running = driver(tmp_path, cluster.address, 60)
    until(lambda: "RUNNING" in jobs(cluster, tmp_path).values())
    running.send_signal(signal.SIGINT)
    running.communicate(timeout=60)
    until(lambda: list(jobs(cluster, tmp_path).values()) == ["STOPPED"])
    until(
        lambda: (
            not [
                pid
                for pid in cluster.processes("tests.helpers.fake_job")
                if str(tmp_path).encode() in argv(pid)
            ]
        )
    )
    assert manifests.newest(store.open_root(str(tmp_path)), "data") is None


def test_a_mistake_is_told_in_its_own_words_and_not_tried_again(
    cluster: RayCluster, tmp_path: Path, quick: None
) -> None:
    with pytest.raises(UnclipError, match=r"-1: \[fake\] word = refused: choose another$"):
        drive(tmp_path, cluster.address, 0, "refused")
    assert list(jobs(cluster, tmp_path).values()) == ["FAILED"]
    (tmp_path / "passing").mkdir()
    shown = drive(tmp_path / "passing", cluster.address, 0, "flaky")  # a fault that passes
    assert any("attempt 2 follows" in line for line in shown) and shown[-1] == "data ran"


def test_a_job_whose_store_was_away_is_tried_again_by_who_knows_how_long_to_wait(
    cluster: RayCluster, tmp_path: Path, quick: None
) -> None:
    with pytest.raises(StorageAwayError, match=r"-1: cannot use s3://bucket: SlowDown$"):
        drive(tmp_path, cluster.address, 0, "away")
    assert list(jobs(cluster, tmp_path).values()) == ["FAILED"]
    assert drive(tmp_path, cluster.address, 0, "away")[-1] == "data ran"
    assert sorted((name[-1], state) for name, state in jobs(cluster, tmp_path).items()) == [
        ("1", "FAILED"),
        ("2", "SUCCEEDED"),
    ]


def test_attempts_follow_each_other_after_pauses_that_double_up_to_a_limit(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    submitted, pauses = list[int](), list[float]()
    monkeypatch.setattr(ray_jobs.time, "sleep", pauses.append)
    monkeypatch.setattr(
        JobServer, "_submit", lambda self, job, number, claim: (submitted.append(number), number)[1]
    )
    monkeypatch.setattr(JobServer, "_follow", lambda *_: ("FAILED", "it was killed"))
    monkeypatch.setattr(JobServer, "_exit_code", lambda *_: 1)
    job = Job(name="unclip-x", command=lambda number: "true", attempts=9)
    with pytest.raises(UnclipError, match=r"unclip-x-9: it was killed$"):
        JobServer("http://head:8265").run(
            job, 0, lambda number: number, lambda: False, lambda line: None
        )
    assert submitted == list(range(1, 10)) and pauses == [5, 10, 20, 40, 80, 160, 300, 300]


def test_a_job_server_that_is_silent_or_refuses_us_is_one_line(
    cluster: RayCluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = Job(name="unclip-x", command=lambda number: "true")
    with pytest.raises(
        UnclipError, match=r"does not answer: .*the same command joins the job again"
    ):
        JobServer("http://127.0.0.1:9", silence_limit_s=0).status(job, 1)
    with pytest.raises(CallerError, match="such as http://head:8265"):
        JobServer("head:8265")
    monkeypatch.setenv("RAY_AUTH_TOKEN", "0" * 64)
    with pytest.raises(UnclipError, match="refuses us: set RAY_AUTH_MODE=token"):
        subprocess_status(cluster)


def test_a_job_that_no_node_can_take_says_what_it_waits_for(
    cluster: RayCluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ray_jobs, "WAIT_NOTICE_S", 0)

    def show(line: str) -> None:
        if " waits: " in line:
            raise KeyboardInterrupt(line)

    greedy = Job(
        name=f"unclip-greedy-{tmp_path.name}",
        command=lambda number: "true",
        cpus=99,
        labels={"market-type": "!spot"},
    )
    with pytest.raises(KeyboardInterrupt, match="It asks one node for CPU 99, market-type !spot"):
        JobServer(cluster.address).run(greedy, 0, lambda number: None, lambda: True, show)


def subprocess_status(cluster: RayCluster) -> None:
    """Ask in a process of its own: Ray reads the token once."""
    code = "from infra.compute.ray_jobs import Job, JobServer; import sys; JobServer(sys.argv[1]).status(Job('x', lambda n: ''), 1)"  # noqa: E501
    asked = subprocess.run(
        [sys.executable, "-c", code, cluster.address], cwd=HERE, capture_output=True, text=True
    )
    raise UnclipError(asked.stderr.strip().splitlines()[-1])


def test_the_whole_command_submits_and_reports(cluster: RayCluster, tmp_path: Path) -> None:
    """`unclip submit` on the tiny recipe as far as ingest: the code travels, the log streams, the
    result is `run`'s.
    """
    from tests.helpers.tiny_run import prepare

    prepare(tmp_path)
    command = [
        sys.executable,
        "-m",
        "flows.cli.main",
        "submit",
        str(tmp_path / "tiny.toml"),
        "--address",
        cluster.address,
    ]
    absolute = json.dumps([{"kind": "folder", "path": str(tmp_path / "pictures" / "filled")}])
    done = subprocess.run(
        [
            *command,
            "--root",
            str(tmp_path / "root"),
            "--stage",
            "ingest",
            "--set",
            f"data.sources={absolute.replace(':', ' =')}",
            "--json",
        ],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(HERE)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert [(each["stage"], each["state"]) for each in json.loads(done.stdout)["stages"]] == [
        ("ingest", "ran")
    ]
    assert (
        "download" in done.stderr
        and "ingest    ran" in done.stderr
        and "Traceback" not in done.stderr
    )
    shutil.rmtree(tmp_path / "root")
