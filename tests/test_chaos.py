"""A Ray cluster of three machines with addresses of their own, and one that submits: power, processes and network fail in mid-training.

Each time `unclip submit` ends well by itself, and every file of the trained CLIP is what an undisturbed run made.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from infra import manifests, storage
from tests.machines import Machine, Machines
from tests.ray_cluster import HERE, RayCluster
from tests.tiny import prepare

pytestmark = [pytest.mark.chaos, pytest.mark.slow, pytest.mark.timeout(900)]
IMAGES = 9_600
CUT_S = 60
SETTINGS = {
    "GLOO_SOCKET_IFNAME": "eth0",  # the machines share one host name, which is none of their addresses
    "RAY_health_check_period_ms": "2000",  # a node that is silent is given up after some 20 s instead of a minute
    "RAY_health_check_timeout_ms": "4000",
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "300",  # here one computer is all the machines
    "RAY_worker_niceness": "0",  # by default 15: whatever else runs on this computer would go first
}


class Place:
    """The cluster, the machine that submits, and the folder in which recipe, pictures and ROOTs lie."""

    def __init__(self, folder: Path, network: Machines, cluster: RayCluster) -> None:
        self.folder, self.network, self.cluster = folder, network, cluster
        self.submitter = network.all[-1]

    def submit(self, root: str) -> "subprocess.Popen[str]":
        """Start `unclip submit` as far as CLIP."""
        sources = json.dumps([{"kind": "folder", "path": str(self.folder / "pictures" / "filled")}]).replace(":", " =")
        settings = [
            f"data.sources={sources}",
            f"clip.images={IMAGES}",
            "clip.state_every_s=0.5",
            "cluster.upload_code=false",
            "data.processes=1",
        ]
        command = [sys.executable, "-m", "flows.cli", "submit", str(self.folder / "tiny.toml"), "--stage", "clip", "--json"]
        command += ["--address", self.cluster.address, "--root", str(self.folder / root)]
        environment = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "PREFECT_", "UNCLIP_"))}
        return subprocess.Popen(
            [*self.submitter.within, *command, *(part for each in settings for part in ("--set", each))],
            cwd=self.folder,
            env=environment | self.cluster.environment | {"PYTHONPATH": str(HERE), "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def files(self, root: str) -> dict[str, str]:
        """Return the checksum of every file as far as CLIP, what tells of time apart; checks that they are whole."""
        found = {}
        for stage in ("ingest", "curate", "clip"):
            made = manifests.newest(storage.open_root(str(self.folder / root)), stage)
            assert made and manifests.verify(made) == []
            found |= {f"{stage}/{made.key}/{file['path']}": file["sha256"] for file in made.manifest["files"]}
        return {name: checksum for name, checksum in found.items() if not name.endswith("metrics.jsonl")}

    def trainers(self) -> list[Machine]:
        """Return the machines that train."""
        return [machine for machine in self.network.all if machine.processes("RayTrainWorker")]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    folder = tmp_path_factory.mktemp("chaos")
    prepare(folder)
    with Machines(4) as network, RayCluster((1, 1, 1), network.all[:3], SETTINGS) as cluster:
        yield Place(folder, network, cluster)


@pytest.fixture(scope="module")
def undisturbed(place: Place) -> dict[str, str]:
    """Let one run be; return its files."""
    running = place.submit("undisturbed")
    out, err = running.communicate(timeout=600)
    assert running.returncode == 0, err
    assert [each["state"] for each in json.loads(out)["stages"]] == ["ran"] * 3
    return place.files("undisturbed")


def disturbed(place: Place, undisturbed: dict[str, str], root: str, disturb: Callable[[], Any]) -> str:
    """Train again from the same curated pictures, `disturb` once a state lies in mid-training; return what was shown."""
    for stage in ("ingest", "curate"):
        shutil.copytree(place.folder / "undisturbed" / stage, place.folder / root / stage)
    running = place.submit(root)
    shown: list[str] = []
    assert running.stderr
    stderr = running.stderr
    reader = threading.Thread(target=lambda: shown.extend(stderr), daemon=True)
    reader.start()
    try:
        limit = time.monotonic() + 300
        while not 0 < (seen := images_seen(place.folder / root)) < IMAGES * 0.8 or len(place.trainers()) < 2:
            assert running.poll() is None and time.monotonic() < limit, f"never in mid-training ({seen} images): {''.join(shown)}"
            time.sleep(0.1)
        disturb()
        assert running.wait(timeout=600) == 0, "".join(shown)
        reader.join()
    finally:
        running.kill()
    assert running.stdout
    assert [each["state"] for each in json.loads(running.stdout.read())["stages"]] == ["current", "current", "ran"]
    assert place.files(root) == undisturbed
    assert "Traceback" not in "".join(shown)
    return "".join(shown)


def images_seen(root: Path) -> int:
    """Return the images seen by the state that a training would resume from, 0 where there is none."""
    for state in root.glob("work/clip/*/state.pt"):
        return int(torch.load(state, weights_only=True)["images_seen"])
    return 0


def test_the_jobs_process_on_the_head_is_killed(place: Place, undisturbed: dict[str, str]) -> None:
    def disturb() -> None:
        (driver,) = (pid for pid in place.network.all[0].processes("-m flows.stage_job") if is_python(pid))
        os.kill(driver, signal.SIGKILL)

    shown = disturbed(place, undisturbed, "driver", disturb)
    assert "-1: " in shown and "attempt 2 follows" in shown


def is_python(pid: int) -> bool:
    return b"python" in Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")[0]


def test_who_submitted_and_the_head_do_not_see_each_other_for_a_while(place: Place, undisturbed: dict[str, str]) -> None:
    def disturb() -> None:
        place.network.pull(place.submitter)
        time.sleep(CUT_S)
        place.network.plug(place.submitter)

    shown = disturbed(place, undisturbed, "submitter", disturb)
    assert "attempt 2" not in shown


def test_a_node_that_trains_is_cut_off_for_a_while(place: Place, undisturbed: dict[str, str]) -> None:
    def disturb() -> None:
        cut = place.trainers()[-1]
        assert cut is not place.network.all[0]
        place.network.pull(cut)
        time.sleep(CUT_S)
        place.network.plug(cut)

    disturbed(place, undisturbed, "cut", disturb)


def test_a_node_that_trains_loses_power(place: Place, undisturbed: dict[str, str]) -> None:
    def disturb() -> None:
        lost = place.trainers()[-1]
        assert lost is not place.network.all[0]
        lost.lose_power()

    shown = disturbed(place, undisturbed, "power", disturb)
    assert "it goes on from its last state" in shown and "attempt 2" not in shown
