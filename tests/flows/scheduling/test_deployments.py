"""Schedules on a real Prefect server: a run starts by itself and completes, one at a time per ROOT,
and a failure is told.
"""

import contextlib
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
import pytest

from flows.scheduling.deployments import Plan, deploy, queue_of
from infra.errors import CallerError
from tests.flows.orchestration.test_ray_submit import jobs
from tests.flows.test_pipeline import processes
from tests.helpers.ray_cluster import HERE, RayCluster
from tests.helpers.s3_server import free_ports
from tests.helpers.tiny_run import LIMIT_S, prepare, ran, start

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]
EVERY_S = 15
"""Only until the first scheduled run has completed: each run costs a process that imports
Prefect.
"""


class Webhook(ThreadingHTTPServer):
    """Context manager: keeps what is posted to it."""

    def __init__(self) -> None:
        self.posted: list[str] = []
        webhook = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                webhook.posted.append(self.rfile.read(int(self.headers["Content-Length"])).decode())
                self.send_response(200)
                self.send_header("Content-Length", "0")
                self.end_headers()

            def log_message(self, format: str, *args: object) -> None:
                pass

        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_address[1]}/hook-with-a-secret"

    def __enter__(self) -> "Webhook":
        threading.Thread(
            target=self.serve_forever, kwargs={"poll_interval": 0.1}, daemon=True
        ).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.shutdown()
        self.server_close()


class Up:
    """`unclip up` on the tiny recipe as far as curate, which needs no Ray."""

    def __init__(self, folder: Path, port: int, webhook: Webhook) -> None:
        self.folder, self.webhook = folder, webhook
        self.api = f"http://127.0.0.1:{port}/api"
        self.process: subprocess.Popen[str] = start(
            folder,
            "up",
            "tiny.toml",
            "--root",
            "root",
            "--every",
            str(EVERY_S),
            "--stage",
            "curate",
            "--port",
            str(port),
        )

    def runs(self, name: str = "tiny") -> list[dict[str, Any]]:
        asked = {"deployments": {"name": {"any_": [name]}}, "sort": "EXPECTED_START_TIME_ASC"}
        found: list[dict[str, Any]] = self.ask("POST", "flow_runs/filter", asked)
        return found

    def ask(self, method: str, path: str, content: Any = None) -> Any:
        """Ask the server, again where it says that it is busy (SQLite was locked), as Prefect's own
        client does.
        """
        limit = time.monotonic() + LIMIT_S
        while True:
            answer = httpx.request(
                method, f"{self.api}/{path}", json=content, timeout=LIMIT_S, auth=self.login()
            )
            if answer.status_code != 503 or time.monotonic() >= limit:
                answer.raise_for_status()
                return answer.json() if answer.content else None
            time.sleep(1)

    def password(self) -> str:
        return (self.folder / "root" / "prefect" / "password").read_text().strip()

    def login(self) -> tuple[str, str]:
        user, _, password = self.password().partition(":")
        return user, password

    def settings(self) -> dict[str, str]:
        """Return what a person sets to use the server."""
        return {
            "PREFECT_API_URL": self.api,
            "PREFECT_API_AUTH_STRING": self.password(),
            "PREFECT_HOME": str(self.folder / "home"),
        }

    def until(self, condition: Callable[[], Any], limit_s: float = 480) -> Any:
        limit = time.monotonic() + limit_s
        while not (found := condition()):
            assert self.process.poll() is None, self.process.communicate()
            assert time.monotonic() < limit, self.log()[-3000:]
            time.sleep(0.3)
        return found

    def begin(self, name: str = "tiny") -> str:
        """Have the worker run a deployment now; return the run's id."""
        deployment = self.ask("GET", f"deployments/name/unclip/{name}")
        return str(self.ask("POST", f"deployments/{deployment['id']}/create_flow_run", {})["id"])

    def state(self, run: str) -> str:
        return str(self.ask("GET", f"flow_runs/{run}")["state_type"])

    def ended(self, state: str) -> list[dict[str, Any]]:
        return [run for run in self.runs() if run["state_type"] == state]

    def log(self) -> str:
        return "".join(
            path.read_text() for path in (self.folder / "root" / "prefect").glob("up-*.log")
        )


@pytest.fixture(scope="module")
def up(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Up]:
    folder = tmp_path_factory.mktemp("up")
    prepare(folder)
    with Webhook() as webhook, pytest.MonkeyPatch.context() as patch:
        patch.setenv("UNCLIP_NOTIFY_URL", webhook.url)
        running = Up(folder, free_ports(1)[0], webhook)
        try:
            assert running.process.stderr and running.process.stderr.readline().startswith(
                "up: http://127.0.0.1:"
            )
            yield running
        finally:
            running.process.kill()
            running.process.communicate()
            for pid in processes(str(folder)):  # a run that was under way
                os.kill(pid, signal.SIGKILL)


def unclip(up: Up, *arguments: str) -> tuple[int, str, str]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tests.helpers.tiny_run.KEPT", up.settings())
        return ran(up.folder, *arguments)


def test_a_scheduled_run_starts_by_itself_and_completes(up: Up) -> None:
    run = up.until(lambda: up.ended("COMPLETED"))[0]
    assert (
        run["auto_scheduled"]
        and run["parameters"]["targets"] == ["curate"]
        and run["work_queue_name"] == queue_of(str(up.folder / "root"))
    )
    record = json.loads((up.folder / "root" / "runs" / "tiny.json").read_text())
    assert set(record["stages"]) == {"ingest", "curate"}
    code, out, err = ran(up.folder, "status", "tiny.toml", "--root", "root", "--json")
    assert code == 0 and [each["state"] for each in json.loads(out)["stages"]][:2] == [
        "current",
        "current",
    ], err
    up.ask(
        "PATCH", f"deployments/{run['deployment_id']}", {"paused": True}
    )  # the tests below begin the runs that they need


def test_runs_into_one_root_never_overlap(up: Up) -> None:
    """A second deployment into the same ROOT shares the queue, which lets one run through."""
    every = ("--every", "3600", "--stage", "curate")
    code, out, err = unclip(
        up, "schedule", "tiny.toml", "--root", "root", "--name", "other", *every, "--json"
    )
    assert code == 0, err
    result = json.loads(out)
    assert result["deployment"] == "unclip/other" and result["queue"] == queue_of(
        str(up.folder / "root")
    )
    queue = up.ask("GET", f"work_pools/unclip/queues/{result['queue']}")
    assert queue["concurrency_limit"] == 1
    deployment = up.ask("GET", f"deployments/{result['id']}")
    assert (
        set(deployment["tags"]) == {"unclip", "recipe:tiny", result["queue"]}
        and deployment["parameters"]["name"] == "other"
    )
    begun = [up.begin("tiny"), up.begin("other")]
    up.until(lambda: [up.state(run) for run in begun] == ["COMPLETED"] * 2)
    spans = sorted(
        (run["start_time"], run["end_time"] or "9")
        for name in ("tiny", "other")
        for run in up.runs(name)
        if run["start_time"]
    )
    assert len(spans) >= 2 and all(
        end <= start for (_, end), (start, _) in itertools.pairwise(spans)
    ), spans
    code, out, err = unclip(up, "schedule", "tiny.toml", "--name", "other", "--remove", "--json")
    assert code == 0 and json.loads(out)["removed"], err
    code, out, err = unclip(up, "schedule", "tiny.toml", "--name", "other", "--remove")
    assert code == 2 and "there is no deployment unclip/other" in err


def test_a_cron_schedule_is_kept_with_its_time_zone_and_a_wrong_one_is_the_callers_mistake(
    up: Up,
) -> None:
    arguments = ("schedule", "tiny.toml", "--root", "elsewhere", "--name", "nightly", "--cron")
    code, out, err = unclip(
        up, *arguments, "0 3 * * *", "--timezone", "Europe/Berlin", "--paused", "--json"
    )
    assert code == 0, err
    deployment = up.ask("GET", f"deployments/{json.loads(out)['id']}")
    assert deployment["paused"] and [
        each["schedule"]["cron"] for each in deployment["schedules"]
    ] == ["0 3 * * *"]
    assert deployment["schedules"][0]["schedule"]["timezone"] == "Europe/Berlin"
    code, _, err = unclip(up, *arguments, "30 4 * * *", "--json")  # renewed, not added
    deployment = up.ask("GET", f"deployments/{json.loads(out)['id']}")
    assert code == 0 and [each["schedule"]["cron"] for each in deployment["schedules"]] == [
        "30 4 * * *"
    ], err
    code, _, err = unclip(up, *arguments, "61 3 * * *")
    assert code == 2 and len(err.splitlines()) == 1, err
    for wrong in (
        {"cron": "61 3 * * *"},
        {"cron": "0 3 * * *", "timezone": "Mars/Olympus"},
        {"cron": "0 3 * * *", "every_s": 5},
    ):
        with pytest.raises(CallerError, match="--cron") as caught:
            deploy(Plan("nightly", {"root": "elsewhere"}, up.folder, **wrong))  # type: ignore[arg-type]
        assert len(str(caught.value).splitlines()) == 1


def test_prefects_own_deploy_makes_the_deployment_in_the_queue_of_its_root(up: Up) -> None:
    environment = os.environ | up.settings() | {"PYTHONPATH": str(HERE)}
    environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{environment['PATH']}"
    had_data = (HERE / "unclip-data").exists()  # `make run` puts it there
    deploy = [
        sys.executable,
        "-m",
        "prefect",
        "--no-prompt",
        "deploy",
        "--all",
        "--prefect-file",
        "infra/deploy/prefect.yaml",
    ]
    done = subprocess.run(
        deploy, cwd=HERE, env=environment, capture_output=True, text=True, timeout=LIMIT_S
    )
    assert done.returncode == 0, done.stdout + done.stderr
    made = up.ask("GET", "deployments/name/unclip/nightly")
    try:
        assert (
            made["entrypoint"] == "flows/pipeline.py:run_pipeline"
            and made["parameters"]["root"] == "unclip-data"
        )
        assert made["pull_steps"][0]["prefect.deployments.steps.set_working_directory"][
            "directory"
        ] == str(HERE)
        assert [each["schedule"]["cron"] for each in made["schedules"]] == ["0 3 * * *"]
        assert made["global_concurrency_limit"]["limit"] == 1
        assert made["work_queue_name"] == queue_of(str(HERE / "unclip-data")), (
            "what `unclip schedule --root unclip-data` shares"
        )
        queue = up.ask("GET", f"work_pools/unclip/queues/{made['work_queue_name']}")
        assert queue["concurrency_limit"] == 1
    finally:
        up.ask("DELETE", f"deployments/{made['id']}")
    assert (HERE / "unclip-data").exists() == had_data, "a deployment alone makes no ROOT"


def running(up: Up) -> tuple[dict[str, Any], list[int]] | None:
    """Return a run that runs, and its processes, which carry the run's id in their environment."""
    found = ((run, processes(f"PREFECT__FLOW_RUN_ID={run['id']}")) for run in up.ended("RUNNING"))
    return next(((run, pids) for run, pids in found if pids), None)


def test_a_run_that_is_killed_is_crashed_and_the_next_goes_on(up: Up) -> None:
    up.begin()
    run, pids = up.until(lambda: running(up))
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):  # it ends with the one before
            os.kill(pid, signal.SIGKILL)
    (crashed,) = up.until(lambda: [each for each in up.ended("CRASHED") if each["id"] == run["id"]])
    told = json.loads(
        up.until(lambda: [each for each in up.webhook.posted if "Crashed" in each], 60)[0]
    )["text"]
    assert told.startswith(
        f"unclip tiny: run {crashed['name']} Crashed: Process exited with status code: -9"
    )
    following = up.begin()
    up.until(lambda: up.state(following) == "COMPLETED")


def states(cluster: RayCluster, folder: Path) -> list[str]:
    """Return the states of a ROOT's jobs; none where the head is too busy to answer."""
    try:
        return list(jobs(cluster, folder).values())
    except OSError:
        return []


def test_cancelling_a_run_through_prefect_stops_its_ray_job(up: Up) -> None:
    with RayCluster() as cluster, cluster.joined():
        flow = up.ask("POST", "flows/", {"name": "deployed-fakes"})
        asked: dict[str, Any] = {
            "name": "cancelled",
            "flow_id": flow["id"],
            "entrypoint": "tests.helpers.fake_deployment.run_fakes",
            "work_pool_name": "unclip",
            "parameters": {
                "root": str(up.folder / "cancelled"),
                "jobs": cluster.address,
                "seconds": 300,
                "environment": cluster.environment,
            },
            "pull_steps": [
                {"prefect.deployments.steps.set_working_directory": {"directory": str(HERE)}}
            ],
        }
        deployment = up.ask("POST", "deployments/", asked)
        run = up.ask("POST", f"deployments/{deployment['id']}/create_flow_run", {})
        up.until(lambda: states(cluster, up.folder / "cancelled") == ["RUNNING"])
        cancelling = {"state": {"type": "CANCELLING", "name": "Cancelling"}}
        up.ask("POST", f"flow_runs/{run['id']}/set_state", cancelling)
        up.until(lambda: states(cluster, up.folder / "cancelled") == ["STOPPED"], 90)
        up.until(
            lambda: [each for each in up.runs("cancelled") if each["state_type"] == "CANCELLED"], 90
        )
        up.until(lambda: not cluster.processes("tests.helpers.fake_job"), 30)


def test_a_failed_run_is_told_to_the_webhook_and_the_next_goes_on(up: Up) -> None:
    shutil.move(up.folder / "pictures", up.folder / "away")
    failing = up.begin()
    up.until(lambda: up.state(failing) == "FAILED")
    told = json.loads(
        up.until(lambda: [each for each in up.webhook.posted if "Failed" in each], 60)[0]
    )
    assert "unclip tiny: run tiny Failed" in told["text"] and "does not exist" in told["text"]
    shutil.move(up.folder / "away", up.folder / "pictures")
    following = up.begin()
    up.until(lambda: up.state(following) == "COMPLETED")
    assert "hook-with-a-secret" not in up.log() and up.password() not in up.log()


def test_a_signal_ends_server_worker_and_runs(up: Up) -> None:
    up.process.send_signal(signal.SIGTERM)
    _out, err = up.process.communicate(timeout=60)
    assert up.process.returncode == 0 and "Traceback" not in err and len(err.splitlines()) <= 2, err
    limit = time.monotonic() + 30
    while (
        processes(str(up.folder)) and time.monotonic() < limit
    ):  # Ray's last ones go by themselves
        time.sleep(0.2)
    assert processes(str(up.folder)) == []


def test_without_a_server_it_is_one_line(tmp_path: Path) -> None:
    prepare(tmp_path)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            "tests.helpers.tiny_run.KEPT",
            {"PREFECT_API_URL": "http://127.0.0.1:9/api", "PREFECT_HOME": str(tmp_path / "home")},
        )
        code, out, err = ran(
            tmp_path, "schedule", "tiny.toml", "--root", "root", "--cron", "0 3 * * *"
        )
    assert (
        (code, out) == (1, "")
        and "start one with `unclip up` or set PREFECT_API_URL" in err
        and len(err.splitlines()) == 1
    )
