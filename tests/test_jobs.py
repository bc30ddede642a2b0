"""The training jobs on a real Ray: from a keep list to the weights of CLIP, prior and decoder, and a killed worker costs nothing."""

import json
import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from flows import curate
from infra.cluster import Cluster, ClusterConfig
from infra.errors import DataError
from tests.test_curate import NO_HELD_OUT, item, write_shard
from training import embed, jobs
from training.clip import ClipConfig
from training.decoder import DecoderConfig
from training.embed import EmbedConfig
from training.generate import Unclip
from training.prior import PriorConfig
from training.tokenizer import TokenizerConfig

COUNT = 24
CLUSTER = ClusterConfig(num_cpus=2, clip_workers=2)
CLIP = ClipConfig(image_size_px=16, width=16, depth=1, text_width=32, text_depth=1, embed_dim=16, images=160, batch_size=8)
PRIOR = PriorConfig(width=32, depth=1, T=50, sampling_steps=4, images=80, batch_size=8)
DECODER = DecoderConfig(image_size_px=16, width=16, multiples=(1,), attention_px=(), T=50, sampling_steps=4, images=80, batch_size=8)
FILES = {"config.json", "weights.safetensors", "raw.safetensors", "tokenizer.json", "metrics.jsonl"}


@pytest.fixture(scope="module")
def cluster() -> Iterator[ClusterConfig]:
    with Cluster(CLUSTER) as cluster:
        cluster.start()
        yield CLUSTER


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write an ingest and a curate folder of a few drawings."""
    root = tmp_path_factory.mktemp("data")
    write_shard(root / "ingest", 0, [item(number) for number in range(COUNT)])
    curate.run(NO_HELD_OUT, root / "ingest", root / "curate")
    return root


def folders(root: Path, name: str) -> tuple[Path, Path]:
    """Make a stage's out and work folders."""
    for kind in ("out", "work"):
        (root / kind / name).mkdir(parents=True)
    return root / "out" / name, root / "work" / name


def test_moved_pictures_keep_their_content_and_let_white_in() -> None:
    pixels = torch.randn(3, 3, 8, 8)
    draw = torch.tensor([[0.5, 0.5], [0.0, 0.5], [0.5, 0.99]])
    still, down, left = jobs.shifted(pixels, draw)
    assert still.equal(pixels[0])
    assert down[:, 2:].equal(pixels[1, :, :-2]) and bool((down[:, :2] == 1).all())
    assert left[:, :, :-2].equal(pixels[2, :, :, 2:]) and bool((left[:, :, -2:] == 1).all())


@pytest.mark.slow
def test_every_model_is_trained_from_a_keep_list(cluster: ClusterConfig, data: Path, tmp_path: Path) -> None:
    ingest, curated = data / "ingest", data / "curate"
    clip, work = folders(tmp_path, "clip")
    counts = jobs.train_clip(TokenizerConfig(vocab_size=280), CLIP, cluster, ingest, curated, clip, work)
    assert (counts["in"], counts["images_seen"]) == (COUNT, CLIP.images) and np.isfinite(counts["loss"])
    embedded, work = folders(tmp_path, "embed")
    assert embed.run(EmbedConfig(rows_per_part=10), cluster, ingest, curated, clip, "key", embedded, work)["out"] == COUNT
    vectors = [np.load(file) for file in sorted((embedded / "img_emb").iterdir())]
    assert [len(part) for part in vectors] == [10, 10, 4]
    assert np.allclose(np.linalg.norm(np.concatenate(vectors).astype(np.float32), axis=1), 1, atol=1e-2)
    assert json.loads((embedded / "facts.json").read_text()) == {"clip_key": "key", "dim": 16, "count": COUNT}
    prior, work = folders(tmp_path, "prior")
    assert jobs.train_prior(PRIOR, cluster, clip, embedded, prior, work)["images_seen"] == PRIOR.images
    decoder, work = folders(tmp_path, "decoder")
    assert jobs.train_decoder(DECODER, cluster, ingest, clip, embedded, decoder, work)["images_seen"] == DECODER.images
    for out in (clip, prior, decoder):
        assert {path.name for path in out.iterdir()} == FILES
    assert Unclip.load(clip, prior, decoder).generate(["thing 1"], count=2).shape == (1, 2, 16, 16, 3)


def train_worker_processes() -> list[int]:
    """Return the pids below this process that run our own training."""
    found = []
    for folder in Path("/proc").iterdir():
        try:
            if folder.name.isdigit() and b"RayTrainWorker" in (folder / "cmdline").read_bytes() and ours(int(folder.name)):
                found.append(int(folder.name))
        except OSError:
            continue
    return found


def ours(pid: int) -> bool:
    """Say whether a process descends from this one."""
    while pid > 1:
        if pid == os.getpid():
            return True
        pid = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    return False


@pytest.mark.slow
def test_a_killed_worker_is_replaced_and_training_ends_where_it_should(cluster: ClusterConfig, data: Path, tmp_path: Path) -> None:
    out, work = folders(tmp_path, "clip")
    config = CLIP.model_copy(update={"images": 4_000, "state_every_s": 0.1})
    killed: list[tuple[int, int]] = []

    def kill_one() -> None:
        until = time.monotonic() + 60
        while not killed and time.monotonic() < until:
            time.sleep(0.05)
            if (work / "state.pt").exists() and (workers := train_worker_processes()):
                os.kill(workers[0], signal.SIGKILL)
                killed.append((workers[0], torch.load(work / "state.pt")["images_seen"]))

    killer = threading.Thread(target=kill_one)
    killer.start()
    counts = jobs.train_clip(TokenizerConfig(vocab_size=280), config, cluster, data / "ingest", data / "curate", out, work)
    killer.join()
    assert killed and killed[0][1] < config.images, "the kill came too late to prove anything"
    assert counts["images_seen"] == config.images
    seen = [json.loads(line)["images_seen"] for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert seen == sorted(set(seen)) and seen[-1] == config.images


@pytest.mark.slow
def test_a_workers_own_error_is_what_the_caller_sees(cluster: ClusterConfig, data: Path, tmp_path: Path) -> None:
    out, work = folders(tmp_path, "clip")
    once = cluster.model_copy(update={"max_failures": 0})
    with pytest.raises(DataError, match="batch_size 9 cannot be shared by 2 workers"):
        jobs.train_clip(
            TokenizerConfig(vocab_size=280), CLIP.model_copy(update={"batch_size": 9}), once, data / "ingest", data / "curate", out, work
        )
