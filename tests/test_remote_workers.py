"""An ingest spread over a real Ray cluster of two nodes: both download, what comes back equals a local ingest, and a node may die."""

import os
import signal
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from flows.running import run_stage
from infra import storage
from infra.cluster import Cluster, ClusterConfig
from infra.manifests import Committed
from tests.hostile_server import Server
from tests.ray_cluster import RayCluster
from tests.test_ingest import config_for, parent_of, stored, wait_until, write_list
from tests.test_renewal import INGEST, OnlyData

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]


@pytest.fixture(scope="module")
def cluster() -> Iterator[RayCluster]:
    with RayCluster((1, 1)) as running, running.joined():
        yield running


def tree(pid: int) -> set[int]:
    """Return a process and all below it."""
    parents: dict[int, int] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                parents[int(entry.name)] = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
            except OSError:
                continue  # it has just ended
    found = {pid}
    while more := {child for child, parent in parents.items() if parent in found} - found:
        found |= more
    return found


def downloading(cluster: RayCluster, number: int) -> set[int]:
    """Return the download processes of a node."""
    return {pid for pid in tree(cluster.nodes[number].pid) if parent_of(pid)}


def ingested(folder: Path, paths: list[str], server: Server, workers: int, address: str) -> Committed:
    """Run the ingest stage in a ROOT below `folder`; 0 workers download here."""
    rows = [{"url": f"{server.base}/{path}", "caption": path} for path in paths]
    data = config_for(write_list(folder / "list.jsonl", rows), threads=2, images_per_shard=20, timeout_s=5.0)
    config = OnlyData(data=data, cluster=ClusterConfig(address=address, ingest_workers=workers))
    root = storage.open_root(str(folder / f"root-{workers}"))
    with Cluster(config.cluster) as ray:
        return run_stage(INGEST, root, config, {}, ray, lambda line: None).committed


def test_two_nodes_download_what_one_machine_would_and_a_dying_node_loses_and_doubles_nothing(cluster: RayCluster, tmp_path: Path) -> None:
    paths = [f"good/{n}.png" for n in range(150)] + [f"missing/{n}.png" for n in range(150, 160)]
    address = f"127.0.0.1:{cluster.port}"
    before = set(Path(tempfile.gettempdir()).glob("unclip-download-*"))
    with Server(delay_s=0.1) as server:
        alone = ingested(tmp_path, paths, server, 0, address)
        server.asked.clear()
        results: list[Committed] = []
        thread = threading.Thread(target=lambda: results.append(ingested(tmp_path, paths, server, 2, address)))
        thread.start()
        wait_until(lambda: downloading(cluster, 0) and downloading(cluster, 1) and server.asked.total() >= 30, 120)
        both = downloading(cluster, 0) | downloading(cluster, 1)
        victims = tree(cluster.nodes[1].pid) - downloading(cluster, 1)
        assert not any(parent_of(pid) == os.getpid() for pid in both)  # none is ours
        for pid in victims:
            os.kill(pid, signal.SIGKILL)
        thread.join(timeout=200)
        assert results
        asked = server.asked
    counts: dict[str, Any] = results[0].manifest["counts"]
    assert counts == alone.manifest["counts"] and counts["out"] == 150 and counts["dropped"] == {"http_404": 10}
    found, expected = stored(results[0].local()), stored(alone.local())
    assert {name: image.tobytes() for name, image in found.items()} == {name: image.tobytes() for name, image in expected.items()}
    assert sum(number for path, number in asked.items() if path != "/robots.txt") <= len(paths) + 20  # a shard was begun again
    wait_until(lambda: not any(map(parent_of, both)), 30)  # and no download process is left on the node that died
    wait_until(lambda: not set(Path(tempfile.gettempdir()).glob("unclip-download-*")) - before, 30)  # and each takes its folder along
