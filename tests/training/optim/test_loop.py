"""The loop sees every sample once an epoch, resumes exactly where it was, and does not depend on
the number of workers.
"""

import itertools
import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import pytest
import torch
from torch import Tensor, nn

from infra.errors import DataError, StorageError
from infra.storage import store
from infra.storage.work_folder import local_work
from tests.helpers import forked_processes
from tests.helpers.gloo_group import meeting
from tests.infra.storage.test_store import full_disk  # noqa: F401
from training.optim import loop
from training.optim.loop import make_optimizers
from training.optim.step import Step, learning_rate, order
from training.sections.loop_section import LoopConfig

CONFIG = LoopConfig(
    images=400,
    batch_size=8,
    learning_rate=1e-2,
    precision="float32",
    state_every_s=1e-6,
    ema_decay=0.9,
)
X = torch.randn(50, 6, generator=torch.Generator().manual_seed(0))
Y = X.sin().sum(1, keepdim=True)
NO_DROPOUT = CONFIG.model_copy(update={"state_every_s": 100.0})


class StoppedError(Exception):
    """Stands for a kill."""


def train(
    work: Path, stop_at: int | None = None, config: LoopConfig = CONFIG
) -> tuple[nn.Module, dict[str, Tensor]]:
    """Fit a perceptron with dropout, and noise on its input; stop before a step if told to."""
    work.mkdir(exist_ok=True)
    torch.manual_seed(5)
    model = nn.Sequential(
        nn.Linear(6, 16), nn.GELU(), nn.Dropout(0.1 if config is CONFIG else 0.0), nn.Linear(16, 1)
    )

    def loss_of(step: Step) -> Tensor:
        if step.number == stop_at:
            raise StoppedError
        rows = step.samples(len(X))
        return (model(X[rows] + 0.1 * step.normal(1, 6)) - Y[rows]).square().mean()

    return model, loop.run(model, config, loss_of, local_work(work))


def rows_of(work: Path) -> list[tuple[int, float]]:
    rows = [json.loads(line) for line in (work / "metrics.jsonl").read_text().splitlines()]
    return [(row["images_seen"], row["loss"]) for row in rows]


@pytest.fixture
def a_row_every_ten_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """A clock that runs a second at each look, so that what is logged does not depend on the
    machine.
    """
    clock = itertools.count()
    monkeypatch.setattr(time, "monotonic", lambda: float(next(clock)))


@pytest.mark.parametrize("count", [1, 7, 50])
def test_every_epoch_has_every_sample_once(count: int) -> None:
    stream = order(count, 3, 0, 4 * count)
    for epoch in range(4):
        assert sorted(stream[epoch * count : (epoch + 1) * count].tolist()) == list(range(count))
    if count == 50:
        assert not stream[:50].equal(stream[50:100])
        assert not order(50, 4, 0, 50).equal(stream[:50])


def test_the_order_does_not_depend_on_how_it_is_cut() -> None:
    whole = order(11, 0, 0, 60)
    for size in (1, 4, 13, 60):
        assert torch.cat(
            [order(11, 0, first, min(size, 60 - first)) for first in range(0, 60, size)]
        ).equal(whole)


@pytest.mark.parametrize("workers", [1, 2, 4])
def test_workers_share_a_steps_samples_and_noise(workers: int) -> None:
    one = Step(9, 72, 8, 1, 0, 1)
    parts = [Step(9, 72, 8, 1, rank, workers) for rank in range(workers)]
    assert torch.cat([part.samples(11) for part in parts]).equal(one.samples(11))
    assert torch.cat([part.normal(2, 3) for part in parts]).equal(one.normal(2, 3))
    assert torch.cat([part.uniform(2) for part in parts]).equal(one.uniform(2))


def test_noise_differs_between_steps_streams_and_seeds() -> None:
    draws = [
        Step(number, 0, 2, seed, 0, 1).uniform(stream)
        for number in range(100)
        for seed in (0, 1)
        for stream in range(1, 7)
    ]
    assert len({float(draw[0]) for draw in draws}) == len(
        draws
    )  # torch reads 32 bits of a seed: streams had met 38 steps apart


@pytest.mark.usefixtures("a_row_every_ten_steps")
@pytest.mark.parametrize("stops", [[1], [23], [20, 41]])
def test_a_resumed_run_is_the_uninterrupted_one(stops: list[int], tmp_path: Path) -> None:
    model, ema = train(tmp_path / "whole")
    assert [seen for seen, _ in rows_of(tmp_path / "whole")] == [8, 88, 168, 248, 328, 400]
    for stop in stops:
        with pytest.raises(StoppedError):
            train(tmp_path / "cut", stop)
        with (tmp_path / "cut" / "metrics.jsonl").open("a") as file:
            file.write(
                '{"images_seen": 10000, "loss": 1}\n{"images_se'
            )  # a row after the last state, and one that the kill cut
    resumed, resumed_ema = train(tmp_path / "cut")
    for a, b in ((model.state_dict(), resumed.state_dict()), (ema, resumed_ema)):
        assert all(a[name].equal(b[name]) for name in a)
    assert rows_of(tmp_path / "cut") == rows_of(tmp_path / "whole")


def test_a_resumed_run_under_muon_is_the_uninterrupted_one(tmp_path: Path) -> None:
    config = CONFIG.model_copy(update={"optimizer": "muon", "images": 80})
    pictures = X[:, :4].reshape(-1, 1, 2, 2)

    def fitted(work: Path, stop_at: int | None = None) -> dict[str, Tensor]:
        work.mkdir(exist_ok=True)
        torch.manual_seed(5)
        model = nn.Sequential(
            nn.Conv2d(1, 8, 2), nn.GELU(), nn.Conv2d(8, 2, 1), nn.Flatten(), nn.Linear(2, 1)
        )

        def loss_of(step: Step) -> Tensor:
            if step.number == stop_at:
                raise StoppedError
            rows = step.samples(len(X))
            return (model(pictures[rows]) - Y[rows]).square().mean()

        return loop.run(model, config, loss_of, local_work(work))

    whole = fitted(tmp_path / "whole")
    with pytest.raises(StoppedError):
        fitted(tmp_path / "cut", 4)
    resumed = fitted(tmp_path / "cut")
    assert all(whole[name].equal(resumed[name]) for name in whole)


@pytest.mark.usefixtures("a_row_every_ten_steps")
def test_steps_after_the_last_state_are_made_again(tmp_path: Path) -> None:
    rare = CONFIG.model_copy(update={"state_every_s": 40.0})
    model, _ = train(tmp_path / "whole", config=rare)
    with pytest.raises(StoppedError):
        train(tmp_path / "cut", 45, rare)
    at_state = torch.load(tmp_path / "cut" / "state.pt")["images_seen"]
    assert 0 < at_state < 45 * 8
    resumed, _ = train(tmp_path / "cut", config=rare)
    assert all(a.equal(b) for a, b in zip(model.parameters(), resumed.parameters(), strict=True))
    assert rows_of(tmp_path / "cut") == rows_of(tmp_path / "whole")


def lose_half(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def write_text(path: Path) -> None:
    path.write_text("a state")


def rename_a_weight(path: Path) -> None:
    state = torch.load(path)
    state["model"]["another"] = state["model"].pop("0.weight")
    torch.save(state, path)


def split_a_group(path: Path) -> None:
    state = torch.load(path)
    state["optimizers"][0]["param_groups"] *= 3
    torch.save(state, path)


@pytest.mark.parametrize("spoil", [lose_half, write_text, rename_a_weight, split_a_group])
def test_a_state_that_does_not_fit_is_named_and_stays(
    tmp_path: Path, spoil: Callable[[Path], None]
) -> None:
    train(tmp_path)
    spoil(tmp_path / "state.pt")
    before = (tmp_path / "state.pt").read_bytes()
    with pytest.raises(
        DataError, match=r"state\.pt is damaged or from another version of this code .*: delete it"
    ) as caught:
        train(tmp_path)
    assert "\n" not in str(caught.value) and (tmp_path / "state.pt").read_bytes() == before


def test_a_full_disk_is_named_and_leaves_the_state_before_it(full_disk: Path) -> None:  # noqa: F811
    model, work = nn.Linear(6, 2000), full_disk / "work"  # a state of 230 kB
    work.mkdir()

    def loss_of(step: Step) -> Tensor:
        if step.number == 10 and not (full_disk / "fill").exists():
            free_bytes = shutil.disk_usage(full_disk).free
            (full_disk / "fill").write_bytes(bytes(free_bytes - 100_000))
        return model(X[step.samples(len(X))]).square().mean()

    with (
        pytest.raises(StorageError, match=rf"^no space left to write {work}: free some space"),
        store.one_line_errors(work),
    ):
        loop.run(model, CONFIG, loss_of, local_work(work))
    assert torch.load(work / "state.pt")["images_seen"] == 80
    assert not list(work.glob(".*")), "the unfinished state would keep the disk full"
    (full_disk / "fill").write_bytes(b"")
    loop.run(model, CONFIG, loss_of, local_work(work))
    assert torch.load(work / "state.pt")["images_seen"] == 400


@pytest.mark.usefixtures("a_row_every_ten_steps")
def test_progress_is_the_newest_row(tmp_path: Path) -> None:
    with pytest.raises(StoppedError):
        train(tmp_path, 25)
    for images_seen in (168, 400):
        row = json.loads((tmp_path / "progress.json").read_text())
        assert (row["images_seen"], row["loss"]) == rows_of(tmp_path)[-1]
        assert row["images_seen"] == images_seen
        train(tmp_path)


def test_a_finished_run_does_nothing_more(tmp_path: Path) -> None:
    _, ema = train(tmp_path)
    _, again = train(tmp_path, 0)
    assert all(ema[name].equal(again[name]) for name in ema)


def test_the_loss_falls_and_the_averaged_weights_lag(tmp_path: Path) -> None:
    model, ema = train(tmp_path, config=NO_DROPOUT.model_copy(update={"images": 2000}))
    assert rows_of(tmp_path)[-1][1] < 0.3 * float(Y.square().mean())
    assert all(not ema[name].equal(value) for name, value in model.state_dict().items())


def worker(rank: int, workers: int, folder: Path) -> None:
    torch.set_num_threads(1)
    clock = itertools.count()
    time.monotonic = lambda: float(next(clock))
    with meeting(rank, workers, folder / "meet"):
        model, _ = train(folder / "work", config=NO_DROPOUT)
        torch.save(model.state_dict(), folder / f"{rank}.pt")


@pytest.mark.usefixtures("a_row_every_ten_steps")
def test_two_workers_have_the_loss_curve_of_one(tmp_path: Path) -> None:
    model, _ = train(tmp_path / "one", config=NO_DROPOUT)
    forked_processes.together(worker, (2, tmp_path), 2)
    one, two = rows_of(tmp_path / "one"), rows_of(tmp_path / "work")
    assert [seen for seen, _ in one] == [seen for seen, _ in two] and len(one) == 6
    assert [loss for _, loss in two] == pytest.approx([loss for _, loss in one], rel=1e-3)
    states = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    for name, value in model.state_dict().items():
        assert states[0][name].equal(states[1][name])
        torch.testing.assert_close(states[0][name], value, rtol=1e-3, atol=1e-4)


def test_learning_rate_rises_linearly_then_falls_as_a_cosine() -> None:
    config = LoopConfig(images=1000, learning_rate=0.1, warmup=0.2)
    assert [learning_rate(config, seen) for seen in (50, 100, 200)] == pytest.approx(
        [0.025, 0.05, 0.1]
    )
    assert [learning_rate(config, seen) for seen in (400, 600, 1000, 1200)] == pytest.approx(
        [0.0853553, 0.05, 0, 0], abs=1e-6
    )
    assert learning_rate(LoopConfig(images=10, learning_rate=0.1, warmup=0), 0) == 0.1


def test_a_loss_that_is_not_finite_is_an_error_with_a_mend(tmp_path: Path) -> None:
    model = nn.Linear(2, 1)
    with pytest.raises(DataError, match="lower learning_rate"):
        loop.run(
            model,
            CONFIG,
            lambda step: model(torch.ones(1, 2)).sum() * float("nan"),
            local_work(tmp_path),
        )


def test_a_batch_that_workers_cannot_share_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loop, "world", lambda: (0, 3))
    with pytest.raises(DataError, match="batch_size = 8 cannot be divided by 3 workers"):
        train(tmp_path)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_only_matrices_decay(optimizer: Literal["adamw", "muon"]) -> None:
    model = nn.ModuleDict(
        {
            "conv": nn.Conv2d(2, 2, 3),
            "norm": nn.LayerNorm(4),
            "linear": nn.Linear(4, 4),
            "frozen": nn.Linear(2, 2),
        }
    )
    model["frozen"].requires_grad_(False)
    before = {name: value.detach().clone() for name, value in model.named_parameters()}
    optimizers = make_optimizers(
        model, LoopConfig(weight_decay=0.5, learning_rate=0.1, optimizer=optimizer)
    )
    for p in model.parameters():
        if p.requires_grad:
            p.grad = torch.zeros_like(p)
    for each in optimizers:
        each.step()
    for name, value in model.named_parameters():
        decays = value.ndim >= 2 and not name.startswith("frozen")
        torch.testing.assert_close(value.detach(), before[name] * (0.95 if decays else 1))
