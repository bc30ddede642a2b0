"""A run whose process or machine has vanished is marked crashed by Prefect's server, and the
webhook hears of it.
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

    def begin():
        run = post(f"deployments/{made['id']}/create_flow_run", {}).json()["id"]
        post(f"flow_runs/{run}/set_state", {"state": {"type": "RUNNING", "name": "Running"}, "force": True})
        heartbeat = {"event": "prefect.flow-run.heartbeat", "resource": {"prefect.resource.id": f"prefect.flow-run.{run}"}}
        post("events", [heartbeat | {"occurred": datetime.now(UTC).isoformat(), "id": str(uuid.uuid4())}])
        return run

    def state(run):
        return httpx.get(f"{url}/flow_runs/{run}", timeout=60, auth=login).json()["state"]

    ended = begin()
    post(f"flow_runs/{ended}/set_state", {"state": {"type": "COMPLETED", "name": "Completed"}, "force": True})
    time.sleep(3)
    vanished = begin()
    limit = time.monotonic() + 240
    while time.monotonic() < limit and not webhook.posted:
        time.sleep(0.5)
    time.sleep(2)  # the other run, were it meant, would have been marked before: its heartbeat is older by three seconds
    told = {"vanished": state(vanished), "ended": state(ended), "posted": webhook.posted}
    print(json.dumps(told | {"name": httpx.get(f"{url}/flow_runs/{vanished}", timeout=60, auth=login).json()["name"]}))
"""  # noqa: E501


def test_a_run_without_heartbeat_is_marked_crashed_and_told_and_one_that_has_ended_is_not(
    tmp_path: Path,
) -> None:
    environment = {
        name: value for name, value in os.environ.items() if not name.startswith("PREFECT_")
    }
    environment |= {"PYTHONPATH": str(HERE), "PREFECT_HOME": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", SERVER, str(tmp_path)],
        cwd=HERE,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    told = json.loads(done.stdout.splitlines()[-1])
    assert (told["vanished"]["type"], told["ended"]["type"]) == ("CRASHED", "COMPLETED")
    assert told["vanished"]["message"] == "no heartbeat for 10 s: its process has gone"
    assert [json.loads(each)["text"] for each in told["posted"]] == [
        f"unclip nightly: run {told['name']} Crashed: no heartbeat for 10 s: its process has gone"
    ]
