"""A Ray cluster of three machines with addresses of their own, one that submits and one outside:
power, processes, network and store fail.

Each time `unclip submit` ends well by itself, and every file of the embeddings and of the trained
CLIP, and every picture of an ingest,
is what an undisturbed run made; into a folder that the machines share and into a bucket.
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

from flows.config.roots import scratch_for
from infra.storage import commits, manifests
from infra.storage import store as storage
from infra.storage.manifest_schema import MANIFEST
from infra.storage.manifests import Committed
from infra.storage.store import Root
from infra.storage.work_folder import WorkFolder
from tests.flows.ingest.test_ingest import is_downloading, stored, write_list
from tests.helpers.hostile_server import Server
from tests.helpers.network_namespaces import Machine, Machines
from tests.helpers.ray_cluster import HERE, RayCluster
from tests.helpers.s3_server import BUCKET, Faults, FaultyProxy, S3Server
from tests.helpers.tiny_run import prepare

pytestmark = [pytest.mark.chaos, pytest.mark.slow, pytest.mark.timeout(900)]
IMAGES = 9_600
CUT_S = 60
STAGES = ("ingest", "curate", "clip", "embed")
SHARD, LISTED = 20, 240
SETTINGS = {
    # the machines share one host name, which is none of their addresses
    "GLOO_SOCKET_IFNAME": "eth0",
    # a node that is silent is given up after some 20 s instead of a minute
    "RAY_health_check_period_ms": "2000",
    "RAY_health_check_timeout_ms": "4000",
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "300",  # here one computer is all the machines
    "RAY_worker_niceness": "0",  # by default 15: whatever else runs on this computer would go first
}


class Place:
    """The cluster, the machine that submits, one outside with pictures and a store, and the folder
    in which recipe and ROOTs lie.
    """

    def __init__(
        self, folder: Path, network: Machines, cluster: RayCluster, keys: dict[str, str]
    ) -> None:
        self.folder, self.network, self.cluster, self.keys = folder, network, cluster, keys
        self.head, *_, self.submitter, self.outside = network.all

    def submit(self, root: str, stage: str, *more: str) -> "subprocess.Popen[str]":
        """Start `unclip submit` as far as a stage; `more` are settings."""
        settings = [
            f"clip.images={IMAGES}",
            "clip.state_every_s=0.5",
            "embed.rows_per_part=1",
            "cluster.upload_code=false",
            "data.processes=1",
            *(
                more
                or [sources({"kind": "folder", "path": str(self.folder / "pictures" / "filled")})]
            ),
        ]
        command = [
            sys.executable,
            "-m",
            "flows.cli.main",
            "submit",
            str(self.folder / "tiny.toml"),
            "--stage",
            stage,
            "--json",
        ]
        command += ["--address", self.cluster.address, "--root", root]
        environment = {
            name: value
            for name, value in os.environ.items()
            if not name.startswith(("RAY_", "PREFECT_"))
        }
        return subprocess.Popen(
            [
                *self.submitter.within,
                *command,
                *(part for each in settings for part in ("--set", each)),
            ],
            cwd=self.folder,
            env=environment
            | self.cluster.environment
            | self.keys
            | {"PYTHONPATH": str(HERE), "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def opened(self, root: str) -> Root:
        """Open a ROOT as seen from here."""
        return storage.open_root(root, scratch_for(root))

    def trainers(self) -> list[Machine]:
        """Return the machines that train."""
        return [machine for machine in self.network.all if machine.processes("RayTrainWorker")]

    def lose(self, machine: Machine) -> None:
        """Turn a machine that is not the head off and on again: all that ran there is gone, then it
        joins the cluster anew.
        """
        assert machine is not self.head
        machine.lose_power()


def sources(*each: dict[str, Any]) -> str:
    """Return a setting that names the sources, in TOML."""
    return f"data.sources={json.dumps(each).replace(': ', ' = ')}"


def made(root: Root, stage: str) -> Committed:
    """Return what a stage made; checks that it is whole and alone."""
    (key,) = storage.list_names(root, stage)
    committed = manifests.find(root, stage, key)
    assert committed and manifests.verify(committed) == []
    return committed


def files(root: Root, stages: tuple[str, ...]) -> dict[str, str]:
    """Return the checksum of every file of some stages, what tells of time apart."""
    found = {}
    for each in (made(root, stage) for stage in stages):
        found |= {
            f"{each.stage}/{each.key}/{file['path']}": str(file["sha256"])
            for file in each.manifest["files"]
        }
    return {
        name: checksum for name, checksum in found.items() if not name.endswith("metrics.jsonl")
    }


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    folder = tmp_path_factory.mktemp("chaos")
    prepare(folder)
    with (
        Machines(5) as network,
        S3Server(folder / "s3") as store,
        pytest.MonkeyPatch.context() as patch,
    ):
        with network.all[-1].entered():
            proxy = FaultyProxy(store.s3_port, Faults(), host=network.all[-1].address)
        for name, value in (
            store.environment() | {"UNCLIP_SCRATCH": str(folder / "scratch")}
        ).items():
            patch.setenv(name, value)
        keys = store.environment(proxy.endpoint)
        with (
            proxy,
            RayCluster(
                (1, 1, 1),
                network.all[:3],
                SETTINGS | keys | {"UNCLIP_SCRATCH": str(folder / "scratch")},
            ) as cluster,
        ):
            yield Place(folder, network, cluster, keys)


@pytest.fixture(scope="module")
def undisturbed(place: Place) -> Root:
    """Let one run be; return its ROOT."""
    running = place.submit(str(place.folder / "undisturbed"), STAGES[-1])
    out, err = running.communicate(timeout=600)
    assert running.returncode == 0, err
    assert [each["state"] for each in json.loads(out)["stages"]] == ["ran"] * len(STAGES)
    return place.opened(str(place.folder / "undisturbed"))


def begun(place: Place, undisturbed: Root, root: Root, stages: tuple[str, ...]) -> None:
    """Commit in a fresh ROOT what the undisturbed run made of some stages."""
    for each in (made(undisturbed, stage) for stage in stages):
        out = place.folder / "given"
        shutil.copytree(each.local_folder, out, ignore=shutil.ignore_patterns(MANIFEST))
        commits.commit(root, each.stage, each.key, out, each.manifest)


def ended_well(
    place: Place,
    running: "subprocess.Popen[str]",
    is_midway: Callable[[], bool],
    disturb: Callable[[], None],
) -> tuple[list[str], str]:
    """Disturb a run once it is midway and see it end well all the same; return the states of its
    stages and what was shown.
    """
    shown: list[str] = []
    assert running.stderr and running.stdout
    stderr = running.stderr
    reader = threading.Thread(target=lambda: shown.extend(stderr), daemon=True)
    reader.start()
    try:
        limit = time.monotonic() + 300
        while not is_midway():
            assert running.poll() is None and time.monotonic() < limit, (
                f"never midway: {''.join(shown)}"
            )
            time.sleep(0.1)
        disturb()
        assert running.wait(timeout=600) == 0, "".join(shown)
        reader.join()
    finally:
        running.kill()
    assert "Traceback" not in "".join(shown)
    return [each["state"] for each in json.loads(running.stdout.read())["stages"]], "".join(shown)


def disturbed(
    place: Place,
    undisturbed: Root,
    uri: str,
    stage: str,
    is_midway: Callable[[Root], bool],
    disturb: Callable[[Root], None],
) -> str:
    """Run one stage again on the same inputs, disturb it midway, and find the files of the
    undisturbed run; return what was shown.
    """
    root, before = place.opened(uri), STAGES[: STAGES.index(stage)]
    begun(place, undisturbed, root, before)
    until(
        lambda: not place.trainers()
    )  # a node that was cut off may still have one, which is no part of this run
    running = place.submit(uri, stage)
    states, shown = ended_well(place, running, lambda: is_midway(root), lambda: disturb(root))
    assert states == ["current"] * len(before) + ["ran"]
    assert files(root, (*before, stage)) == files(undisturbed, (*before, stage))
    return shown


def trained(place: Place, undisturbed: Root, uri: str, disturb: Callable[[Root], None]) -> str:
    """Train, and disturb it once two machines train and a state lies in mid-training."""

    def is_midway(root: Root) -> bool:
        return 0 < images_seen(root) < IMAGES * 0.6 and len(place.trainers()) == 2

    return disturbed(place, undisturbed, uri, "clip", is_midway, disturb)


def images_seen(root: Root) -> int:
    """Return the images seen by the state that a training would resume from, 0 where there is
    none.
    """
    for key in storage.list_names(root, "work/clip"):
        state = WorkFolder(root, f"clip/{key}").fetch("state.pt")
        if state:
            return int(torch.load(state, weights_only=True)["images_seen"])
    return 0


def finished_parts(root: Root, stage: str) -> int:
    """Return how many parts of a stage that is under way are finished."""
    keys = storage.list_names(root, f"work/{stage}")
    return sum(len(storage.list_names(root, f"work/{stage}/{key}/parts")) for key in keys)


def until(condition: Callable[[], Any], limit_s: float = 240) -> Any:
    limit = time.monotonic() + limit_s
    while not (found := condition()):
        assert time.monotonic() < limit
        time.sleep(0.1)
    return found


def test_the_jobs_process_on_the_head_is_killed(place: Place, undisturbed: Root) -> None:
    def disturb(_: Root) -> None:
        (driver,) = (
            pid for pid in place.head.processes("-m flows.orchestration.ray_job") if is_python(pid)
        )
        os.kill(driver, signal.SIGKILL)

    shown = trained(place, undisturbed, str(place.folder / "driver"), disturb)
    assert "-1: " in shown and "attempt 2 follows" in shown


def is_python(pid: int) -> bool:
    return b"python" in Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")[0]


def test_who_submitted_and_the_head_do_not_see_each_other_for_a_while(
    place: Place, undisturbed: Root
) -> None:
    def disturb(_: Root) -> None:
        place.network.pull(place.submitter)
        time.sleep(CUT_S)
        place.network.plug(place.submitter)

    shown = trained(place, undisturbed, str(place.folder / "submitter"), disturb)
    assert "attempt 2" not in shown


def test_a_node_that_trains_is_cut_off_for_a_while(place: Place, undisturbed: Root) -> None:
    def disturb(_: Root) -> None:
        cut = place.trainers()[-1]
        assert cut is not place.head
        place.network.pull(cut)
        time.sleep(CUT_S)
        place.network.plug(cut)

    trained(place, undisturbed, str(place.folder / "cut"), disturb)


def test_a_node_that_trains_loses_power(place: Place, undisturbed: Root) -> None:
    shown = trained(
        place, undisturbed, str(place.folder / "power"), lambda _: place.lose(place.trainers()[-1])
    )
    assert "it goes on from its last state" in shown and "attempt 2" not in shown


def test_training_into_a_bucket_a_node_loses_power_and_then_the_store_is_away_for_a_while(
    place: Place, undisturbed: Root
) -> None:
    def disturb(root: Root) -> None:
        before = images_seen(root)
        place.lose(place.trainers()[-1])
        until(lambda: images_seen(root) > before)
        place.network.pull(place.outside)
        time.sleep(CUT_S / 2)
        assert place.head.processes("-m flows.orchestration.ray_job"), "it still wants to commit"
        place.network.plug(place.outside)

    shown = trained(place, undisturbed, f"s3://{BUCKET}/power", disturb)
    assert "it goes on from its last state" in shown


def test_embedding_into_a_bucket_a_process_is_killed_and_a_node_loses_power(
    place: Place, undisturbed: Root
) -> None:
    stopped: dict[int, int] = {}

    def is_midway(_: Root) -> bool:
        """Stop a process on each machine while it embeds: a part takes no longer than to look for
        it.
        """
        for machine in (each for each in place.network.all[:3] if each.number not in stopped):
            for pid in machine.processes("ray::_embed_part"):
                os.kill(pid, signal.SIGSTOP)
                if pid in machine.processes("ray::_embed_part"):
                    stopped[machine.number] = pid
                else:
                    os.kill(pid, signal.SIGCONT)
        return len(stopped) == 3

    def disturb(root: Root) -> None:
        assert (
            finished_parts(root, "embed") < made(undisturbed, "embed").manifest["counts"]["out"] - 3
        )
        one, another, lost = place.network.all[:3]
        os.kill(stopped[another.number], signal.SIGKILL)
        place.lose(lost)
        os.kill(stopped[one.number], signal.SIGCONT)

    shown = disturbed(place, undisturbed, f"s3://{BUCKET}/embed", "embed", is_midway, disturb)
    assert "attempt 2" not in shown


def test_downloading_into_a_bucket_a_process_is_killed_and_a_node_loses_power(place: Place) -> None:
    paths = [f"good/{number}.png" for number in range(LISTED)] + [
        f"missing/{number}.png" for number in range(10)
    ]

    def downloading() -> list[tuple[Machine, int]]:
        return [
            (machine, pid)
            for machine in place.network.all[:3]
            for pid in machine.processes("ray::download_shard")
            if is_downloading(pid)
        ]

    with place.outside.entered():
        server = Server(delay_s=0.2, host=place.outside.address)
    with server:
        listed = write_list(
            place.folder / "list.jsonl",
            [{"url": f"{server.base}/{path}", "caption": path} for path in paths],
        )
        settings = [
            sources(listed),
            f"data.images_per_shard={SHARD}",
            "data.threads=2",
            "data.timeout_s=10",
            "data.allow_private=true",
        ]
        settings += ["cluster.ingest_workers=3"]
        roots = [
            place.opened(str(place.folder / "downloaded")),
            place.opened(f"s3://{BUCKET}/downloaded"),
        ]
        alone = place.submit(roots[0].uri, "ingest", *settings)
        assert alone.communicate(timeout=300) and alone.returncode == 0
        server.asked.clear()

        def disturb() -> None:
            (_, victim), (lost, _) = downloading()[1:]
            os.kill(victim, signal.SIGKILL)
            asked = server.asked.total()
            until(lambda: server.asked.total() >= asked + SHARD)
            place.lose(lost)

        running = place.submit(roots[1].uri, "ingest", *settings)
        states, shown = ended_well(
            place,
            running,
            lambda: len(downloading()) == 3 and server.asked.total() >= 3 * SHARD,
            disturb,
        )
        asked = sum(number for path, number in server.asked.items() if path != "/robots.txt")
    assert states == ["ran"] and "attempt 2" not in shown
    expected, found = (made(root, "ingest") for root in roots)
    counts = found.manifest["counts"]
    assert (
        counts == expected.manifest["counts"]
        and counts["out"] == LISTED
        and counts["dropped"] == {"http_404": 10}
    )
    pictures, others = (stored(each.local_folder) for each in (found, expected))
    assert {path: image.tobytes() for path, image in pictures.items()} == {
        path: image.tobytes() for path, image in others.items()
    }
    assert (
        asked <= len(paths) + 2 * SHARD
    )  # what was in the making where a process was killed and power lost
