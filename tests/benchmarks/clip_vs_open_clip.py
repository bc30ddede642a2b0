"""CLIP training, zero-shot and tokenisation beside open_clip: the same model, batch, pictures,
captions, threads and precision, in turns.

    make peers && python -m tests.benchmarks.clip_vs_open_clip [--threads 1] [--rounds 4] [--steps
    2] [--json FILE]

Ours is the real training loop with its clipped gradients and averaged weights; open_clip's is its
train_one_epoch without its logging.
open_clip pads texts to 77 tokens as it comes; as it could be set up, to the longest caption of all.
Figures are medians of rounds.
The rows `_shards` are ours reading JPEG pictures of 256 px from tar shards that the page cache has
let go, each picture once, decoded by
readers beside the training threads (on their cores, where there are no others), next to open_clip's
figure from memory. Without turns,
since readers would work on in open_clip's. `_cold`: neither tokenizer has met a word of these texts
before.
"""

import argparse
import hashlib
import io
import json
import os
import runpy
import statistics
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from infra.storage.work_folder import local_work
from tests.helpers.peer_environment import PEERS, Peer
from tests.helpers.stage_folders import shards_in
from training.data.image_reader import Pictures
from training.models import clip as clip_model
from training.models import open_clip_format
from training.models.clip import CLIP
from training.models.tokenizer import Tokenizer
from training.optim import loop
from training.optim.step import Step
from training.sections.clip_section import ClipConfig

PYTHON = PEERS / "open_clip" / "bin" / "python"
SHAPE = {
    "width": 192,
    "depth": 6,
    "patch_px": 8,
    "image_size_px": 64,
    "text_width": 192,
    "text_depth": 6,
    "embed_dim": 192,
}
BATCH, BATCHES = 64, 8
STORED_PX, SHARDS = 256, 4
WORDS = {
    "a": ["a", "the", "one", "two", "an old", "a small", "a bright red", "a young"],
    "b": [
        "man",
        "woman",
        "dog",
        "cat",
        "bus",
        "train",
        "plate of food",
        "child",
        "zebra",
        "kitchen table",
        "surfer",
        "umbrella",
    ],
    "c": [
        "sitting on",
        "standing next to",
        "riding",
        "looking at",
        "in front of",
        "parked beside",
        "holding",
        "flying over",
    ],
    "d": [
        "a wooden bench",
        "the street",
        "a skateboard",
        "some water",
        "a green field",
        "two bicycles",
        "a laptop computer",
    ],
    "e": [
        "",
        "in the rain",
        "at night",
        "near a window",
        "with a hat on",
        "during the day",
        "while people watch",
    ],
}


def captions(count: int) -> list[str]:
    """Draw captions as long as COCO's, about ten words."""
    draw = torch.Generator().manual_seed(0)
    chosen = {
        name: torch.randint(0, len(words), (count,), generator=draw).tolist()
        for name, words in WORDS.items()
    }
    numbers = torch.randint(0, 1000, (count,), generator=draw).tolist()
    return [
        " ".join(WORDS[name][chosen[name][place]] for name in WORDS).strip()
        + (f" number {numbers[place]}" if place % 4 == 0 else "")
        for place in range(count)
    ]


def train(
    config: ClipConfig,
    pixels: Callable[[Step], Tensor],
    ids: list[Tensor],
    peer: Peer,
    steps: int,
    rounds: int,
    contexts: list[int],
) -> dict[str, float]:
    """Train with our loop; between rounds of steps open_clip has its turn. Returns samples/s, ours
    and theirs by context.
    """
    torch.manual_seed(0)
    model = CLIP(config, 49_409, 77)
    taken: dict[str, list[float]] = {name: [] for name in ("ours", *map(str, contexts))}
    started_s = time.perf_counter()

    def loss_of(step: Step) -> Tensor:
        nonlocal started_s
        if step.number % steps == 0:
            taken["ours"].append(time.perf_counter() - started_s)
            for context in contexts:
                taken[str(context)].append(
                    peer("train", steps, context, config.precision == "bf16")
                )
            started_s = time.perf_counter()
        return model.loss(pixels(step), ids[step.number % BATCHES])

    with tempfile.TemporaryDirectory() as folder:
        loop.run(
            model,
            config.model_copy(update={"images": BATCH * steps * (rounds + 2)}),
            loss_of,
            local_work(Path(folder)),
            model.clamp_logit_scale,
        )
    taken["ours"] = taken["ours"][2:]  # the first is none, the second warms up
    return {name: BATCH * steps / statistics.median(each[-rounds:]) for name, each in taken.items()}


def write_shards(folder: Path, count: int) -> pa.Table:
    """Write that many pictures as ingest does, and let go of them; return where they lie."""
    rng, rows = np.random.default_rng(0), []
    for number in range(SHARDS):
        with tarfile.open(folder / f"{number:05d}.tar", "w") as tar:
            for place in range(count // SHARDS):
                rough = rng.integers(0, 256, (STORED_PX // 8, STORED_PX // 8, 3), np.uint8)
                data = cv2.imencode(
                    ".jpg", cv2.resize(rough, (STORED_PX, STORED_PX), interpolation=cv2.INTER_CUBIC)
                )[1].tobytes()
                member = tarfile.TarInfo(f"{number:05d}{place:04d}.jpg")
                member.size = len(data)
                row = {
                    "shard": f"{number:05d}.tar",
                    "member": member.name,
                    "offset": tar.offset + tarfile.BLOCKSIZE,
                }
                rows.append(
                    row | {"size_bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
                )
                tar.addfile(member, io.BytesIO(data))
        with (folder / f"{number:05d}.tar").open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    return pa.Table.from_pylist(rows)


def from_shards(
    config: ClipConfig, ids: list[Tensor], peer: Peer, steps: int, rounds: int
) -> tuple[float, float]:
    """Train with pictures from cold shards; return our samples/s and the share of the time in which
    a step waited for its pictures.
    """
    with tempfile.TemporaryDirectory() as name:
        count = BATCH * (steps * (rounds + 2) + config.ahead_steps)
        shards = Path(name) / "shards"
        shards.mkdir()
        pictures = Pictures(
            write_shards(shards, count),
            shards_in(Path(name)),
            config.image_size_px,
            readers=config.readers,
            cache_bytes=0,
        )

        def read(step: Step) -> Tensor:
            squares = pictures[step.samples(len(pictures))]
            for later in range(step.number + 1, step.number + 1 + config.ahead_steps):
                pictures.read_ahead(
                    Step(later, later * BATCH, BATCH, step.seed, 0, 1).samples(len(pictures))
                )
            return clip_model.to_pixels(squares, config.image_size_px)

        started_s = time.perf_counter()
        rate = train(config, read, ids, peer, steps, rounds, [])["ours"]
        return rate, pictures.waited_s / (time.perf_counter() - started_s)


def zero_shot_prompts(package: Path, count: int) -> list[str]:
    """Return ImageNet's 1,000 class names in OpenAI's templates, as open_clip has them: texts that
    nobody made for this benchmark.
    """
    told = runpy.run_path(str(package / "zero_shot_metadata.py"))
    prompts = [
        template(name)
        for template in told["OPENAI_IMAGENET_TEMPLATES"]
        for name in told["IMAGENET_CLASSNAMES"]
    ]
    return prompts[:count]


def in_turns(rounds: int, ours: Any, theirs: dict[str, Any]) -> dict[str, float]:
    """Return the median seconds of both sides' rounds, the first one left out."""
    taken: dict[str, list[float]] = {name: [] for name in ("ours", *theirs)}
    for _ in range(rounds + 1):
        started_s = time.perf_counter()
        ours()
        taken["ours"].append(time.perf_counter() - started_s)
        for name, work in theirs.items():
            taken[name].append(work())
    return {name: statistics.median(each[1:]) for name, each in taken.items()}


def measure(threads: int, steps: int, rounds: int) -> dict[str, Any]:
    """Measure everything and return the figures, in samples, pictures and texts a second."""
    torch.set_num_threads(threads)
    import importlib.metadata

    texts = captions(BATCH * BATCHES)
    merges = next(
        (PYTHON.parent.parent / "lib").glob(
            "python*/site-packages/open_clip/bpe_simple_vocab_16e6.txt.gz"
        )
    )
    tokenizer = Tokenizer.from_merges(merges)
    ids = [tokenizer(texts[place * BATCH : (place + 1) * BATCH]) for place in range(BATCHES)]
    longest = max(each.shape[1] for each in ids)
    images = torch.randint(
        0,
        256,
        (BATCHES, BATCH, 64, 64, 3),
        dtype=torch.uint8,
        generator=torch.Generator().manual_seed(1),
    )
    pixels = torch.stack([clip_model.to_pixels(each, 64) for each in images])
    config = ClipConfig(
        image_tower="vit",
        batch_size=BATCH,
        learning_rate=1e-4,
        state_every_s=1e9,
        warmup=0.1,
        **SHAPE,
    )  # type: ignore[arg-type]
    told = open_clip_format.to_config(CLIP(config, 49_409, 77))["model_cfg"]
    with tempfile.TemporaryDirectory() as folder:
        padded = torch.zeros(BATCHES, BATCH, 77, dtype=torch.long)
        for place, each in enumerate(ids):
            padded[place, :, : each.shape[1]] = open_clip_format.to_their_ids(each, 49_409)
        torch.save(
            {"images": (pixels * 0.5 + 0.5 - 0.5) / 0.25, "ids": padded}, Path(folder) / "data.pt"
        )
        peer = Peer(PYTHON, "open_clip_rounds.py")
        facts = peer.ask(
            {
                "config": told,
                "data": str(Path(folder) / "data.pt"),
                "threads": threads,
                "contexts": [77, longest],
            }
        )
    found: dict[str, Any] = {
        "threads": threads,
        "torch": torch.__version__,
        "peer": facts,
        "batch": BATCH,
        "tokens": {
            "mean": float(sum(int((each != 0).sum()) for each in ids)) / len(texts),
            "longest": longest,
        },
    }
    for precision in ("float32", "bf16"):
        section = config.model_copy(update={"precision": precision})
        held = train(
            section,
            lambda step: pixels[step.number % BATCHES],
            ids,
            peer,
            steps,
            rounds,
            [77, longest],
        )
        rate, found[f"waiting_{precision}"] = from_shards(section, ids, peer, steps, rounds)
        found |= {f"train_{precision}": held, f"train_{precision}_shards": held | {"ours": rate}}
    torch.manual_seed(0)
    model = CLIP(config, 49_409, 77).eval()
    weights = torch.nn.functional.normalize(torch.randn(192, 1000), dim=0)

    def classify(bf16: bool) -> None:
        with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            for each in pixels[:4]:
                (100.0 * model.encode_image(each) @ weights).topk(5, 1)

    for precision in ("float32", "bf16"):
        is_bf16 = precision == "bf16"
        seconds = in_turns(
            rounds,
            lambda is_bf16=is_bf16: classify(is_bf16),
            {"theirs": lambda is_bf16=is_bf16: peer("zero_shot", 4, is_bf16)},
        )
        found[f"zero_shot_{precision}"] = {name: 4 * BATCH / each for name, each in seconds.items()}
    names = captions(256)
    seconds = in_turns(
        rounds,
        lambda: clip_model.embed_texts(model, tokenizer, names),
        {
            str(context): lambda context=context: peer("classifier", names, context)
            for context in (77, longest)
        },
    )
    found["classifier"] = {name: len(names) / each for name, each in seconds.items()}
    many = captions(20_000)
    prompts = zero_shot_prompts(merges.parent, len(many))
    for name, texts, is_cold in (
        ("captions", many, False),
        ("prompts", prompts, False),
        ("prompts_cold", prompts, True),
    ):
        fresh = [Tokenizer.from_merges(merges) if is_cold else tokenizer for _ in range(rounds + 1)]
        seconds = in_turns(
            rounds,
            lambda texts=texts, fresh=fresh: fresh.pop()(texts),
            {"theirs": lambda texts=texts, is_cold=is_cold: peer("tokens", texts, is_cold)},
        )
        found[f"tokenizer_{name}"] = {side: len(texts) / each for side, each in seconds.items()}
    peer.stop()
    found["versions"] = {name: importlib.metadata.version(name) for name in ("torch", "tokenizers")}
    return found


def main() -> int:
    """Print a table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--json", type=Path)
    chosen = parser.parse_args()
    if not PYTHON.exists():
        print("skipped: open_clip is not installed beside us, make peers")
        return 0
    found = measure(chosen.threads, chosen.steps, chosen.rounds)
    tokens = found["tokens"]
    print(
        f"open_clip {found['peer']['version']}, {found['threads']} thread(s), "
        f"{tokens['mean']:.1f} tokens a text"
    )
    for name, figures in found.items():
        if isinstance(figures, dict) and "ours" in figures:
            theirs = {key: value for key, value in figures.items() if key != "ours"}
            others = "  ".join(
                f"{key}: {value:10,.1f} ({figures['ours'] / value:5.2f} times)"
                for key, value in theirs.items()
            )
            print(f"{name:<22} ours {figures['ours']:10,.1f}/s   open_clip {others}")
    told = ", ".join(
        f"{found[f'waiting_{precision}']:.1%} ({precision})" for precision in ("float32", "bf16")
    )
    print(f"of the time from shards, steps waited for pictures: {told}")
    if chosen.json:
        chosen.json.write_text(json.dumps(found, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
