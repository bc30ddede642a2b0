"""Text to a 64 px picture beside diffusers' unCLIP classes: as many parameters, each at its own
default steps, float32, in turns.

    python -m tests.benchmarks.generate_vs_diffusers [--threads 1] [--rounds 3] [--pictures 1]
    [--json FILE]

Theirs is the loop of its UnCLIP pipeline over PriorTransformer, UnCLIPTextProjModel,
UNet2DConditionModel and UnCLIPScheduler, without
super-resolution and with text embeddings ready: 25 and 25 ancestral steps, guidance batched,
captions padded to 77 tokens. Ours is
`Unclip.generate`, text and best of two included: 24 steps of DDIM for z_i and 20 of DPM-Solver++
for the picture, folding 2 x 2 pixels;
a second row does not fold, so that the network does as much work at each step as theirs. Weights
are random: this times, and
`quality_vs_diffusers` tells what trained ones draw. Medians of rounds. Ends with 1 where ours as it
comes takes more than a third of the
time of theirs.
"""

import argparse
import datetime
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from tests.benchmarks.clip_vs_open_clip import captions
from tests.benchmarks.models_vs_dalle2 import (
    EMBED_DIM,
    SIDE_PX,
    decoder_of,
    prior_of,
    without_tables,
)
from tests.helpers import diffusers_models
from tests.helpers.shortfalls import told
from training.generation.unclip import Unclip
from training.models import priors
from training.models.clip import CLIP
from training.models.decoder import Decoder
from training.models.tokenizer import Tokenizer
from training.sections.clip_section import ClipConfig
from training.sections.tokenizer_section import TokenizerConfig

TOKENS = 77
HEADS, DEPTH, WIDTHS, BLOCKS = 4, 7, (64, 128, 256), 2
AT_MOST = 1 / 3


def measure(threads: int, rounds: int, pictures: int) -> dict[str, Any]:
    """Time both in turns; returns seconds for `pictures` pictures."""
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    texts = captions(256)
    tokenizer = Tokenizer.fit(texts, TokenizerConfig())
    clip = (
        CLIP(ClipConfig(embed_dim=EMBED_DIM), tokenizer.vocab_size, tokenizer.context)
        .eval()
        .requires_grad_(False)
    )
    parts = {
        "prior": diffusers_models.make_prior(EMBED_DIM, TOKENS, HEADS, DEPTH),
        "decoder": diffusers_models.Decoder(EMBED_DIM, SIDE_PX, WIDTHS, BLOCKS),
    }
    theirs = diffusers_models.Diffusers(**parts)
    counts: dict[str, Any] = {
        "diffusers": {name: without_tables(part) for name, part in parts.items()}
    }
    prior = priors.make(
        prior_of(counts["diffusers"]["prior"]), EMBED_DIM, tokenizer.vocab_size, tokenizer.context
    ).eval()
    systems: dict[str, Unclip] = {}
    for patch_px in (2, 1):
        config = decoder_of(counts["diffusers"]["decoder"], patch_px)
        decoder = Decoder(config, EMBED_DIM, tokenizer.vocab_size, tokenizer.context).eval()
        name = f"ours, patch_px {patch_px}"
        systems[name] = Unclip(clip, tokenizer, prior, decoder)
        counts[name] = {"prior": without_tables(prior), "decoder": without_tables(decoder)}
    z_t, encodings = (
        torch.randn(2 * pictures, EMBED_DIM),
        torch.randn(2 * pictures, TOKENS, EMBED_DIM),
    )
    is_word = torch.arange(TOKENS).expand(2 * pictures, -1) < 12
    work: dict[str, Callable[[int], Any]] = {
        "diffusers": lambda place: theirs(z_t, encodings, is_word)
    }
    for name, system in systems.items():
        work[name] = lambda place, system=system: system.generate(
            texts[place * pictures : (place + 1) * pictures], seed=place
        )
    seconds = in_turns(work, rounds)
    config = systems["ours, patch_px 2"].decoder.config
    return {
        "threads": threads,
        "rounds": rounds,
        "pictures": pictures,
        "side_px": SIDE_PX,
        "diffusers": version("diffusers"),
        "torch": torch.__version__,
        "parameters": counts,
        "steps": {
            "diffusers": diffusers_models.STEPS,
            "ours": {"prior": prior.config.sampling_steps, "decoder": config.sampling_steps},
        },
        "seconds": seconds,
    }


def in_turns(drawing: dict[str, Callable[[int], Any]], rounds: int) -> dict[str, float]:
    """Return the median of the seconds that each takes, in turns; the first round does not
    count.
    """
    taken: dict[str, list[float]] = {name: [] for name in drawing}
    for place in range(rounds + 1):
        for name, draw in drawing.items():
            started_s = time.perf_counter()
            draw(place)
            taken[name].append(time.perf_counter() - started_s)
    return {name: statistics.median(each[1:]) for name, each in taken.items()}


def missed(seconds: dict[str, float], theirs: float) -> list[str]:
    """Return what takes longer than promised of ours as it comes."""
    share = seconds["ours, patch_px 2"] / theirs
    return (
        [f"text to image takes {share:.2f} of diffusers' time, at most {AT_MOST:.2f} is promised"]
        if share > AT_MOST
        else []
    )


def main() -> int:
    """Print the figures and rows for a table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--pictures", type=int, default=1)
    parser.add_argument("--json", type=Path)
    chosen = parser.parse_args()
    found = measure(chosen.threads, chosen.rounds, chosen.pictures)
    print(
        f"{datetime.date.today()}, {platform.processor() or platform.machine()}, "
        f"{found['threads']} thread(s), diffusers "
        f"{found['diffusers']}, torch {found['torch']}, {found['pictures']} picture(s) of "
        f"{SIDE_PX} px, medians of {found['rounds']} rounds"
    )
    print("parameters: " + json.dumps(found["parameters"]))
    print("steps: " + json.dumps(found["steps"]))
    theirs = found["seconds"].pop("diffusers")
    print("\n| text to image | ours, s | diffusers, s | share |\n|---|---|---|---|")
    for name, seconds in found["seconds"].items():
        print(f"| {name} | {seconds:.2f} | {theirs:.2f} | {seconds / theirs:.2f} |")
    if chosen.json:
        chosen.json.write_text(json.dumps(found, indent=1))
    return told(missed(found["seconds"], theirs))


if __name__ == "__main__":
    sys.exit(main())
