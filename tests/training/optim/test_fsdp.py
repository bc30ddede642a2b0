"""Sharded training is the training with whole copies: by two workers the same losses and weights,
the same state, half the memory.
"""

import itertools
import json
import math
import shutil
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from infra.storage.work_folder import local_work
from tests.helpers import forked_processes
from tests.helpers.gloo_group import meeting
from tests.helpers.stage_folders import shards_in, training_folders
from tests.helpers.training_folders import TINY, write_embedded, write_kept, write_tokenizer
from training.data import shard_check
from training.data.image_reader import read_table
from training.jobs import train as jobs
from training.optim.collectives import local_part
from training.optim.step import Step
from training.sections.clip_section import ClipConfig
from training.sections.decoder_section import DecoderConfig
from training.sections.loop_section import LoopConfig
from training.sections.prior_section import PriorConfig
from training.sections.upsampler_section import UpsamplerConfig

pytestmark = pytest.mark.slow
STEPS, BATCH, STOPPED_AT = 5, 4, 3
FOLDERS = ("ingest", "curate", "clip", "embed")
DECODER: dict[str, Any] = {
    "image_size_px": 16,
    "width": 16,
    "multiples": (1, 2),
    "attention_px": (4,),
    "text_width": 32,
    "T": 50,
    "sampling_steps": 4,
    "dropout": 0.1,
    "learned_variance": True,
    "learning_rate": 3e-3,
}
TRAINED: dict[str, LoopConfig] = {
    "clip": TINY.model_copy(update={"precision": "float32"}),
    "clip, vit in bf16": ClipConfig(
        image_tower="vit",
        image_size_px=16,
        patch_px=8,
        width=32,
        depth=2,
        text_width=32,
        text_depth=2,
        embed_dim=16,
        loss="sigmoid",
    ),
    "clip, in chunks": TINY.model_copy(update={"precision": "float32", "chunk": 1}),
    "prior": PriorConfig(width=32, depth=2, T=50, sampling_steps=4),
    "prior, autoregressive": PriorConfig(
        kind="autoregressive", width=32, depth=2, pca_dims=4, buckets=16, precision="float32"
    ),
    "decoder, by muon": DecoderConfig(**DECODER, optimizer="muon", precision="float32"),
    "decoder, in bf16": DecoderConfig(**DECODER),
    "upsampler": UpsamplerConfig(
        image_size_px=16,
        crop_fraction=1,
        width=16,
        depth=1,
        T=50,
        sampling_steps=4,
        precision="float32",
    ),
}
RESUMED = "decoder, by muon"


def train(
    name: str, root: Path, work: Path, is_sharded: bool, copy_to: Path | None = None
) -> nn.Module:
    """Train as this worker and put the model into ROOT under the work folder's name, as a job does.

    `copy_to` becomes what a kill at the start of step STOPPED_AT would leave of the work folder.
    """
    kind, state_every_s = (
        name.partition(",")[0],
        1.0 if name == RESUMED else 100.0,
    )  # behind the first step and the last; the last alone
    settings = {
        "images": STEPS * BATCH,
        "batch_size": BATCH,
        "state_every_s": state_every_s,
        "shard": is_sharded,
    }
    config = TRAINED[name].model_copy(update=settings)
    folders = training_folders(root, work, *FOLDERS, key=work.name)
    samples = Step.samples

    def seen(step: Step, count: int) -> Tensor:
        if copy_to and step.number == STOPPED_AT and step.rank == 0:
            shutil.copytree(work, copy_to)
        return samples(step, count)

    Step.samples = seen  # type: ignore[method-assign]
    try:
        model, averaged = getattr(jobs, f"fit_{kind}")(config, folders, "cpu")
    finally:
        Step.samples = samples  # type: ignore[method-assign]
    jobs.put_model(kind, model, averaged, config, folders)
    return model  # type: ignore[no-any-return]


def prepare(root: Path, work: Path) -> None:
    """Write what a job's driver leaves in a new work folder."""
    work.mkdir()
    if not work.name.startswith("upsampler"):
        write_tokenizer(root, work)
    shard_check.settle(
        read_table(root / "curate" / "keep.parquet", "train"),
        shards_in(root / "ingest"),
        "stop",
        local_work(work),
    )


def trainings(rank: int, workers: int, root: Path, runs: Path) -> None:
    """Be one of two workers in every training of this file, one after the other."""
    torch.set_num_threads(1)
    clock = itertools.count()
    time.monotonic = lambda: float(
        next(clock)
    )  # so that rows and states are written whatever the machine does
    with meeting(rank, workers, runs / "meet"):
        held = {}
        for name, is_sharded in itertools.product(TRAINED, (False, True)):
            cut = runs / "cut" if name == RESUMED and is_sharded else None
            model = train(name, root, runs / f"{name} {is_sharded}", is_sharded, cut)
            held[f"{name} {is_sharded}"] = sum(local_part(p).numel() for p in model.parameters())
        for after, is_sharded in (("sharded", True), ("unsharded", False)):
            if rank == 0:
                shutil.copytree(runs / "cut", runs / after)
            torch.distributed.barrier()
            train(RESUMED, root, runs / after, is_sharded)
        (runs / f"held-{rank}.json").write_text(json.dumps(held))


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = write_kept(tmp_path_factory.mktemp("kept"))
    write_embedded(root)
    return root


@pytest.fixture(scope="module")
def runs(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    runs = tmp_path_factory.mktemp("runs")
    for name, is_sharded in itertools.product(TRAINED, (False, True)):
        prepare(root, runs / f"{name} {is_sharded}")
    forked_processes.together(trainings, (2, root, runs), 2)
    return runs


def rows_of(work: Path) -> list[tuple[int, float]]:
    rows = [json.loads(line) for line in (work / "metrics.jsonl").read_text().splitlines()]
    return [(row["images_seen"], row["loss"]) for row in rows]


def model_of(root: Path, work: str) -> Path:
    """Return the folder of the model that was trained in that work folder."""
    return training_folders(root, root / "work", key=work).output.folder


def weights_of(model: Path) -> dict[str, Tensor]:
    states = {kind: load_file(model / f"{kind}.safetensors") for kind in ("weights", "raw")}
    return {
        f"{kind}.{key}": value for kind, state in states.items() for key, value in state.items()
    }


def apart(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """Return how far all weights together are from the expected ones, as a share of these.

    Sums are made in another order, and AdamW turns the rounding errors of a gradient that is
    nothing else into whole steps: no single
    weight can be held to much.
    """
    assert found.keys() == expected.keys()
    far = sum(
        float((found[key] - value).double().square().sum()) for key, value in expected.items()
    )
    return math.sqrt(far / sum(float(value.double().square().sum()) for value in expected.values()))


@pytest.mark.parametrize("name", TRAINED)
def test_two_workers_have_the_losses_and_weights_of_whole_copies(
    name: str, root: Path, runs: Path
) -> None:
    copies, parts = runs / f"{name} False", runs / f"{name} True"
    assert [seen for seen, _ in rows_of(copies)] == [seen for seen, _ in rows_of(parts)] == [4, 20]
    is_bf16 = TRAINED[name].precision == "bf16"
    assert [loss for _, loss in rows_of(parts)] == pytest.approx(
        [loss for _, loss in rows_of(copies)], rel=2e-3 if is_bf16 else 5e-4
    )
    weights = (weights_of(model_of(root, work.name)) for work in (parts, copies))
    assert apart(*weights) < (3e-3 if is_bf16 else 1e-4)


@pytest.mark.parametrize("name", TRAINED)
def test_each_worker_holds_its_half(name: str, root: Path, runs: Path) -> None:
    held = [json.loads((runs / f"held-{rank}.json").read_text()) for rank in range(2)]
    whole = held[0][f"{name} False"]
    halves = [each[f"{name} True"] for each in held]
    facts = json.loads((model_of(root, f"{name} True") / "config.json").read_text())
    assert whole == facts["parameters"]
    assert whole <= sum(halves) < 1.05 * whole and max(halves) < 0.6 * whole


def test_a_stopped_sharded_training_goes_on_with_parts_or_whole_copies(
    root: Path, runs: Path
) -> None:
    assert torch.load(runs / "cut" / "state.pt")["images_seen"] == BATCH, (
        "stopped before it could prove anything"
    )
    uninterrupted, sharded, unsharded = (
        weights_of(model_of(root, work)) for work in (f"{RESUMED} True", "sharded", "unsharded")
    )
    assert all(value.equal(sharded[key]) for key, value in uninterrupted.items())
    assert apart(unsharded, uninterrupted) < 5e-4
    assert rows_of(runs / "sharded") == rows_of(runs / f"{RESUMED} True")


def test_states_on_disk_are_the_same_whether_sharded_or_not(runs: Path) -> None:
    copies, parts = (
        torch.load(runs / f"{RESUMED} {is_sharded}" / "state.pt") for is_sharded in (False, True)
    )
    for section in ("model", "ema"):
        assert {name: value.shape for name, value in copies[section].items()} == {
            name: value.shape for name, value in parts[section].items()
        }
    for one, other in zip(copies["optimizers"], parts["optimizers"], strict=True):
        assert (
            one["param_groups"] == other["param_groups"]
            and one["state"].keys() == other["state"].keys()
        )
        for place, facts in one["state"].items():
            for key, value in facts.items():
                torch.testing.assert_close(other["state"][place][key], value, rtol=1e-3, atol=1e-6)


def test_towers_that_are_compiled_are_not_sharded() -> None:
    with pytest.raises(ValueError, match="compile = true and shard = true: choose one"):
        ClipConfig(compile=True, shard=True)
