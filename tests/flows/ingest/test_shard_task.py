"""An ingest on two Ray nodes: both download, the result is that of one, and a node may die."""

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from flows.orchestration.run_stage import run_stage
from infra.compute.cluster import Cluster, ClusterConfig
from infra.storage import store
from infra.storage.manifests import Committed
from tests.flows.ingest.test_ingest import (
    config_for,
    is_downloading,
    stored,
    tree,
    wait_until,
    write_list,
)
from tests.flows.ingest.test_shard_reuse import INGEST, OnlyData
from tests.helpers.hostile_server import Server

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]


@pytest.fixture
def nodes() -> Iterator[Any]:
    """Two nodes of one core each, as Ray starts them for its own tests, and below `nodes.two` the
    leader of each.
    """
    from ray.cluster_utils import Cluster as Nodes

    settings = {"num_cpus": 1, "object_store_memory": 100 << 20}
    started = Nodes(initialize_head=True, head_node_args={**settings, "include_dashboard": False})
    started.two = [started.head_node, started.add_node(**settings)]
    yield started
    started.shutdown()


def downloading(node: Any) -> set[int]:
    """Return the processes of a node that make shards: below the workers of its raylet."""
    return set(filter(is_downloading, tree(node.all_processes["raylet"][0].process.pid)))


def ingested(
    folder: Path, paths: list[str], server: Server, workers: int, address: str
) -> Committed:
    """Run the ingest stage in a ROOT below `folder`; without an address on a Ray of its own."""
    rows = [{"url": f"{server.base}/{path}", "caption": path} for path in paths]
    data = config_for(
        write_list(folder / "list.jsonl", rows), threads=2, images_per_shard=20, timeout_s=5.0
    )
    config = OnlyData(data=data, cluster=ClusterConfig(address=address, ingest_workers=workers))
    root = store.open_root(str(folder / f"root-{workers}"))
    with Cluster(config.cluster) as ray:
        return run_stage(INGEST, root, config, {}, ray, lambda line: None).committed


def test_two_nodes_download_what_one_machine_would_and_a_dying_node_loses_and_doubles_nothing(
    nodes: Any, tmp_path: Path
) -> None:
    paths = [f"good/{n}.png" for n in range(150)] + [f"missing/{n}.png" for n in range(150, 160)]
    with Server(delay_s=0.1) as server:
        alone = ingested(tmp_path, paths, server, 0, "")
        server.asked.clear()
        results: list[Committed] = []
        thread = threading.Thread(
            target=lambda: results.append(ingested(tmp_path, paths, server, 2, nodes.address))
        )
        thread.start()
        wait_until(lambda: all(map(downloading, nodes.two)) and server.asked.total() >= 50, 120)
        both = downloading(nodes.two[0]) | downloading(nodes.two[1])
        assert len(both) == 2  # one on each
        nodes.remove_node(nodes.two[1], allow_graceful=False)
        thread.join(timeout=200)
        assert results
        asked = server.asked
    counts: dict[str, Any] = results[0].manifest["counts"]
    assert (
        counts == alone.manifest["counts"]
        and counts["out"] == 150
        and counts["dropped"] == {"http_404": 10}
    )
    found, expected = stored(results[0].local_folder), stored(alone.local_folder)
    assert {name: image.tobytes() for name, image in found.items()} == {
        name: image.tobytes() for name, image in expected.items()
    }
    assert (
        sum(number for path, number in asked.items() if path != "/robots.txt") <= len(paths) + 20
    )  # a shard was begun again
    wait_until(
        lambda: not any(map(is_downloading, both)), 30
    )  # and no download process is left on the node that died
