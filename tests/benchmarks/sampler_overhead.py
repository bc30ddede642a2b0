"""What a sampler step costs beside the network, and guidance in one call against two, at the decoder's size.

    python tests/benchmarks/sampler_overhead.py [--side 32 64] [--batch 1 4] [--rounds 7] [--json FILE]

The network is a plain convolutional stand-in of about 10 million parameters with a U-Net's shape of work (most of it at half and a
quarter of the side). A sampler's own cost is measured on a network that costs nothing (it hands out one ready tensor), so that the
difference of two large times is not needed; both are medians over rounds, taken in turns.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from itertools import pairwise, product
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from training.diffusion import Schedule, as_denoise
from training.noise import generators
from training.samplers import ancestral, ddim, ddim_invert, dpm_solver, guided

STEPS = 10
SCHEDULE = Schedule.cosine()


class StandIn(nn.Module):
    """Six pairs of convolutions at the side, its half and its quarter, down and up."""

    def __init__(self, width: int = 136) -> None:
        super().__init__()
        widths = (3, width, 2 * width, 4 * width)
        self.down = nn.ModuleList(nn.Conv2d(a, b, 3, 1 if a == 3 else 2, 1) for a, b in pairwise(widths))
        self.work = nn.ModuleList(nn.Sequential(*(nn.Conv2d(b, b, 3, 1, 1) for _ in range(2))) for b in widths[1:])
        self.up = nn.ModuleList(nn.Conv2d(b, a, 3, 1, 1) for a, b in pairwise(widths[1:]))
        self.leave = nn.Conv2d(width, 3, 3, 1, 1)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        """x (B, 3, H, W) -> (B, 3, H, W)."""
        kept = []
        for down, work in zip(self.down, self.work, strict=True):
            x = work(F.silu(down(x)))
            kept.append(x)
        for up, skip in zip(reversed(self.up), reversed(kept[:-1]), strict=True):
            x = skip + F.interpolate(F.silu(up(x)), scale_factor=2)
        return torch.tanh(self.leave(x))


@torch.no_grad()
def measure(network: nn.Module, side: int, batch: int, rounds: int) -> dict[str, float]:
    """Median seconds of a network call, of every sampler's own step, and of guidance."""
    x, ready = torch.randn(2, batch, 3, side, side)
    t, own = torch.full((batch,), 500), generators(range(batch))

    def free(x_t: Tensor, t: Tensor) -> Tensor:
        return ready if len(x_t) == batch else ready.repeat(2, 1, 1, 1)

    both = guided(network, 3.0)
    calls: dict[str, Callable[[], object]] = {
        "network": lambda: network(x, t),
        "ancestral": lambda: ancestral(free, x, SCHEDULE, STEPS, generator=own),
        "DDIM": lambda: ddim(free, x, SCHEDULE, STEPS),
        "DDIM, eta = 1": lambda: ddim(free, x, SCHEDULE, STEPS, eta=1.0, generator=own),
        "DDIM inversion": lambda: ddim_invert(free, x, SCHEDULE, STEPS),
        "DPM-Solver++(2M)": lambda: dpm_solver(free, x, SCHEDULE, STEPS),
        "DDIM, v read and clipped": lambda: ddim(as_denoise(free, SCHEDULE, "v", clip=1.0), x, SCHEDULE, STEPS),
        "DDIM, guided": lambda: ddim(guided(free, 3.0), x, SCHEDULE, STEPS),
        "DDIM, guided, dynamic threshold": lambda: ddim(guided(free, 3.0, dynamic_threshold=0.995), x, SCHEDULE, STEPS),
        "two calls": lambda: torch.lerp(network(x, t), network(x, t), 3.0),
        "one call": lambda: both(x, t),
    }
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(1 + rounds):
        for name, call in calls.items():
            started_s = time.perf_counter()
            call()
            times[name].append(time.perf_counter() - started_s)
    single = ("network", "two calls", "one call")
    return {name: statistics.median(values[1:]) / (1 if name in single else STEPS) for name, values in times.items()}  # [0] warms up


def main() -> None:
    """Measure and print one table a size."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--side", type=int, nargs="+", default=[32, 64])
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    network = StandIn().eval()
    print(f"stand-in of {sum(p.numel() for p in network.parameters()) / 1e6:.1f} M parameters, one thread")
    rows = []
    for side, batch in product(arguments.side, arguments.batch):
        median = measure(network, side, batch, arguments.rounds)
        rows.append({"side_px": side, "batch": batch, "median_s": median})
        print(f"\n{side} px, batch {batch}: the network takes {1e3 * median['network']:.1f} ms; a step's own cost")
        for name, own_s in list(median.items())[1:-2]:
            print(f"  {name:<32}{1e3 * own_s:>8.3f} ms{own_s / median['network']:>9.2%}")
        one, two = median["one call"], median["two calls"]
        print(f"  guidance in one call {1e3 * one:.1f} ms, in two {1e3 * two:.1f} ms: {two / one:.2f} times")
    if arguments.json:
        arguments.json.write_text(json.dumps({"rounds": arguments.rounds, "rows": rows}, indent=1))


if __name__ == "__main__":
    main()
