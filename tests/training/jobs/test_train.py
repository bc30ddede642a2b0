"""The training jobs on a real Ray, with two workers and with one: a kill costs nothing, a worker's
own error is told at once.
"""

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from safetensors.torch import load_file

from infra.compute.cluster import Cluster, ClusterConfig
from infra.console.progress import Progress
from infra.errors import DataError, StorageError
from infra.storage.work_folder import WorkFolder, local_work
from tests.helpers.stage_folders import folders_of
from tests.helpers.training_folders import COUNT, TINY, write_kept, write_tokenizer
from training.data import shard_check
from training.data.image_reader import read_table
from training.jobs import train
from training.models.tokenizer import Tokenizer
from training.sections.tokenizer_section import TokenizerConfig

CLUSTER = ClusterConfig(num_cpus=2, clip_workers=2)
TOKENIZER = TokenizerConfig(vocab_size=280)
ALONE = CLUSTER.model_copy(update={"clip_workers": 1})
LONG = TINY.model_copy(update={"images": 2_400, "state_every_s": 0.1})
DRIVER = """
import sys
from pathlib import Path
from infra.compute.cluster import Cluster
from tests.training.jobs.test_train import ALONE, LONG, TOKENIZER, folders
from training.jobs import train
root, tmp_path = map(Path, sys.argv[1:])
with Cluster(ALONE) as cluster:
    cluster.start()
    train.train_clip(TOKENIZER, LONG, ALONE, folders(root, tmp_path))
"""


@pytest.fixture(scope="module")
def cluster() -> Iterator[ClusterConfig]:
    with Cluster(CLUSTER) as cluster:
        cluster.start()
        yield CLUSTER


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_kept(tmp_path_factory.mktemp("kept"))


@pytest.fixture(scope="module")
def undisturbed(
    cluster: ClusterConfig, root: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """Train CLIP with two workers and nothing in the way; return its folder."""
    stage = folders(root, tmp_path_factory.mktemp("undisturbed"))
    train.train_clip(TOKENIZER, LONG, cluster, stage)
    return stage.output.folder


@pytest.fixture(scope="module")
def by_itself(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Train CLIP in this very process, without Ray; return its work folder, with the model."""
    stage = folders(root, tmp_path_factory.mktemp("by_itself"))
    work = stage.work.folder
    table = read_table(root / "curate" / "keep.parquet", "train")
    captions = table["captions"].to_pylist()
    shard_check.settle(table, stage.shards, LONG.broken_pictures, stage.work)
    Tokenizer.fit((caption for each in captions for caption in each), TOKENIZER).save(
        work / "tokenizer.json"
    )
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    model, averaged = train.fit_clip(LONG, stage, "cpu")
    torch.set_num_threads(threads)
    train.write_model("clip", model, averaged, LONG, work)
    return work


def folders(root: Path, tmp_path: Path) -> train.TrainingFolders:
    """Return the folders of CLIP's training on `root`; its ROOT and its work folder are in
    `tmp_path`.
    """
    stages = {name: root / name for name in ("ingest", "curate")}
    return folders_of(stages, tmp_path / "store", tmp_path / "work")


def prepared(root: Path, tmp_path: Path) -> train.TrainingFolders:
    """Return the folders with what a job's driver leaves in the work folder."""
    stage = folders(root, tmp_path)
    write_tokenizer(root, stage.work.folder)
    table = read_table(root / "curate" / "keep.parquet", "train")
    shard_check.settle(table, stage.shards, "stop", stage.work)
    return stage


def last_row(stage: train.TrainingFolders) -> dict[str, float]:
    """Return the last row of the metrics."""
    rows = stage.work.path("metrics.jsonl").read_text().splitlines()
    return cast(dict[str, float], json.loads(rows[-1]))


def is_same(out: Path, other: Path) -> bool:
    """Say whether two runs ended with the same bits, averaged and raw, and went through the same
    states.
    """
    for file in ("weights.safetensors", "raw.safetensors"):
        a, b = load_file(out / file), load_file(other / file)
        if a.keys() != b.keys() or not all(a[name].equal(b[name]) for name in a):
            return False
    seen = [
        json.loads(line)["images_seen"] for line in (out / "metrics.jsonl").read_text().splitlines()
    ]
    return seen == sorted(set(seen)) and seen[-1] == LONG.images


def test_a_worker_waits_for_the_others_as_long_as_the_cluster_section_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Any] = []

    class Trainer:
        def __init__(self, *_: object, torch_config: Any, **__: object) -> None:
            asked.append(torch_config)

        def fit(self) -> None:
            """Start nothing."""

    monkeypatch.setattr("ray.train.torch.TorchTrainer", Trainer)
    for cluster in (ClusterConfig(), ClusterConfig(collective_timeout_s=7)):
        job = cast(train.Job, {"folders": folders(tmp_path, tmp_path)})
        train._run_group(job, "clip", cluster, 2)
    assert [each.timeout_s for each in asked] == [1800, 7]


def test_pictures_read_ahead_of_the_steps_train_as_held_ones_do_and_waiting_is_logged(
    root: Path, tmp_path: Path
) -> None:
    weights, waiting = [], []
    for name, how in (
        ("held", {}),
        ("read", {"cache_bytes": 0, "ahead_steps": 3, "readers": 2}),
        ("late", {"cache_bytes": 0, "ahead_steps": 0}),
    ):
        stage = prepared(root, tmp_path / name)
        model, _ = train.fit_clip(TINY.model_copy(update=how), stage, "cpu")
        weights.append(model.state_dict())
        waiting.append(last_row(stage)["waiting"])
    assert all(value.equal(each[key]) for each in weights[1:] for key, value in weights[0].items())
    assert waiting[0] == 0 < waiting[2] < 1 and 0 <= waiting[1] < 1


def test_progress_is_that_of_the_row_that_was_published_last(tmp_path: Path) -> None:
    work, over = local_work(tmp_path), threading.Event()
    over.set()
    for seen in (0, 1, 3000):
        if seen:
            work.path("progress.json").write_text(json.dumps({"images_seen": seen, "loss": 1.5}))
        progress = Progress("clip", 3000)
        train._watch(work, progress, over)
        assert progress.done == seen


def test_progress_is_silent_while_the_store_is_away(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def is_away(*_: object) -> None:
        raise StorageError("the store does not answer")

    monkeypatch.setattr(WorkFolder, "fetch", is_away)
    progress, over = Progress("clip", 3000), threading.Event()
    over.set()
    train._watch(local_work(tmp_path), progress, over)
    assert progress.done == 0


def test_moved_pictures_keep_their_content_and_let_white_in() -> None:
    pixels = torch.randn(3, 3, 8, 8)
    draw = torch.tensor([[0.5, 0.5], [0.0, 0.5], [0.5, 0.99]])
    still, down, left = train.shifted(pixels, draw)
    assert still.equal(pixels[0])
    assert down[:, 2:].equal(pixels[1, :, :-2]) and bool((down[:, :2] == 1).all())
    assert left[:, :, :-2].equal(pixels[2, :, :, 2:]) and bool((left[:, :, -2:] == 1).all())


def processes_of(name: bytes) -> list[int]:
    """Return the pids below this process that Ray has given a title with this name in it."""
    found = []
    for folder in Path("/proc").iterdir():
        try:
            if (
                folder.name.isdigit()
                and name in (folder / "cmdline").read_bytes()
                and ours(int(folder.name))
            ):
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


def once_mid_epoch(work: WorkFolder, act: Callable[[], bool], until_s: float = 400) -> int:
    """Do `act` as soon as a state lies in the middle of an epoch; return the images seen by that
    state, 0 if the time is over.
    """
    until = time.monotonic() + until_s
    while time.monotonic() < until:
        time.sleep(0.02)
        state = work.fetch("state.pt")
        if state:
            seen: int = torch.load(state)["images_seen"]
            if seen % COUNT and act():
                return seen
    return 0


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    ("tower", "chunk", "backend"),
    [("vit", 3, "aot_eager"), ("conv", 0, "inductor"), ("vit", 3, "inductor")],
)
def test_compiled_towers_train_as_plain_ones_do(
    tower: str,
    chunk: int,
    backend: str,
    root: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if any(map(shutil.which, ("c++", "g++", "clang++"))) != (backend == "inductor"):
        pytest.skip(
            "torch compiles for a CPU by a C++ compiler: where there is none, tracing alone is "
            "tested, which inductor does as well"
        )
    from torch._dynamo.utils import counters

    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=backend))
    threads = import_module("torch._inductor.config").patch(
        compile_threads=1
    )  # more would be processes that import torch each
    config = TINY.model_copy(
        update={
            "precision": "float32",
            "images": 80,
            "image_tower": tower,
            "width": 32,
            "chunk": chunk,
        }
    )
    losses = []
    for is_compiled in (False, True):
        stage = prepared(root, tmp_path / str(is_compiled))
        section = config.model_copy(update={"compile": is_compiled})
        before = counters["stats"]["unique_graphs"]
        with threads:
            train.fit_clip(section, stage, "cpu")
        assert (counters["stats"]["unique_graphs"] > before) == is_compiled
        losses.append(last_row(stage)["loss"])
    assert losses[1] == pytest.approx(losses[0], rel=1e-2)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("config", "title", "whole"),
    [(CLUSTER, b"RayTrainWorker", "undisturbed"), (ALONE, b"ray::_fit", "by_itself")],
)
def test_a_killed_worker_is_replaced_and_the_weights_are_the_same(
    config: ClusterConfig,
    title: bytes,
    whole: str,
    cluster: ClusterConfig,
    root: Path,
    tmp_path: Path,
    request: pytest.FixtureRequest,
) -> None:
    undisturbed: Path = request.getfixturevalue(whole)
    stage = folders(root, tmp_path)
    out = stage.output.folder
    killed: list[int] = []

    def kill() -> bool:
        found = processes_of(title)
        if found:
            os.kill(found[0], signal.SIGKILL)
        return bool(found)

    killer = threading.Thread(target=lambda: killed.append(once_mid_epoch(stage.work, kill)))
    killer.start()
    counts = train.train_clip(TOKENIZER, LONG, config, stage)
    killer.join()
    assert 0 < killed[0] < LONG.images, "the kill came too late to prove anything"
    assert counts["images_seen"] == LONG.images
    assert is_same(out, undisturbed)


@pytest.mark.slow
def test_a_killed_driver_is_started_again_and_the_weights_are_the_same(
    cluster: ClusterConfig, root: Path, by_itself: Path, tmp_path: Path
) -> None:
    stage = folders(root, tmp_path)
    out = stage.output.folder
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    driver = subprocess.Popen(
        [sys.executable, "-c", DRIVER, str(root), str(tmp_path)],
        env=environment,
        start_new_session=True,
    )

    def kill() -> bool:
        driver.kill()  # the driver alone: its Ray must notice
        return True

    try:
        seen = once_mid_epoch(stage.work, kill)
    finally:
        driver.kill()
        driver.wait()
    assert 0 < seen < LONG.images and not (out / "weights.safetensors").exists()
    train.train_clip(TOKENIZER, LONG, ALONE, folders(root, tmp_path))
    assert is_same(out, by_itself)


@pytest.mark.slow
def test_a_workers_own_error_reaches_the_caller_at_once(
    cluster: ClusterConfig, root: Path, by_itself: Path, tmp_path: Path
) -> None:
    stage = folders(root, tmp_path)
    work = stage.work.folder
    with pytest.raises(DataError, match="batch_size = 9 cannot be divided by 2 workers"):
        odd = TINY.model_copy(update={"batch_size": 9})
        train.train_clip(TOKENIZER, odd, cluster, stage)
    assert len(list((work / "ray").iterdir())) == 1, "a restart would only have met the same error"
    state = torch.load(by_itself / "state.pt")
    state["model"]["logit_scale"].fill_(torch.nan)
    torch.save(state | {"images_seen": LONG.images - 80}, work / "state.pt")
    with pytest.raises(
        DataError, match=f"^the loss is nan after {LONG.images - 72:,} images: lower learning_rate"
    ):
        train.train_clip(TOKENIZER, LONG, ALONE, stage)


def test_a_full_disk_is_no_reason_to_restart_a_worker(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fit_clip(*_: object) -> None:
        try:
            raise OSError(errno.ENOSPC, "No space left on device")
        finally:
            raise RuntimeError("unexpected pos 704 vs 598")  # as torch does, closing its file

    def run_alone(job: train.Job, _: ClusterConfig) -> None:
        starts.append(job["fit"])
        train._fit(job)

    starts: list[str] = []
    monkeypatch.setattr(train, "fit_clip", fit_clip)
    monkeypatch.setattr(train, "_run_alone", run_alone)
    stages = folders_of({}, tmp_path / "store", tmp_path / "work")
    with pytest.raises(StorageError, match=f"^no space left to write {stages.work.folder}: free"):
        train._train("clip", train.fit_clip, TINY, ALONE, 1, stages)
    assert starts == ["fit_clip"]


def test_a_training_that_lost_a_worker_says_so_in_one_line_without_tracebacks() -> None:
    from ray.train.v2.api.exceptions import WorkerGroupError

    story = 'Traceback (most recent call last):\n  File "jobs.py", line 297, in _worker\n    ray.train.report(_fit(job))\n    ^^^^^^^^^'  # noqa: E501
    story += '\n... (Output truncated. See individual worker logs for full details) ...\nibuted/c10d_logger.py", line 83, in wrapper'  # noqa: E501
    error = WorkerGroupError(
        f"[Rank 1 Error Snippet]:\n{story}\nRuntimeError: Connection closed by peer "
        f"[10.77.0.3]:36789",
        {},
    )
    assert train._one_line("clip", error) == (
        "training clip failed: Training failed due to worker errors: [Rank 1 Error Snippet]: "
        "RuntimeError: Connection closed by peer [10.77.0.3]:36789; the log has the full message"
    )
