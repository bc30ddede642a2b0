"""A cluster whose nodes share nothing but a bucket: every stage runs in a small scratch folder,
and makes what one process makes in a local folder.

Each of three nodes has a disk of its own of 96 MiB for scratch and another for /tmp, which the
others do not see. The shards take more than 400 MiB.
"""

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cv2
import fsspec
import numpy as np
import pytest

from infra.storage import manifests
from infra.storage import store as storage
from infra.storage.store import Root
from tests.helpers.network_namespaces import Machine, Machines
from tests.helpers.ray_cluster import HERE, RayCluster
from tests.helpers.s3_server import BUCKET, Faults, FaultyProxy, S3Server
from tests.helpers.tiny_run import prepare
from tests.system.test_chaos import SETTINGS

pytestmark = [pytest.mark.chaos, pytest.mark.slow, pytest.mark.timeout(3600)]
MIB = 1 << 20
SCRATCH, SCRATCH_BYTES = "/tmp/unclip-node-scratch", 96 * MIB
DISKS = (("/tmp", 1 << 30), (SCRATCH, SCRATCH_BYTES))
IMAGES, SIDE_PX, SHARD = 2_700, 256, 20
"""A drawing of noise takes 190 kB as PNG, a shard 3.8 MB."""
STAGES = (
    *("ingest", "curate", "clip", "embed", "index", "dedup"),
    *("prior", "decoder", "upsampler", "evaluate"),
)
LIST = f"s3://{BUCKET}/list.jsonl"
COLOURS = {"red": (220, 30, 30), "green": (30, 160, 60), "blue": (40, 60, 220)}
SHAPES = ("disc", "square", "cross", "ring")
LIST_SERVER = """
import functools, http.server, sys
class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_):
        pass
handler = functools.partial(Quiet, directory=sys.argv[2])
http.server.ThreadingHTTPServer((sys.argv[1], 8000), handler).serve_forever()
"""


def draw(folder: Path, count: int) -> None:
    """Draw coloured shapes on noise."""
    folder.mkdir()
    generator = np.random.default_rng(0)
    for number in range(count):
        image = generator.integers(0, 256, (SIDE_PX, SIDE_PX, 3), dtype=np.uint8)
        colour, shape = list(COLOURS)[number % 3], SHAPES[number // 3 % 4]
        rgb, middle = COLOURS[colour][::-1], (SIDE_PX // 2, SIDE_PX // 2)
        if shape in ("disc", "ring"):
            cv2.circle(image, middle, 60 + number % 40, rgb, -1 if shape == "disc" else 20)
        else:
            reach = 50 + number % 40
            low, high = SIDE_PX // 2 - reach, SIDE_PX // 2 + reach
            cv2.rectangle(image, (low, low), (high, high), rgb, -1 if shape == "square" else 12)
        cv2.imwrite(str(folder / f"{number:05}.png"), image)


def caption(number: int) -> str:
    return f"a {list(COLOURS)[number % 3]} {SHAPES[number // 3 % 4]} {number // 12}"


class Place:
    """Three isolated nodes, one machine that submits, one outside with images and a store."""

    def __init__(
        self, folder: Path, network: Machines, keys: dict[str, str], settings: dict[str, str]
    ) -> None:
        self.folder, self.network, self.keys, self.settings = folder, network, keys, settings
        *self.nodes, self.submitter, self.outside = network.all
        self.peaks = [0] * len(self.nodes)
        self.is_over = threading.Event()
        threading.Thread(target=self._measure, daemon=True).start()

    def _measure(self) -> None:
        while not self.is_over.wait(0.05):
            used = [node.used_bytes(SCRATCH) for node in self.nodes]
            self.peaks = [max(pair) for pair in zip(self.peaks, used, strict=True)]

    def unclip(
        self, machine: Machine, command: str, root: str, *more: str
    ) -> "subprocess.Popen[str]":
        """Start a command of unclip on a machine."""
        source = {"kind": "urls", "path": LIST, "style_column": "style"}
        settings = [
            f"data.sources={json.dumps([source]).replace(': ', ' = ')}",
            f"data.image_size_px={SIDE_PX}",
            f"data.images_per_shard={SHARD}",
            "data.allow_private=true",
            "data.robots=false",
            "embed.rows_per_part=200",
            "cluster.upload_code=false",
            "cluster.ingest_workers=3",
            "clip.cache_bytes=0",
        ]
        arguments = [part for setting in settings for part in ("--set", setting)]
        environment = {
            name: value
            for name, value in os.environ.items()
            if not name.startswith(("RAY_", "PREFECT_", "UNCLIP_"))
        }
        scratch = {"UNCLIP_SCRATCH": str(self.folder / "submitter-scratch")}
        return subprocess.Popen(
            [
                *machine.within,
                *(sys.executable, "-m", "flows.cli.main", command),
                *(str(self.folder / "tiny.toml"), "--root", root, "--json", *more, *arguments),
            ],
            cwd=self.folder,
            env=environment
            | self.keys
            | scratch
            | {"PYTHONPATH": str(HERE), "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def submitted(self, root: str) -> list[dict[str, Any]]:
        """Submit a run to a cluster of the nodes; return its stages once it has ended well."""
        with RayCluster((1, 1, 1), self.nodes, self.settings) as cluster:
            self.keys |= cluster.environment
            return ended(self.unclip(self.submitter, "submit", root, "--address", cluster.address))


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    folder = tmp_path_factory.mktemp("isolated")
    prepare(folder)
    draw(folder / "images", IMAGES)
    with (
        Machines(5, 3, DISKS) as network,
        S3Server(folder / "s3") as store,
        pytest.MonkeyPatch.context() as patch,
    ):
        outside = network.all[-1]
        rows = [
            {
                "url": f"http://{outside.address}:8000/{number:05}.png",
                "caption": caption(number),
                "style": "outline" if number % 10 == 0 else "filled",
            }
            for number in range(IMAGES)
        ]
        server = subprocess.Popen(
            [
                *outside.within,
                *(sys.executable, "-c", LIST_SERVER, outside.address, str(folder / "images")),
            ]
        )
        with outside.entered():
            forward = FaultyProxy(store.s3_port, Faults(), host=outside.address)
        for name, value in store.environment().items():
            patch.setenv(name, value)
        patch.setenv("UNCLIP_SCRATCH", str(folder / "test-scratch"))
        with fsspec.open(LIST, "w") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)
        keys = store.environment(forward.endpoint)
        settings = SETTINGS | keys
        settings |= {
            "UNCLIP_SCRATCH": SCRATCH,
            "UNCLIP_SCRATCH_BYTES": str(SCRATCH_BYTES - 4 * MIB),
        }
        try:
            with forward:
                place = Place(folder, network, keys, settings)
                yield place
                place.is_over.set()
        finally:
            server.kill()
            server.wait()


def files(root: Root) -> dict[str, str]:
    """Return the checksum of every committed file, those that hold times apart."""
    checksums = {}
    for stage in STAGES:
        (key,) = storage.list_names(root, stage)
        committed = manifests.find(root, stage, key)
        assert committed and manifests.verify(committed) == []
        checksums |= {
            f"{stage}/{key}/{file['path']}": file["sha256"] for file in committed.manifest["files"]
        }
    timed = ("metrics.jsonl", "report.html", "report.json")
    return {name: checksum for name, checksum in checksums.items() if not name.endswith(timed)}


def ended(process: "subprocess.Popen[str]") -> list[dict[str, Any]]:
    """Wait for a command to end well; return its stages."""
    out, err = process.communicate(timeout=3000)
    assert process.returncode == 0, err[-4000:]
    stages: list[dict[str, Any]] = json.loads(out)["stages"]
    return stages


def test_every_stage_runs_on_nodes_that_share_only_a_bucket(place: Place) -> None:
    started = time.monotonic()
    local = ended(place.unclip(place.outside, "run", str(place.folder / "local")))
    after_local = time.monotonic()
    remote = place.submitted(f"s3://{BUCKET}/isolated")
    print(
        f"local {after_local - started:.0f} s, cluster {time.monotonic() - after_local:.0f} s, "
        f"peaks of scratch {[round(peak / MIB, 1) for peak in place.peaks]} MiB"
    )
    assert [stage["state"] for stage in local] == [stage["state"] for stage in remote]
    in_store = storage.open_root(f"s3://{BUCKET}/isolated", place.folder / "test-scratch")
    shards = sum(
        size for name, size in storage.file_sizes(in_store, "ingest").items() if ".tar" in name
    )
    assert shards > 400 * MIB
    assert all(0 < peak < SCRATCH_BYTES for peak in place.peaks)
    assert files(in_store) == files(storage.open_root(str(place.folder / "local")))
