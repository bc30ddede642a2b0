"""What is drawn after a given time of training, and how fast, beside diffusers' unCLIP classes on
the same pictures, embeddings and cores.

    python -m tests.benchmarks.quality_vs_diffusers --root ROOT [--seconds 400] [--pictures 128]
    [--threads 1] [--rates 1e-3 2e-3]
        [--rounds 9] [--out DIR] [--json FILE]

ROOT holds a run's ingest, clip and embed stages. Ours are the recipe's [prior] and [decoder];
diffusers' have as many parameters, the same
batches, schedule of the rate, precision, averaging and drops, and get our CLIP's text encodings
ready. They are trained for as long at each
of --rates. Both draw captions of held-out concepts, one seed for each picture: ours as it comes,
text and best of two included; theirs
by the loop of its pipeline in 25 + 25 steps, with the pipeline's own guidance and with that of
ours. Distances are those of
`quality_vs_dalle2`. Seconds for one picture are medians of rounds that alternate; the batch's are
of all pictures, 64 at a time.
Ends with 1 where ours takes more than a third of the time for one picture, or either distance is
higher than the lowest of theirs.
"""

import argparse
import datetime
import json
import platform
import sys
import time
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from flows.config.run_config import RunConfig, load_recipe
from tests.benchmarks.generate_vs_diffusers import AT_MOST, in_turns
from tests.benchmarks.steps_and_quality import BLOCKS, compared
from tests.helpers import equal_time_training
from tests.helpers.diffusers_models import (
    GUIDANCE,
    STEPS,
    Decoder,
    DecoderLoss,
    Diffusers,
    PriorLoss,
    make_prior,
)
from tests.helpers.equal_time_training import Trained
from tests.helpers.shortfalls import told
from tests.peers.timed_training import nearest, train
from training.generation.unclip import BATCH
from training.models import clip as clip_model
from training.models import imagenet_features
from training.models.pixels import to_images, to_pixels

HEAD_WIDTH, GROUPS = 32, 8
Texts = dict[str, Tensor]
"""Ready texts, each value (B, ...): z_t, encodings, is_word."""


def texts_of(z_t: Tensor, encodings: Tensor, spread: float) -> Texts:
    """Scale unit vectors z_t (B, E) and encodings (B, N, E), zero where there is no word, to unit
    variance.
    """
    return {
        "z_t": z_t * z_t.shape[1] ** 0.5,
        "encodings": encodings.float() / spread,
        "is_word": (encodings != 0).any(-1),
    }


class Theirs:
    """diffusers' classes of the sizes of ours, trained at one rate."""

    def __init__(
        self, ours: Trained, data: dict[str, Tensor], config: RunConfig, rate: float
    ) -> None:
        torch.manual_seed(0)
        clip, tokenizer = ours.system.clip, ours.system.tokenizer
        prior_config, decoder_config, wanted = (
            ours.system.prior.config,
            ours.system.decoder.config,
            ours.parameters,
        )
        self.spread = float(data["encodings"][(data["encodings"] != 0).any(-1)].float().std())
        empty = (
            clip_model.embed_texts(clip, tokenizer, [""]),
            equal_time_training.encodings(clip, tokenizer, [""]),
        )
        self.empty = texts_of(*empty, self.spread)
        self.asked = texts_of(data["asked_z_t"], data["asked_encodings"], self.spread)
        texts, z_i = (
            texts_of(data["z_t"], data["encodings"], self.spread),
            data["z_i"] * data["z_i"].shape[1] ** 0.5,
        )
        E, N = z_i.shape[1], tokenizer.context
        heads = max(1, prior_config.width // 64)
        prior = nearest(lambda depth: make_prior(E, N, heads, depth), range(1, 33), wanted["prior"])

        def decoder_of(width: int) -> Decoder:
            widths = [width * multiple for multiple in decoder_config.multiples]
            return Decoder(E, ours.side_px, widths, decoder_config.depth, HEAD_WIDTH, GROUPS)

        decoder = nearest(decoder_of, range(GROUPS, 513, GROUPS), wanted["decoder"])
        self.system = Diffusers(prior, decoder)
        losses = {
            "prior": PriorLoss(
                prior, self.system.prior_scheduler, z_i, self.empty, prior_config.text_drop
            ),
            "decoder": DecoderLoss(
                decoder,
                self.system.scheduler,
                self.empty,
                decoder_config.z_drop,
                decoder_config.text_drop,
            ),
        }

        def batch_of(rows: Tensor) -> dict[str, Tensor]:
            return {"z_i": z_i[rows]} | {name: each[rows] for name, each in texts.items()}

        def pictures_of(rows: Tensor) -> dict[str, Tensor]:
            return {"x_0": to_pixels(data["images"][rows], ours.side_px)} | batch_of(rows)

        self.facts: dict[str, dict[str, float]] = {}
        for name, batches, section in (
            ("prior", batch_of, config.prior),
            ("decoder", pictures_of, config.decoder),
        ):
            bf16 = section.precision == "bf16"
            losses[name], self.facts[name] = train(
                losses[name], batches, len(z_i), ours.seconds[name], section.batch_size, rate, bf16
            )
        self.system = Diffusers(losses["prior"].prior, losses["decoder"].decoder)

    def draw(self, rows: Sequence[int], guidance: tuple[float, float]) -> NDArray[np.uint8]:
        """Draw a picture for each of these prompts, uint8 (B, S, S, 3), from its own seed."""
        parts = []
        for start in range(0, len(rows), BATCH):
            own = rows[start : start + BATCH]
            both = {
                name: torch.cat([self.empty[name].expand_as(each[own]), each[own]])
                for name, each in self.asked.items()
            }
            parts.append(self.system(**both, guidance=guidance, seeds=own))
        return to_images(torch.cat(parts))


def missed(share: float, ours: tuple[float, float], theirs: list[tuple[float, float]]) -> list[str]:
    """Return what is slower than promised, and which of the distances, Fréchet and kernel, is
    higher than the lowest of theirs.
    """
    lines = (
        [f"text to image takes {share:.2f} of diffusers' time, at most {AT_MOST:.2f} is promised"]
        if share > AT_MOST
        else []
    )
    for place, kind in enumerate(("Fréchet", "kernel")):
        lowest = min(each[place] for each in theirs)
        if ours[place] > lowest:
            lines.append(
                f"{kind} distance {ours[place]:.2f}, diffusers {lowest:.2f}: ours is not to be "
                f"higher"
            )
    return lines


def main() -> int:
    """Train all and print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--root", type=Path)
    parser.add_argument("--recipe", default="quickstart")
    parser.add_argument("--seconds", type=float, default=400)
    parser.add_argument("--pictures", type=int, default=128)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rates", type=float, nargs="+", default=[1e-3, 2e-3])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--out", type=Path, help="A folder for a sheet of the pictures.")
    parser.add_argument("--json", type=Path)
    chosen = parser.parse_args()
    network = imagenet_features.efficientnet_lite0()
    if chosen.root is None or network is None:
        print("skipped: needs the feature network and --root with a run's stages")
        return 0
    torch.set_num_threads(chosen.threads)
    config = load_recipe(chosen.recipe)
    ours = equal_time_training.trained(config, chosen.root, chosen.seconds, chosen.pictures)
    system, prompts = ours.system, ours.prompts
    if len(prompts) < 2 * BLOCKS:
        print(f"skipped: {len(prompts)} held-out captions, {2 * BLOCKS} are needed")
        return 0
    data = ours.for_peers()
    places = range(len(prompts))
    guidances = {"its guidance": GUIDANCE, "our guidance": (1.0, system.decoder.config.guidance)}
    started_s = time.perf_counter()
    drawn, batch_s = (
        {"ours": system.generate(prompts, seed=places)[:, 0]},
        {"ours": time.perf_counter() - started_s},
    )
    facts: dict[str, Any] = {"ours": ours.facts}
    for rate in chosen.rates:
        theirs = Theirs(ours, data, config, rate)
        facts[f"diffusers, {rate:g}"] = theirs.facts
        for name, guidance in guidances.items():
            row, started_s = f"diffusers, {rate:g}, {name}", time.perf_counter()
            drawn[row] = theirs.draw(places, guidance)
            batch_s[row] = time.perf_counter() - started_s
    seconds = in_turns(
        {
            "ours": lambda place: system.generate([prompts[place % len(prompts)]], seed=place),
            "diffusers": lambda place: theirs.draw([place % len(prompts)], GUIDANCE),
        },
        chosen.rounds,
    )
    print(
        f"{datetime.date.today()}, {platform.processor() or platform.machine()}, {chosen.threads} "
        f"thread(s), {chosen.seconds:g} s of "
        f"training each on {len(data['z_i']):,} pairs of {ours.side_px} px, "
        f"{len(prompts)} held-out captions, {imagenet_features.LITE_NAME}, "
        f"diffusers {version('diffusers')}, torch {torch.__version__}"
    )
    for name, each in facts.items():
        print(f"{name}: {json.dumps(each)}")
    own_steps = {
        "prior": system.prior.config.sampling_steps,
        "decoder": system.decoder.config.sampling_steps,
    }
    print(
        f"steps: ours {json.dumps(own_steps)}, diffusers {json.dumps(STEPS)}; guidance of prior "
        f"and decoder: {json.dumps(guidances)}"
    )
    seen = {
        name: np.asarray(network(pictures), np.float64)
        for name, pictures in {"real": ours.real, **drawn}.items()
    }
    print(
        "\n| pictures | Fréchet distance | kernel distance x 1000 | ours less this (standard "
        "error) | s a picture, alone | in the batch |"
    )
    print("|---|---|---|---|---|---|")
    found: dict[str, dict[str, Any]] = {}
    for name in drawn:
        reached = equal_time_training.distances_of(seen["real"], seen[name])
        less = compared(seen["real"], seen["ours"], seen[name])
        found[name] = {
            "distances": reached,
            "ours_less_this": 1000 * less["difference"],
            "standard_error": 1000 * less["standard_error"],
            "alone_s": seconds[name.partition(",")[0]],
            "batch_s": batch_s[name] / len(prompts),
        }
        each = found[name]
        apart = (
            "" if name == "ours" else f"{each['ours_less_this']:.2f} ({each['standard_error']:.2f})"
        )
        print(
            f"| {name} | {reached[0]:.2f} | {reached[1]:.2f} | {apart} | {each['alone_s']:.3f} | "
            f"{each['batch_s']:.3f} |"
        )
    share = seconds["ours"] / seconds["diffusers"]
    print(f"\nours takes {share:.3f} of diffusers' time for one picture")
    if chosen.out:
        equal_time_training.write_sheet(
            {"real": ours.real, **drawn}, chosen.out / "quality_vs_diffusers.png"
        )
    if chosen.json:
        chosen.json.write_text(
            json.dumps(
                {"trained": facts, "drawn": found, "guidance": guidances, "share": share}, indent=1
            )
        )
    return told(
        missed(
            share,
            found["ours"]["distances"],
            [each["distances"] for name, each in found.items() if name != "ours"],
        )
    )


if __name__ == "__main__":
    sys.exit(main())
