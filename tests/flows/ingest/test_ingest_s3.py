"""An ingest whose ROOT is a bucket: shards go there from the tasks, and any machine goes on."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from flows.orchestration.run_stage import run_stage
from infra.compute.cluster import Cluster, ClusterConfig
from infra.errors import DataError
from infra.storage import manifests, store
from infra.storage.manifests import Committed
from infra.storage.scratch import FOLDER_VARIABLE
from tests.flows.ingest.test_ingest import config_for, stored, write_list
from tests.flows.ingest.test_shard_reuse import INGEST, OnlyData, rows
from tests.helpers.hostile_server import Server
from tests.helpers.s3_server import BUCKET, S3Server

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]


@pytest.fixture
def node(tmp_path: Path) -> Iterator[Path]:
    """The scratch folder of a Ray whose tasks reach a bucket."""
    with pytest.MonkeyPatch.context() as patch, S3Server(tmp_path / "s3") as bucket:
        for name, value in bucket.environment().items():
            patch.setenv(name, value)
        patch.setenv(FOLDER_VARIABLE, str(tmp_path / "node"))
        with Cluster(ClusterConfig(num_cpus=2)) as cluster:
            cluster.start()
            yield tmp_path / "node"


def ingest_on(machine: Path, source: dict[str, Any], **changes: Any) -> Committed:
    """Run the ingest stage on a machine with this scratch folder."""
    machine.mkdir(exist_ok=True)
    config = OnlyData(data=config_for(source, retries=0, images_per_shard=10, **changes))
    root = store.open_root(f"s3://{BUCKET}/root", machine)
    with Cluster(config.cluster) as cluster:
        return run_stage(INGEST, root, config, {}, cluster, print).committed


def pictures(committed: Committed) -> set[str]:
    """Return the captions of all images of an ingest."""
    assert manifests.verify(committed) == []
    with committed.files.local_copy("shards/*") as folder:
        return set(stored(folder))


def test_another_machine_goes_on_and_a_later_ingest_copies_inside_the_bucket(
    node: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = [f"good/{n}.png" for n in range(30)] + [f"missing/{n}.png" for n in range(90, 100)]
    with Server() as server:
        source = write_list(tmp_path / "list.jsonl", rows(server, first))
        with pytest.raises(DataError, match="only 30 of 40 URLs became images"):
            ingest_on(tmp_path / "one", source, min_success=0.9)
        assert not list((tmp_path / "one").rglob("*.tar"))
        asked = server.asked.copy()
        before = ingest_on(tmp_path / "another", source, min_success=0.5)
        assert server.asked == asked and before.manifest["counts"]["out"] == 30
        assert pictures(before) == set(first[:30])
        assert not list(node.rglob("*.tar"))  # what the tasks have put is no longer there
        server.asked.clear()
        second = [*first[1:], "good/40.png"]
        source = write_list(tmp_path / "list.jsonl", rows(server, second))
        downloaded: list[str] = []
        download = store.download
        monkeypatch.setattr(
            store,
            "download",
            lambda root, name, *more: downloaded.append(name) or download(root, name, *more),
        )
        after = ingest_on(tmp_path / "third", source)  # nothing is in its cache yet
        monkeypatch.undo()
        assert {path for path in server.asked if path != "/robots.txt"} == {"/good/40.png"}
    assert after.manifest["counts"]["shards_taken_over"] == 4
    assert pictures(after) == set(first[1:30]) | {"good/40.png"}
    assert downloaded and not any(name.endswith(".tar") for name in downloaded)
