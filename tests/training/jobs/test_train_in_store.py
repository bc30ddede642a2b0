"""A training whose ROOT is an S3 bucket: two nodes that share nothing else, with a killed worker,
end with the weights of a training in a local folder.
"""

import os
import shutil
import signal
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from infra.compute.cluster import Cluster, ClusterConfig
from infra.storage import commits, manifests, store
from infra.storage.stage_output import open_output
from infra.storage.work_folder import WorkFolder
from tests.helpers.s3_server import BUCKET, S3Server
from tests.helpers.training_folders import COUNT, write_kept
from tests.training.jobs.test_train import (
    LONG,
    TOKENIZER,
    folders,
    is_same,
    once_mid_epoch,
    processes_of,
)
from training.jobs import train

SCRATCH = "UNCLIP_SCRATCH"
MODEL = ("weights.safetensors", "raw.safetensors", "metrics.jsonl", "config.json", "tokenizer.json")


@dataclass(frozen=True)
class Nodes:
    """A Ray of two nodes with one core each, its section, and each node's own scratch folder."""

    config: ClusterConfig
    scratch: tuple[Path, Path]


@pytest.fixture
def nodes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Nodes]:
    from ray.cluster_utils import Cluster as RayNodes

    scratch = (tmp_path / "scratch-0", tmp_path / "scratch-1")
    with S3Server(tmp_path / "s3") as server:
        for name, value in server.environment().items():
            monkeypatch.setenv(name, value)
        monkeypatch.setenv(SCRATCH, str(tmp_path / "scratch-driver"))
        settings = [
            {"num_cpus": 1, "object_store_memory": 100 << 20, "env_vars": {SCRATCH: str(folder)}}
            for folder in scratch
        ]
        started = RayNodes(
            initialize_head=True, head_node_args={**settings[0], "include_dashboard": False}
        )
        try:
            started.add_node(**settings[1])
            config = ClusterConfig(address=started.address, clip_workers=2)
            with Cluster(config) as joined:
                joined.start()
                yield Nodes(config, scratch)
        finally:
            started.shutdown()


def in_store(kept: Path, copy: Path) -> train.TrainingFolders:
    """Commit the stages of `kept` to the bucket; return the folders of a training that reads them.

    `copy` is a folder for the files on their way.
    """
    root = store.reopen(f"s3://{BUCKET}/root", None)
    facts: dict[str, Any] = {
        "inputs": {},
        "input_digests": {},
        "config": {},
        "counts": {"in": COUNT, "out": COUNT, "dropped": {}},
        "started": manifests.now(),
    }
    inputs = {}
    for stage in ("ingest", "curate"):
        shutil.copytree(kept / stage, copy / stage)
        inputs[stage] = commits.commit(root, stage, "k", copy / stage, facts).files
    output = open_output(root, "clip", "k")
    return train.TrainingFolders(inputs, output, WorkFolder(root, "clip/k"))


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_killed_worker_is_replaced_on_nodes_that_share_a_bucket_alone(
    nodes: Nodes, tmp_path: Path
) -> None:
    kept = write_kept(tmp_path / "kept")
    local = folders(kept, tmp_path / "local")
    train.train_clip(TOKENIZER, LONG, nodes.config, local)
    assert not any(folder.exists() for folder in nodes.scratch), "nothing was in the store yet"

    stage = in_store(kept, tmp_path / "copy")
    killed: list[int] = []

    def kill() -> bool:
        workers = processes_of(b"RayTrainWorker")
        if len(workers) == 2:
            os.kill(workers[0], signal.SIGKILL)
        return len(workers) == 2

    killer = threading.Thread(target=lambda: killed.append(once_mid_epoch(stage.work, kill)))
    killer.start()
    counts = train.train_clip(TOKENIZER, LONG, nodes.config, stage)
    killer.join()
    assert 0 < killed[0] < LONG.images, "the kill came too late to prove anything"
    assert counts["images_seen"] == LONG.images
    assert all(list(folder.rglob("state.pt")) for folder in nodes.scratch), "a worker on each node"
    again = open_output(stage.output.root, "clip", "k")
    assert again == stage.output, "who starts again finds the same output"
    with again.local_copy(*MODEL) as model:
        assert is_same(model, local.output.folder)
    assert train.train_clip(TOKENIZER, LONG, nodes.config, stage) == counts
