"""A training that is killed goes on where it was: every sample of an epoch once, the same weights, with any number of workers."""

import itertools
import json
import multiprocessing
import os
import shutil
import signal
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.multiprocessing as mp
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.kept import COUNT, TINY, write_embedded, write_kept, write_tokenizer
from tests.meeting import meeting
from training import embeddings, jobs, soundness
from training.decoder import DecoderConfig
from training.loop import LoopConfig
from training.pictures import read_table
from training.prior import PriorConfig

EPOCHS, BATCH, KILLED_AT = 2, 4, 17
IMAGES = EPOCHS * COUNT
STEPS = IMAGES // BATCH
FOLDERS = ("ingest", "curate", "clip", "embed")
TRAINED: dict[str, LoopConfig] = {
    "clip": TINY.model_copy(update={"precision": "float32"}),
    "prior": PriorConfig(width=32, depth=1, T=50, sampling_steps=4),
    "decoder": DecoderConfig(image_size_px=16, width=16, multiples=(1,), attention_px=(), T=50, sampling_steps=4, dropout=0.1),
}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = write_kept(tmp_path_factory.mktemp("kept"))
    write_embedded(root)
    return root


def attempt(rank: int, workers: int, name: str, root: Path, work: Path, number: int, killed_rank: int | None) -> None:
    """Train in this process as one worker and note every step's samples in `work`; one worker may kill itself in the middle of a step."""
    torch.set_num_threads(1)
    clock = itertools.count()
    time.monotonic = lambda: float(next(clock))  # so that the state is written every few steps, whatever the machine does
    config = TRAINED[name].model_copy(update={"images": IMAGES, "batch_size": BATCH, "state_every_s": 13.0})
    drawn: Callable[..., Any] = embeddings.Captions.draw
    steps = itertools.count(resumed_at(work))

    def draw(self: embeddings.Captions, rows: Tensor, chance: Tensor) -> Any:
        step = next(steps)
        with (work / f"seen-{number}-{rank}.jsonl").open("a") as file:
            file.write(json.dumps([step, rows.tolist()]) + "\n")
        if rank == killed_rank and step == KILLED_AT:
            os.kill(os.getpid(), signal.SIGKILL)
        return drawn(self, rows, chance)

    embeddings.Captions.draw = draw  # type: ignore[method-assign]
    with meeting(rank, workers, work / f"meet-{number}"):
        model, averaged = getattr(jobs, f"fit_{name}")(config, {each: root / each for each in FOLDERS}, work, "cpu")
        states = {"raw": model.state_dict(), "averaged": averaged}
        weights = {f"{kind}.{key}": value.contiguous() for kind, state in states.items() for key, value in state.items()}
        save_file(weights, work / f"{rank}.safetensors")


def resumed_at(work: Path) -> int:
    """Return the step from which the next attempt goes on."""
    state = work / "state.pt"
    return torch.load(state)["images_seen"] // BATCH if state.exists() else 0


def train(workers: int, name: str, root: Path, work: Path, number: int = 0, killed_rank: int | None = None) -> dict[str, Tensor]:
    """Train with that many workers, each a process; return rank 0's weights."""
    if not work.exists():
        work.mkdir()
        write_tokenizer(root, work)
        soundness.settle(read_table(root / "curate" / "keep.parquet", "train"), root / "ingest" / "shards", "stop", work)
    multiprocessing.set_forkserver_preload([__name__])  # imports torch once for all workers of this file
    mp.start_processes(attempt, (workers, name, root, work, number, killed_rank), workers, start_method="forkserver")
    return load_file(work / "0.safetensors")


def killed(workers: int, name: str, root: Path, work: Path, rank: int) -> int:
    """Train until a worker kills itself; return the step from which the next attempt goes on: in the second epoch, before the kill."""
    with pytest.raises((mp.ProcessExitedException, mp.ProcessRaisedException)):  # of two workers, the other's complaint may come first
        train(workers, name, root, work, 0, rank)
    step = resumed_at(work)
    assert COUNT // BATCH < step < KILLED_AT
    return step


def samples(work: Path, number: int, steps: range) -> Counter[int]:
    """Count the samples that an attempt's workers saw in these steps, all of which must be there."""
    seen: Counter[int] = Counter()
    for file in work.glob(f"seen-{number}-*.jsonl"):
        rows = dict(json.loads(line) for line in file.read_text().splitlines())
        seen.update(row for step in steps for row in rows[step])
    return seen


@pytest.mark.slow
@pytest.mark.parametrize("name", TRAINED)
def test_a_killed_training_ends_with_the_weights_of_an_undisturbed_one(name: str, root: Path, tmp_path: Path) -> None:
    whole = train(1, name, root, tmp_path / "whole")
    step = killed(1, name, root, tmp_path / "cut", 0)
    again = train(1, name, root, tmp_path / "cut", 1)
    assert again.keys() == whole.keys() and all(again[key].equal(whole[key]) for key in whole)
    seen = samples(tmp_path / "cut", 0, range(step)) + samples(tmp_path / "cut", 1, range(step, STEPS))
    assert seen == Counter(dict.fromkeys(range(COUNT), EPOCHS))


@pytest.mark.slow
def test_a_lost_worker_costs_nothing_whatever_number_goes_on(root: Path, tmp_path: Path) -> None:
    whole = train(2, "clip", root, tmp_path / "whole")
    step = killed(2, "clip", root, tmp_path / "cut", 1)
    before = samples(tmp_path / "cut", 0, range(step))
    for workers in (2, 1, 4):
        work = tmp_path / f"by-{workers}"
        shutil.copytree(tmp_path / "cut", work)
        again = train(workers, "clip", root, work, 1)
        assert before + samples(work, 1, range(step, STEPS)) == Counter(dict.fromkeys(range(COUNT), EPOCHS))
        for key, value in whole.items():
            torch.testing.assert_close(again[key], value, rtol=0, atol=0 if workers == 2 else 2e-4, msg=f"{workers} workers: {key}")
