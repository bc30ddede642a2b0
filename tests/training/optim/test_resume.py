"""A training that is killed goes on where it was: every sample of an epoch once, the same weights,
with any number of workers.
"""

import itertools
import json
import os
import shutil
import signal
import time
from collections import Counter
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.multiprocessing as mp
from safetensors.torch import load_file, save_file
from torch import Tensor

from infra.storage.work_folder import local_work
from tests.helpers import forked_processes
from tests.helpers.gloo_group import meeting
from tests.helpers.stage_folders import shards_in, training_folders
from tests.helpers.training_folders import COUNT, TINY, write_embedded, write_kept, write_tokenizer
from training.data import shard_check
from training.data.image_reader import read_table
from training.jobs import train as jobs
from training.optim.step import Step
from training.sections.decoder_section import DecoderConfig
from training.sections.loop_section import LoopConfig
from training.sections.prior_section import PriorConfig
from training.sections.upsampler_section import UpsamplerConfig

EPOCHS, BATCH, KILLED_AT = 2, 4, 17
IMAGES = EPOCHS * COUNT
STEPS = IMAGES // BATCH
FOLDERS = ("ingest", "curate", "clip", "embed")
TRAINED: dict[str, LoopConfig] = {
    "clip": TINY.model_copy(update={"precision": "float32"}),
    "prior": PriorConfig(width=32, depth=1, T=50, sampling_steps=4),
    "prior, autoregressive": PriorConfig(
        kind="autoregressive", width=32, depth=1, pca_dims=4, buckets=16, precision="float32"
    ),
    "decoder": DecoderConfig(
        image_size_px=16,
        width=16,
        multiples=(1,),
        attention_px=(),
        T=50,
        sampling_steps=4,
        dropout=0.1,
    ),
    "upsampler": UpsamplerConfig(
        image_size_px=16,
        crop_fraction=1,
        width=16,
        depth=1,
        T=50,
        sampling_steps=4,
        precision="float32",
        adam_eps=1e-4,
        # where gradients begin at nothing, Adam would make whole steps of the last digit, in which
        # numbers of workers differ
    ),
}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = write_kept(tmp_path_factory.mktemp("kept"))
    write_embedded(root)
    return root


def attempt(
    rank: int, workers: int, name: str, root: Path, work: Path, number: int, killed_rank: int | None
) -> None:
    """Train in this process as one worker and note every step's samples in `work`; one worker may
    kill itself in the middle of a step.
    """
    torch.set_num_threads(1)
    clock = itertools.count()
    time.monotonic = lambda: float(
        next(clock)
    )  # so that the state is written every few steps, whatever the machine does
    config = TRAINED[name].model_copy(
        update={"images": IMAGES, "batch_size": BATCH, "state_every_s": 13.0}
    )
    chosen = Step.samples

    def samples(
        self: Step, count: int
    ) -> Tensor:  # asked for the next step as well, where pictures are read ahead
        rows = chosen(self, count)
        with (work / f"seen-{number}-{rank}.jsonl").open("a") as file:
            file.write(json.dumps([self.number, rows.tolist()]) + "\n")
        if rank == killed_rank and self.number == KILLED_AT:
            os.kill(os.getpid(), signal.SIGKILL)
        return rows

    Step.samples = samples  # type: ignore[method-assign]
    with meeting(rank, workers, work / f"meet-{number}"):
        model, averaged = getattr(jobs, f"fit_{name.partition(',')[0]}")(
            config, training_folders(root, work, *FOLDERS), "cpu"
        )
        states = {"raw": model.state_dict(), "averaged": averaged}
        weights = {
            f"{kind}.{key}": value.contiguous()
            for kind, state in states.items()
            for key, value in state.items()
        }
        save_file(weights, work / f"{rank}.safetensors")


def resumed_at(work: Path) -> int:
    """Return the step from which the next attempt goes on."""
    state = work / "state.pt"
    return torch.load(state)["images_seen"] // BATCH if state.exists() else 0


def train(
    workers: int, name: str, root: Path, work: Path, number: int = 0, killed_rank: int | None = None
) -> dict[str, Tensor]:
    """Train with that many workers, each a process; return rank 0's weights."""
    if not work.exists():
        work.mkdir()
        write_tokenizer(root, work)
        shard_check.settle(
            read_table(root / "curate" / "keep.parquet", "train"),
            shards_in(root / "ingest"),
            "stop",
            local_work(work),
        )
    forked_processes.together(attempt, (workers, name, root, work, number, killed_rank), workers)
    return load_file(work / "0.safetensors")


def killed(workers: int, name: str, root: Path, work: Path, rank: int) -> int:
    """Train until a worker kills itself; return the step from which the next attempt goes on: in
    the second epoch, before the kill.
    """
    with pytest.raises(
        (mp.ProcessExitedException, mp.ProcessRaisedException)
    ):  # of two workers, the other's complaint may come first
        train(workers, name, root, work, 0, rank)
    step = resumed_at(work)
    assert COUNT // BATCH < step < KILLED_AT
    return step


def samples(work: Path, number: int, steps: range) -> Counter[int]:
    """Count the samples that an attempt's workers saw in these steps, all of which must be
    there.
    """
    seen: Counter[int] = Counter()
    for file in work.glob(f"seen-{number}-*.jsonl"):
        rows = dict(json.loads(line) for line in file.read_text().splitlines())
        seen.update(row for step in steps for row in rows[step])
    return seen


@pytest.fixture(scope="module")
def undisturbed(
    root: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str, int], tuple[dict[str, Tensor], Path]]:
    """Return what trains a model in one go, once for all tests: gives its weights and its work
    folder.
    """

    @lru_cache
    def trained(name: str, workers: int) -> tuple[dict[str, Tensor], Path]:
        work = tmp_path_factory.mktemp("undisturbed") / "work"
        return train(workers, name, root, work), work

    return trained


def curve(work: Path) -> list[tuple[int, float]]:
    """Return the images seen and the losses that were logged."""
    rows = [json.loads(line) for line in (work / "metrics.jsonl").read_text().splitlines()]
    return [(row["images_seen"], row["loss"]) for row in rows]


@pytest.mark.slow
@pytest.mark.parametrize("name", TRAINED)
def test_a_killed_training_ends_with_the_weights_of_an_undisturbed_one(
    name: str, undisturbed: Any, root: Path, tmp_path: Path
) -> None:
    whole, _ = undisturbed(name, 1)
    step = killed(1, name, root, tmp_path / "cut", 0)
    again = train(1, name, root, tmp_path / "cut", 1)
    assert again.keys() == whole.keys() and all(again[key].equal(whole[key]) for key in whole)
    seen = samples(tmp_path / "cut", 0, range(step)) + samples(
        tmp_path / "cut", 1, range(step, STEPS)
    )
    assert seen == Counter(dict.fromkeys(range(COUNT), EPOCHS))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "numbers"),
    [("clip", (2, 1, 4)), ("prior, autoregressive", (1,)), ("upsampler", (1,))],
    ids=str,
)
def test_a_lost_worker_costs_nothing_whatever_number_goes_on(
    name: str, numbers: tuple[int, ...], undisturbed: Any, root: Path, tmp_path: Path
) -> None:
    whole, _ = undisturbed(name, 2)
    step = killed(2, name, root, tmp_path / "cut", 1)
    before = samples(tmp_path / "cut", 0, range(step))
    for workers in numbers:
        work = tmp_path / f"by-{workers}"
        shutil.copytree(tmp_path / "cut", work)
        again = train(workers, name, root, work, 1)
        assert before + samples(work, 1, range(step, STEPS)) == Counter(
            dict.fromkeys(range(COUNT), EPOCHS)
        )
        for key, value in whole.items():
            torch.testing.assert_close(
                again[key],
                value,
                rtol=0,
                atol=0 if workers == 2 else 2e-4,
                msg=f"{workers} workers: {key}",
            )


@pytest.mark.slow
def test_clips_learning_curve_is_that_of_one_worker(undisturbed: Any) -> None:
    one, two = (curve(undisturbed("clip", workers)[1]) for workers in (1, 2))
    assert [seen for seen, _ in one] == [seen for seen, _ in two] and len(one) > 3
    assert [loss for _, loss in two] == pytest.approx([loss for _, loss in one], rel=1e-4)
    assert one[0][1] > one[-1][1], "a curve that does not fall proves little"
