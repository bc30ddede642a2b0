"""Several workers say what one would: gathered loss, averaged gradients."""

import os
import signal
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from tests.helpers import forked_processes
from tests.helpers.gloo_group import meeting
from training.models.clip import contrastive_loss, sigmoid_loss
from training.optim.collectives import agree, average, average_gradients, gather, world

B, E = 8, 5
CAPTIONS = torch.tensor([3, 1, 4, 1, 5, 1, 2, 6])
"""One stands there three times, with more than one worker."""


class Pair(nn.Module):
    """Two linear towers and a temperature."""

    def __init__(self) -> None:
        super().__init__()
        self.image, self.text = nn.Linear(E, E), nn.Linear(E, E)
        self.logit_scale = nn.Parameter(torch.tensor(1.5))
        self.logit_bias = nn.Parameter(torch.tensor(-2.0))

    def loss(self, x: Tensor, y: Tensor, captions: Tensor) -> Tensor:
        """Both contrastive losses of this worker's rows."""
        image, text = F.normalize(self.image(x), dim=-1), F.normalize(self.text(y), dim=-1)
        sigmoid = sigmoid_loss(image, text, captions, self.logit_scale, self.logit_bias)
        return contrastive_loss(image, text, captions, self.logit_scale) + sigmoid


def prepared() -> tuple[Pair, Tensor, Tensor]:
    torch.manual_seed(3)
    return Pair(), torch.randn(B, E), torch.randn(B, E)


def work(rank: int, workers: int, folder: Path) -> None:
    torch.set_num_threads(1)
    with meeting(rank, workers, folder / "meet"):
        compare(rank, workers, folder)


def compare(rank: int, workers: int, folder: Path) -> None:
    assert world() == (rank, workers)
    model, x, y = prepared()
    mine = slice(rank * B // workers, (rank + 1) * B // workers)
    assert gather(x[mine]).equal(x)
    assert agree(7) and not agree(rank)
    loss = model.loss(x[mine], y[mine], CAPTIONS[mine])
    loss.backward()
    average_gradients(model)
    found = {name: p.grad for name, p in model.named_parameters()}
    torch.save({"loss": average(loss.detach()), **found}, folder / f"{rank}.pt")


@pytest.mark.parametrize("workers", [2, 4])
def test_workers_have_the_loss_and_the_gradients_of_one(workers: int, tmp_path: Path) -> None:
    forked_processes.together(work, (workers, tmp_path), workers)
    model, x, y = prepared()
    loss = model.loss(x, y, CAPTIONS)
    loss.backward()
    expected = {"loss": loss.detach(), **{name: p.grad for name, p in model.named_parameters()}}
    assert "logit_scale" in expected and all(
        float(each.abs().max()) > 1e-4 for each in expected.values()
    )
    for rank in range(workers):
        found = torch.load(tmp_path / f"{rank}.pt")
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            torch.testing.assert_close(
                found[name], value, msg=lambda text, name=name: f"{name}: {text}"
            )


def test_one_worker_says_nothing() -> None:
    x = torch.randn(3, requires_grad=True)
    assert world() == (0, 1) and gather(x) is x and average(x) is x


def lose_the_other(rank: int, folder: Path) -> None:
    """Wait for worker 1, which kills itself; worker 0 writes down for how many seconds it did."""
    torch.set_num_threads(1)
    with meeting(rank, 2, folder / "meet"):  # with torch's own time-out, half an hour
        dist.barrier()
        if rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        started_s = time.monotonic()
        try:
            average(torch.ones(()))
        except RuntimeError:
            (folder / "waited").write_text(str(time.monotonic() - started_s))
            os._exit(0)


def test_a_lost_worker_is_noticed_at_once_however_long_the_others_would_wait(
    tmp_path: Path,
) -> None:
    workers = forked_processes.together(lose_the_other, (tmp_path,), 2, join=False)
    for process in workers.processes:
        process.join(60)
    assert [process.exitcode for process in workers.processes] == [0, -signal.SIGKILL]
    assert float((tmp_path / "waited").read_text()) < 5
