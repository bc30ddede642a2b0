"""What a sampler step costs beside the decoder of a recipe, and guidance in one call against two.

    python -m tests.benchmarks.sampler_overhead [--recipe quickstart] [--set KEY=VALUE ...] [--batch
    1 4 16] [--rounds 9] [--json FILE]

The network is the recipe's own decoder, untrained (its time does not depend on its weights). A
sampler's own cost is measured on a network
that costs nothing (it hands out one ready tensor), so that the difference of two large times is not
needed; all are medians over rounds,
taken in turns on one thread. Ends with exit code 1 where a step costs more than 2 % of the
decoder's own time.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from flows.config.run_config import load_recipe
from training.diffusion.noise import generators
from training.diffusion.process import as_denoise
from training.diffusion.samplers import (
    SamplerOptions,
    ancestral,
    ddim,
    ddim_invert,
    dpm_solver,
    guided,
)
from training.models.decoder import Decoder

STEPS = 10
AT_MOST = 0.02
ALONE = ("the decoder", "guidance in two calls", "guidance in one call")


@torch.no_grad()
def measure(decoder: Decoder, batch: int, rounds: int) -> dict[str, float]:
    """Median seconds of a decoder call, of every sampler's own step, and of guidance."""
    schedule, side_px = decoder.schedule, decoder.config.image_size_px
    x, ready = torch.randn(2, batch, 3, side_px, side_px)
    t, own = torch.full((batch,), schedule.T // 2), generators(range(batch))
    z_i, ids = (
        torch.nn.functional.normalize(torch.randn(batch, len(decoder.null_z)), dim=1),
        torch.full((batch, 8), 5),
    )
    told, free_of_it, both = (decoder.guided_denoise(z_i, ids, w) for w in (1.0, 0.0, 3.0))

    def free(x_t: Tensor, t: Tensor) -> Tensor:
        return ready if len(x_t) == batch else ready.repeat(2, 1, 1, 1)

    calls: dict[str, Callable[[], object]] = {
        "the decoder": lambda: told(x, t),
        "ancestral": lambda: ancestral(
            free, x, schedule, STEPS, options=SamplerOptions(generator=own)
        ),
        "ancestral, learned variance": lambda: ancestral(
            lambda x_t, t: (ready, ready),
            x,
            schedule,
            STEPS,
            "learned",
            options=SamplerOptions(generator=own),
        ),
        "DDIM": lambda: ddim(free, x, schedule, STEPS),
        "DDIM, eta = 1": lambda: ddim(
            free, x, schedule, STEPS, eta=1.0, options=SamplerOptions(generator=own)
        ),
        "DDIM inversion": lambda: ddim_invert(free, x, schedule, STEPS),
        "DPM-Solver++(2M)": lambda: dpm_solver(free, x, schedule, STEPS),
        "DDIM, v read and clipped": lambda: ddim(
            as_denoise(free, schedule, "v", clip=1.0), x, schedule, STEPS
        ),
        "DPM-Solver++(2M), guided": lambda: dpm_solver(
            guided(free, 3.0, clip=1.0), x, schedule, STEPS
        ),
        "DDIM, guided, dynamic threshold": lambda: ddim(
            guided(free, 3.0, dynamic_threshold=0.995), x, schedule, STEPS
        ),
        "guidance in two calls": lambda: torch.lerp(free_of_it(x, t), told(x, t), 3.0),  # type: ignore[arg-type]
        "guidance in one call": lambda: both(x, t),
    }
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(1 + rounds):
        for name, call in calls.items():
            started_s = time.perf_counter()
            call()
            times[name].append(time.perf_counter() - started_s)
    return {
        name: statistics.median(values[1:]) / (1 if name in ALONE else STEPS)
        for name, values in times.items()
    }  # [0] warms up


def main() -> int:
    """Measure, print one table a batch size, and return the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--recipe", default="quickstart")
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    config = load_recipe(arguments.recipe, arguments.set)
    decoder = Decoder(
        config.decoder, config.clip.embed_dim, config.tokenizer.vocab_size, config.tokenizer.context
    ).eval()
    parameters, side_px = sum(p.numel() for p in decoder.parameters()), config.decoder.image_size_px
    print(
        f"decoder of {arguments.recipe}: {parameters / 1e6:.1f} M parameters at {side_px} px, one "
        f"thread"
    )
    rows, worst = [], 0.0
    for batch in arguments.batch:
        median = measure(decoder, batch, arguments.rounds)
        rows.append({"batch": batch, "median_s": median})
        print(
            f"\nbatch {batch}: the decoder takes {1e3 * median['the decoder']:.1f} ms; a step's "
            f"own cost"
        )
        for name, own_s in median.items():
            if name not in ALONE:
                # a guided step calls the network on twice the batch
                network_s = median["guidance in one call" if "guided" in name else "the decoder"]
                worst = max(worst, own_s / network_s)
                print(f"  {name:<32}{1e3 * own_s:>8.3f} ms{own_s / network_s:>9.2%}")
        one, two = median["guidance in one call"], median["guidance in two calls"]
        print(
            f"  guidance in one call {1e3 * one:.1f} ms, in two {1e3 * two:.1f} ms: "
            f"{two / one:.2f} times"
        )
    if arguments.json:
        facts = {
            "recipe": arguments.recipe,
            "side_px": side_px,
            "parameters": parameters,
            "rounds": arguments.rounds,
            "rows": rows,
        }
        arguments.json.write_text(json.dumps(facts, indent=1))
    print(
        f"\nthe dearest step adds {worst:.2%} to the decoder's own time; {AT_MOST:.0%} is allowed"
    )
    return int(worst > AT_MOST)


if __name__ == "__main__":
    sys.exit(main())
