"""A training whose ROOT is an S3 bucket, which is all that workers and driver share, ends with the
weights of a training in a local folder, though a worker is killed.
"""

import os
import shutil
import signal
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from infra.compute.cluster import Cluster, ClusterConfig
from infra.storage import commits, manifests, store
from infra.storage.manifest_schema import StageFacts
from infra.storage.stage_output import open_output
from infra.storage.work_folder import WorkFolder
from tests.helpers.s3_server import BUCKET, S3Server
from tests.helpers.training_folders import COUNT, write_kept
from tests.training.jobs.test_train import (
    CLUSTER,
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


@pytest.fixture
def cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ClusterConfig]:
    """A Ray whose workers find the bucket and keep their files in a scratch folder of theirs."""
    with S3Server(tmp_path / "s3") as server:
        for name, value in server.environment().items():
            monkeypatch.setenv(name, value)
        monkeypatch.setenv(SCRATCH, str(tmp_path / "scratch"))
        with Cluster(CLUSTER) as cluster:
            cluster.start()
            monkeypatch.setenv(SCRATCH, str(tmp_path / "scratch-of-the-driver"))
            yield CLUSTER


def in_store(kept: Path, copy: Path) -> train.TrainingFolders:
    """Commit the stages of `kept` to the bucket; return the folders of a training that reads them.

    `copy` is a folder for the files on their way.
    """
    root = store.reopen(f"s3://{BUCKET}/root", None)
    facts: StageFacts = {
        "stage_version": 1,
        "sections": {},
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
def test_a_killed_worker_is_replaced_where_only_a_bucket_is_shared_with_the_driver(
    cluster: ClusterConfig, tmp_path: Path
) -> None:
    kept = write_kept(tmp_path / "kept")
    local = folders(kept, tmp_path / "local")
    train.train_clip(TOKENIZER, LONG, cluster, local)

    stage = in_store(kept, tmp_path / "copy")
    killed: list[int] = []

    def kill() -> bool:
        workers = processes_of(b"RayTrainWorker")
        if workers:
            os.kill(workers[0], signal.SIGKILL)
        return bool(workers)

    killer = threading.Thread(target=lambda: killed.append(once_mid_epoch(stage.work, kill)))
    killer.start()
    counts = train.train_clip(TOKENIZER, LONG, cluster, stage)
    killer.join()
    assert 0 < killed[0] < LONG.images, "the kill came too late to prove anything"
    assert counts["images_seen"] == LONG.images
    assert list((tmp_path / "scratch").rglob("state.pt")), "workers have a scratch of their own"
    again = open_output(stage.output.root, "clip", "k")
    assert again == stage.output, "who starts again finds the same output"
    with again.local_copy(*MODEL) as model:
        assert is_same(model, local.output.folder)
    assert train.train_clip(TOKENIZER, LONG, cluster, stage) == counts
