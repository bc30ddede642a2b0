"""Whether the few steps that a trained run draws with lose anything against many: sets of pictures
of the same captions and noise.

    python -m tests.benchmarks.steps_and_quality --root ROOT [--steps 250] [--pictures 128]
    [--threads 1] [--json FILE]

ROOT holds a run's ingest, clip, embed, prior and decoder stages; the newest of each are taken. Both
sets draw as many captions of held-out
concepts from the same seeds, with the run's own steps of prior and decoder and with --steps of each
(at most T), and are held to the real
pictures by the unbiased kernel distance on EfficientNet-Lite0's features. `generate_vs_diffusers`
times the same defaults: with this, at
equal quality. Ends with 1 where few steps are further away than many by more than two standard
errors of that difference (jackknife over
blocks of captions).
"""

import argparse
import datetime
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from indexing.metrics.frechet import kernel_distance
from tests.benchmarks.clip_quality_vs_open_clip import newest
from tests.helpers.shortfalls import told
from tests.helpers.stage_folders import shards_in
from training.data.image_reader import Pictures, read_table
from training.generation.unclip import Unclip
from training.models import imagenet_features

BLOCKS = 16
STAGES = ("ingest", "clip", "embed", "prior", "decoder")


def compared(
    real: NDArray[Any],
    few: NDArray[Any],
    many: NDArray[Any],
    distance: Callable[[NDArray[Any], NDArray[Any]], float] = kernel_distance,
) -> dict[str, float]:
    """Return both distances to the real features (N, D) of the same captions, their difference and
    its standard error.
    """

    def apart(kept: NDArray[np.bool_]) -> float:
        return distance(real[kept], few[kept]) - distance(real[kept], many[kept])

    block = np.arange(len(real)) * BLOCKS // len(real)
    without = np.array([apart(block != each) for each in range(BLOCKS)])
    error = float(np.sqrt((BLOCKS - 1) * without.var()))
    return {
        "few": distance(real, few),
        "many": distance(real, many),
        "difference": apart(np.ones(len(real), bool)),
        "standard_error": error,
    }


def missed(found: dict[str, float]) -> list[str]:
    """Return whether few steps lose more than chance explains."""
    lost, error = found["difference"], found["standard_error"]
    return (
        [
            f"few steps lose {1000 * lost:.2f} of kernel distance x 1000, more than twice "
            f"{1000 * error:.2f}"
        ]
        if lost > 2 * error
        else []
    )


def drawn(model: Unclip, prompts: list[str], steps: int | None) -> tuple[NDArray[np.uint8], float]:
    """Draw each prompt once from its own seed, with the run's own steps or so many; return the
    pictures and the seconds.
    """
    section = model.prior.config
    if steps:
        model.prior.config = section.model_copy(update={"sampling_steps": min(steps, section.T)})
    started_s = time.perf_counter()
    count = min(steps, model.decoder.schedule.T) if steps else None
    pictures = model.generate(prompts, seed=range(len(prompts)), steps=count)[:, 0]
    model.prior.config = section
    return pictures, time.perf_counter() - started_s


def main() -> int:
    """Print both rows."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--root", type=Path)
    parser.add_argument("--steps", type=int, default=250)
    parser.add_argument("--pictures", type=int, default=128)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path)
    chosen = parser.parse_args()
    network = imagenet_features.efficientnet_lite0()
    if chosen.root is None or network is None:
        print("skipped: needs the feature network and --root with a run's stages")
        return 0
    torch.set_num_threads(chosen.threads)
    paths = {name: newest(chosen.root / name) for name in STAGES}
    model = Unclip.load(paths["clip"], paths["prior"], paths["decoder"])
    held = read_table(paths["embed"] / "metadata", "held_out_concept")
    held = held.take(np.random.default_rng(0).permutation(held.num_rows)[: chosen.pictures])
    prompts = held["caption"].to_pylist()
    if len(prompts) < 2 * BLOCKS:
        print(f"skipped: {len(prompts)} held-out captions, {2 * BLOCKS} are needed")
        return 0
    real = Pictures(held, shards_in(paths["ingest"]), model.decoder.config.image_size_px)[
        range(len(prompts))
    ].numpy()
    (few, few_s), (many, many_s) = drawn(model, prompts, None), drawn(model, prompts, chosen.steps)
    found = compared(*(np.asarray(network(each), np.float64) for each in (real, few, many)))
    print(
        f"{datetime.date.today()}, {chosen.threads} thread(s), {len(prompts)} held-out captions, "
        f"{imagenet_features.LITE_NAME}"
    )
    own = f"{model.prior.config.sampling_steps} + {model.decoder.config.sampling_steps}"
    print("\n| steps of prior + decoder | kernel distance x 1000 | seconds |\n|---|---|---|")
    for name, steps, seconds in (
        ("few", own, few_s),
        ("many", f"{chosen.steps} + {chosen.steps}", many_s),
    ):
        print(f"| {steps} | {1000 * found[name]:.2f} | {seconds:.0f} |")
    print(
        f"\ndifference {1000 * found['difference']:.2f}, standard error "
        f"{1000 * found['standard_error']:.2f}"
    )
    if chosen.json:
        chosen.json.write_text(
            json.dumps(
                found | {"seconds": {"few": few_s, "many": many_s}, "pictures": len(prompts)},
                indent=1,
            )
        )
    return told(missed(found))


if __name__ == "__main__":
    sys.exit(main())
