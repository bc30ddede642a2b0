"""A run whose process or machine has vanished is marked crashed by Prefect's server, reported to
the webhook, and taken up again once.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.ray_cluster import HERE

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]
# Prefect reads its settings when it is imported, so it is done in a process of its own.
SERVER = """
import json, sys, time, uuid
from datetime import UTC, datetime
from pathlib import Path
import httpx
from flows.scheduling.prefect_server import lasting_server
from tests.helpers.s3_server import free_ports
from tests.flows.scheduling.test_deployments import Webhook

home = Path(sys.argv[1])
with Webhook() as webhook, lasting_server(home, free_ports(1)[0]) as url:
    from flows.scheduling import deployments
    login = tuple((home / "password").read_text().strip().split(":"))
    deployments.VANISHED_AFTER_S = 10  # the least that Prefect takes
    parameters = {"recipe": "quickstart", "root": str(home / "root"), "name": "nightly"}
    made = deployments.deploy(deployments.Plan("nightly", parameters, home, every_s=86400, paused=True), webhook.url)

    def post(path, content):
        return httpx.post(f"{url}/{path}", json=content, timeout=60, auth=login).raise_for_status()

    def get(path):
        return httpx.get(f"{url}/{path}", timeout=60, auth=login).json()

    def run_now(run, is_ours=True):
        # As the process of a run begins, and sends a heartbeat.
        post(f"flow_runs/{run}/set_state", {"state": {"type": "RUNNING", "name": "Running"}, "force": True})
        deployment = {"prefect.resource.id": f"prefect.deployment.{made['id']}", "prefect.resource.role": "deployment"}
        tag = {"prefect.resource.id": "prefect.tag.unclip", "prefect.resource.role": "tag"}
        related = [deployment, tag] if is_ours else [deployment]
        heartbeat = {"event": "prefect.flow-run.heartbeat", "resource": {"prefect.resource.id": f"prefect.flow-run.{run}"}, "related": related}
        post("events", [heartbeat | {"occurred": datetime.now(UTC).isoformat(), "id": str(uuid.uuid4())}])
        return run

    def begin():
        return run_now(post(f"deployments/{made['id']}/create_flow_run", {}).json()["id"])

    def successor(run):
        limit = time.monotonic() + 240
        while time.monotonic() < limit:
            for candidate in post("flow_runs/filter", {}).json():
                if candidate["parameters"].get("resumes") == run:
                    return candidate
            time.sleep(0.5)
        raise TimeoutError(run)

    ended = begin()
    post(f"flow_runs/{ended}/set_state", {"state": {"type": "COMPLETED", "name": "Completed"}, "force": True})
    foreign = run_now(post(f"deployments/{made['id']}/create_flow_run", {}).json()["id"], is_ours=False)
    time.sleep(3)
    vanished = begin()
    second = successor(vanished)
    run_now(second["id"])
    third = successor(second["id"])
    limit = time.monotonic() + 240
    while time.monotonic() < limit and len(webhook.posted) < 2:
        time.sleep(0.5)
    from flows.pipeline import check_resumption
    from infra.errors import UnclipError
    check_resumption(uuid.UUID(vanished))
    try:
        check_resumption(uuid.UUID(second["id"]))
        refusal = None
    except UnclipError as error:
        refusal = str(error)
    runs = post("flow_runs/filter", {}).json()
    print(json.dumps({
        "ids": {"vanished": vanished, "second": second["id"]},
        "names": {"vanished": get(f"flow_runs/{vanished}")["name"], "second": second["name"]},
        "vanished": get(f"flow_runs/{vanished}")["state"],
        "ended": get(f"flow_runs/{ended}")["state"],
        "foreign": get(f"flow_runs/{foreign}")["state"],
        "second": second,
        "third": third,
        "runs": len(runs),
        "parameters": parameters,
        "refusal": refusal,
        "posted": webhook.posted,
    }))
"""  # noqa: E501


def test_a_run_without_heartbeat_is_marked_crashed_and_taken_up_once(tmp_path: Path) -> None:
    environment = {
        name: value for name, value in os.environ.items() if not name.startswith("PREFECT_")
    }
    environment |= {"PYTHONPATH": str(HERE), "PREFECT_HOME": str(tmp_path)}
    process = subprocess.run(
        [sys.executable, "-c", SERVER, str(tmp_path)],
        cwd=HERE,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert process.returncode == 0, process.stderr[-3000:]
    result = json.loads(process.stdout.splitlines()[-1])
    message = "no heartbeat for 10 s: its process has gone"
    assert (result["vanished"]["type"], result["ended"]["type"]) == ("CRASHED", "COMPLETED")
    assert result["vanished"]["message"] == message
    names, ids = result["names"], result["ids"]
    assert [json.loads(text)["text"] for text in result["posted"]] == [
        f"unclip nightly: run {names[name]} Crashed: {message}" for name in ("vanished", "second")
    ]
    # Neither the run that ended nor one of other flows is taken up: there are these two, the
    # vanished one and two successors.
    assert result["runs"] == 5 and result["foreign"]["type"] == "RUNNING"
    assert result["second"]["parameters"] == result["parameters"] | {"resumes": ids["vanished"]}
    assert result["third"]["parameters"] == result["parameters"] | {"resumes": ids["second"]}
    assert result["refusal"].startswith(
        f"run {names['second']} ({ids['second']}) vanished as {ids['vanished']} had before it "
        f"({message}): it is not taken up a third time"
    )
