"""A worker machine that dies in the middle of a training: its run is noticed, reported, and taken
up by another worker, which goes on from the last commit.
"""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.ray_cluster import HERE
from tests.helpers.tiny_run import prepare

pytestmark = [pytest.mark.chaos, pytest.mark.timeout(1800)]
# Prefect reads its settings when it is imported, so it is done in a process of its own.
DRIVER = """
import json, os, signal, subprocess, sys, time
from datetime import datetime
from pathlib import Path
import httpx
from flows.scheduling.prefect_server import lasting_server
from tests.flows.scheduling.test_deployments import Webhook
from tests.flows.test_pipeline import processes
from tests.helpers.s3_server import free_ports

folder = Path(sys.argv[1])
root = folder / "root"

def machine(name):
    return subprocess.Popen(
        [sys.executable, "-m", "prefect", "worker", "start", "--pool", "unclip"],
        env=os.environ | deployments.WORKER_SETTINGS | {"MACHINE": f"{folder}/{name}"},
        cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True,
    )

def lose_power(name, worker):
    while pids := processes(f"MACHINE={folder}/{name}"):
        for pid in pids:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                pass
        worker.poll()
        time.sleep(0.05)

def until(condition):
    limit = time.monotonic() + 600
    while not (result := condition()):
        assert time.monotonic() < limit, "not within ten minutes"
        time.sleep(0.3)
    return result

with Webhook() as webhook, lasting_server(root / "prefect", free_ports(1)[0]) as url:
    from flows.scheduling import deployments
    login = tuple((root / "prefect" / "password").read_text().strip().split(":"))

    def ask(path, content=None):
        method = "GET" if content is None else "POST"
        answer = httpx.request(method, f"{url}/{path}", json=content, timeout=60, auth=login)
        return answer.raise_for_status().json()

    overrides = ["clip.images=1000000", "clip.state_every_s=1", "cluster.clip_workers=1"]
    parameters = {"recipe": "tiny.toml", "root": str(root), "name": "tiny",
                  "overrides": overrides, "targets": ["clip"]}
    plan = deployments.Plan("tiny", parameters, folder, every_s=86400, paused=True)
    made = deployments.deploy(plan, webhook.url)
    first = machine("first")
    lost = ask(f"deployments/{made['id']}/create_flow_run", {})["id"]
    until(lambda: list(root.glob("work/clip/*/state.pt")) and list(root.glob("work/clip/*/progress.json")))
    lose_power("first", first)
    seen_before = json.loads(next(root.glob("work/clip/*/progress.json")).read_text())
    crashed = until(lambda: [run for run in ask("flow_runs/filter", {}) if run["state_type"] == "CRASHED"])
    second = machine("second")
    try:
        taken = until(lambda: [run for run in ask("flow_runs/filter", {}) if run["parameters"].get("resumes") == lost])[0]
        until(lambda: ask(f"flow_runs/{taken['id']}")["state_type"] == "RUNNING")
        started = datetime.fromisoformat(ask(f"flow_runs/{taken['id']}")["start_time"])
        noticed = datetime.fromisoformat(crashed[0]["state"]["timestamp"])

        def continued():
            row = json.loads(next(root.glob("work/clip/*/progress.json")).read_text())
            return row if row["images_seen"] > seen_before["images_seen"] else None

        seen_after = until(continued)
        logs = [line["message"] for line in ask("logs/filter", {"logs": {"flow_run_id": {"any_": [taken["id"]]}}})]
    finally:
        lose_power("second", second)
    print(json.dumps({
        "crashed": [run["id"] for run in crashed], "lost": lost, "logs": logs,
        "message": crashed[0]["state"]["message"], "posted": webhook.posted,
        "taken_up_after_s": (started - noticed).total_seconds(),
        "images_seen": [seen_before["images_seen"], seen_after["images_seen"]],
    }))
"""  # noqa: E501


def test_a_run_whose_machine_died_is_taken_up_from_its_last_state(tmp_path: Path) -> None:
    prepare(tmp_path)
    environment = {
        name: value for name, value in os.environ.items() if not name.startswith("PREFECT_")
    }
    process = subprocess.Popen(
        [sys.executable, "-c", DRIVER, str(tmp_path)],
        cwd=HERE,
        env=environment | {"PYTHONPATH": str(HERE)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        out, err = process.communicate()
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == 0, err[-3000:]
    result = json.loads(out.splitlines()[-1])
    print(f"taken up {result['taken_up_after_s']:.0f} s after it was noticed")
    assert result["crashed"] == [result["lost"]]
    assert result["message"].startswith("no heartbeat")
    assert [json.loads(text)["text"].split(" Crashed: ")[1] for text in result["posted"]] == [
        result["message"]
    ]
    for stage in ("ingest", "curate"):
        assert any(line.startswith(stage) and "current" in line for line in result["logs"])
    before, after = result["images_seen"]
    assert 0 < before < after
