"""Training steps of prior and decoder beside DALLE2-pytorch: as many parameters, the same batch,
threads and precision, in turns.

    make peers && python -m tests.benchmarks.models_vs_dalle2 [--threads 1] [--rounds 3] [--json
    FILE]

Ours is the real training loop with clipped gradients, averaged weights and its own caption encoder
or token table; DALLE2-pytorch gets
its text encodings ready and keeps no average. Its prior pads captions: to 256 tokens as it comes,
to CLIP's 77, or, as it could be set
up, to the longest caption of all. Our decoder is measured as it comes, folding 2 x 2 pixels into
channels, and without folding; both
without the map of parameters that `layout` adds. Tables of tokens and null texts are not counted.
Figures are medians of rounds. Ends
with 1 where ours as it comes is not 3 times (prior) and 1.5 times (decoder) as fast as theirs as it
comes.
"""

import argparse
import datetime
import json
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from infra.storage.work_folder import local_work
from tests.benchmarks.clip_vs_open_clip import captions
from tests.helpers.peer_environment import PEERS, Peer
from tests.helpers.shortfalls import told
from training.models import decoder as decoders
from training.models import priors
from training.models.decoder import Decoder
from training.models.tokenizer import PAD, Tokenizer
from training.optim import loop
from training.optim.step import Step
from training.sections.clip_section import ClipConfig
from training.sections.decoder_section import DecoderConfig
from training.sections.loop_section import LoopConfig
from training.sections.prior_section import PriorConfig
from training.sections.tokenizer_section import TokenizerConfig

PYTHON = PEERS / "dalle2" / "bin" / "python"
EMBED_DIM, SIDE_PX, SAMPLES = 256, 64, 512
PRIOR_BATCH, DECODER_BATCH = 32, 8
TEXT_LENGTHS = (77, 256)
PROMISED = {"prior": ("256 tokens", 3.0), "decoder": ("as it comes", 1.5)}
PRIOR = {"embed_dim": EMBED_DIM, "depth": 6, "heads": 8}
DECODER = {
    "embed_dim": EMBED_DIM,
    "cond_dim": 128,
    "dim": 64,
    "dim_mults": [1, 2, 4],
    "blocks": 2,
    "text_len": 77,
    "side_px": SIDE_PX,
}
CLIP = ClipConfig(embed_dim=EMBED_DIM)


def prior_of(parameters: int) -> PriorConfig:
    """Return the config of a prior as wide as the embedding whose blocks make up that number
    best.
    """
    options = [PriorConfig(width=EMBED_DIM, depth=depth) for depth in range(1, 33)]
    return min(
        options,
        key=lambda config: abs(without_tables(priors.make(config, EMBED_DIM, 4, 77)) - parameters),
    )


def decoder_of(parameters: int, patch_px: int) -> DecoderConfig:
    """Return the config of the narrowest decoder of at least so many parameters, without counting
    its token table.
    """
    for width in range(16, 1024, 8):
        config = DecoderConfig(
            image_size_px=SIDE_PX,
            patch_px=patch_px,
            width=width,
            multiples=(1, 2, 4),
            depth=2,
            attention_px=(16,),
            layout=False,
            learned_variance=True,
            text_width=EMBED_DIM,
            text_depth=1,
            time_power=1.0,
            parametrisation="eps",
        )
        if decoders.count_parameters(config, CLIP, 4) - 4 * EMBED_DIM >= parameters:
            return config
    raise AssertionError("no width is wide enough")


def without_tables(model: nn.Module) -> int:
    """Count trained parameters without the token tables."""
    return sum(
        p.numel() for name, p in model.named_parameters() if not name.endswith("tokens.weight")
    )


def in_turns(
    model: nn.Module,
    config: LoopConfig,
    loss_of: Callable[[Step], Tensor],
    steps: int,
    rounds: int,
    theirs: dict[str, Callable[[], Any]],
) -> dict[str, float]:
    """Train with our loop; between rounds of steps the peer has its turns. Returns samples/s,
    median, of the rounds after the first.
    """
    taken: dict[str, list[float]] = {name: [] for name in ("ours", *theirs)}
    started_s = time.perf_counter()

    def turns(step: Step) -> Tensor:
        nonlocal started_s
        if step.number % steps == 0:
            taken["ours"].append(time.perf_counter() - started_s)
            for name, work in theirs.items():
                taken[name].append(work())
            started_s = time.perf_counter()
        return loss_of(step)

    images = config.batch_size * steps * (rounds + 2)
    with tempfile.TemporaryDirectory() as folder:
        loop.run(
            model,
            config.model_copy(update={"images": images, "state_every_s": 1e9}),
            turns,
            local_work(Path(folder)),
        )
    return {
        name: config.batch_size * steps / statistics.median(each[-rounds:])
        for name, each in taken.items()
    }


def measure(threads: int, rounds: int, precisions: tuple[str, ...]) -> dict[str, Any]:
    """Measure everything and return the figures, samples a second."""
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    texts = captions(SAMPLES)
    tokenizer = Tokenizer.fit(texts, TokenizerConfig())
    ids = tokenizer(texts)
    longest = ids.shape[1]
    z_i, z_t = (nn.functional.normalize(torch.randn(SAMPLES, EMBED_DIM), dim=1) for _ in range(2))
    images = torch.rand(64, 3, SIDE_PX, SIDE_PX)
    is_word = torch.zeros(SAMPLES, 77, dtype=torch.bool)
    is_word[:, :longest] = ids != PAD
    encodings = (
        torch.randn(SAMPLES, 77, EMBED_DIM) * is_word[..., None]
    )  # zeros are padding to DALLE2-pytorch
    with tempfile.TemporaryDirectory() as folder:
        torch.save(
            {"z_i": z_i, "z_t": z_t, "encodings": encodings, "images": images},
            Path(folder) / "data.pt",
        )
        peer = Peer(PYTHON, "dalle2_rounds.py")
        facts = peer.ask(
            {
                "data": str(Path(folder) / "data.pt"),
                "threads": threads,
                "prior": PRIOR,
                "decoder": DECODER,
                "text_lengths": [longest, *TEXT_LENGTHS],
                "prior_batch": PRIOR_BATCH,
                "decoder_batch": DECODER_BATCH,
            }
        )
    try:
        theirs_without_table = facts["priors"]["77"] - 77 * EMBED_DIM
        section = prior_of(theirs_without_table)
        found: dict[str, Any] = {
            "threads": threads,
            "rounds": rounds,
            "peer": {name: facts[name] for name in ("version", "torch")},
            "longest_caption": longest,
            "batch": {"prior": PRIOR_BATCH, "decoder": DECODER_BATCH},
            "parameters": {
                "prior": {"DALLE2-pytorch": theirs_without_table},
                "decoder": {"DALLE2-pytorch": facts["decoder"]},
            },
            "samples_per_s": {},
        }
        for precision in precisions:
            is_bf16 = precision == "bf16"
            update = {"precision": precision, "batch_size": PRIOR_BATCH}
            prior = priors.make(section, EMBED_DIM, tokenizer.vocab_size, tokenizer.context)
            found["parameters"]["prior"]["ours"] = without_tables(prior)

            def prior_loss(step: Step, prior: priors.AnyPrior = prior) -> Tensor:
                rows = step.samples(SAMPLES)
                return prior.loss(step, z_i[rows], z_t[rows], ids[rows])

            turns = {
                f"{length} tokens": lambda length=length, is_bf16=is_bf16: peer(
                    "prior", 1, length, is_bf16
                )
                for length in (longest, *TEXT_LENGTHS)
            }
            found["samples_per_s"][f"prior {precision}"] = in_turns(
                prior, section.model_copy(update=update), prior_loss, 1, rounds, turns
            )
            for patch_px in (2, 1):
                config = decoder_of(facts["decoder"], patch_px)
                config = config.model_copy(
                    update={"precision": precision, "batch_size": DECODER_BATCH}
                )
                decoder = Decoder(config, EMBED_DIM, tokenizer.vocab_size, tokenizer.context)
                found["parameters"]["decoder"][f"ours, patch_px {patch_px}"] = without_tables(
                    decoder
                )

                def decoder_loss(step: Step, decoder: Decoder = decoder) -> Tensor:
                    rows = step.samples(SAMPLES)
                    return decoder.loss(
                        step, images[rows % len(images)] * 2 - 1, z_i[rows], ids[rows]
                    )

                turn = {"as it comes": lambda is_bf16=is_bf16: peer("draw", 1, is_bf16)}
                name = f"decoder {precision}, patch_px {patch_px}"
                found["samples_per_s"][name] = in_turns(
                    decoder, config, decoder_loss, 1, rounds, turn
                )
    finally:
        peer.stop()
    return found


def missed(samples_per_s: dict[str, dict[str, float]]) -> list[str]:
    """Return what falls short of PROMISED, ours as it comes against theirs as it comes."""
    return [
        f"{name}: {figures['ours'] / figures[theirs]:.2f} times as fast as {theirs}, {times:g} "
        f"are promised"
        for kind, (theirs, times) in PROMISED.items()
        for name, figures in samples_per_s.items()
        if name.startswith(kind)
        and not name.endswith("patch_px 1")
        and figures["ours"] < times * figures[theirs]
    ]


def main() -> int:
    """Print the figures and rows for a table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--precision", choices=("float32", "bf16", "both"), default="both")
    parser.add_argument("--json", type=Path)
    chosen = parser.parse_args()
    if not PYTHON.exists():
        print("skipped: DALLE2-pytorch is not installed beside us, make peers")
        return 0
    precisions = ("float32", "bf16") if chosen.precision == "both" else (chosen.precision,)
    found = measure(chosen.threads, chosen.rounds, precisions)
    print(
        f"{datetime.date.today()}, {platform.processor() or platform.machine()}, "
        f"{found['threads']} thread(s), DALLE2-pytorch "
        f"{found['peer']['version']}, torch {found['peer']['torch']}, medians of "
        f"{found['rounds']} rounds, batches {found['batch']}, "
        f"longest caption {found['longest_caption']} tokens"
    )
    print("parameters: " + json.dumps(found["parameters"]))
    print(
        "\n| training step | ours, samples/s | DALLE2-pytorch, samples/s | ratio "
        "|\n|---|---|---|---|"
    )
    for name, figures in found["samples_per_s"].items():
        for key, value in figures.items():
            if key != "ours":
                print(
                    f"| {name} | {figures['ours']:.2f} | {value:.2f} ({key}) | "
                    f"{figures['ours'] / value:.1f} |"
                )
    if chosen.json:
        chosen.json.write_text(json.dumps(found, indent=1))
    return told(missed(found["samples_per_s"]))


if __name__ == "__main__":
    sys.exit(main())
