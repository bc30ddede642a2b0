"""What prior and decoder draw after a given time of training, beside DALLE2-pytorch on the same pictures, embeddings, cores and seconds.

    make peers && python -m tests.benchmarks.quality_vs_dalle2 --root ROOT [--seconds 600] [--pictures 128] [--threads 1] [--out DIR]

ROOT holds a run's ingest, clip and embed stages. Ours are the recipe's [prior] and [decoder]; DALLE2-pytorch's have as many parameters,
the same batches, schedule of the rate, precision and averaging, get our CLIP's text encodings ready and draw in 64 + 64 steps. A fifth of
the time goes to the prior. Both draw captions of held-out concepts; the Fréchet distance to the real pictures is on EfficientNet-Lite0's
features (never FID: another network, and few pictures), with the unbiased kernel distance beside it. One seed for each picture. Ends with
1 where either distance of ours is not the lower.
"""

import argparse
import datetime
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from flows.config import RunConfig, load_recipe
from indexing import distances
from tests.benchmarks.clip_quality_vs_open_clip import newest
from tests.benchmarks.models_vs_dalle2 import PEERS, PYTHON, without_tables
from tests.promises import told as outcome
from training import clip as clip_model
from training import embeddings, features, jobs, soundness
from training.clip import CLIP
from training.decoder import DecoderConfig
from training.generate import Unclip
from training.loop import LoopConfig
from training.pictures import Pictures, read_table
from training.prior import PriorConfig
from training.tokenizer import PAD, Tokenizer

PRIOR_SHARE = 0.2
CALIBRATION_STEPS = 6
THEIR_RATE = {"prior": 1e-3, "decoder": 1e-3}


def train_ours(fit: Callable[..., Any], config: LoopConfig, paths: dict[str, Path], seconds: float) -> tuple[nn.Module, dict[str, Any]]:
    """Train as the stage does for that long, the time of seeing how many images fit included; returns the averaged model."""
    images, taken_s, seen = CALIBRATION_STEPS * config.batch_size, 0.0, 0
    for left in (1, 0):
        with tempfile.TemporaryDirectory() as folder:
            if isinstance(config, DecoderConfig):
                soundness.settle(read_table(paths["embed"] / "metadata", "train"), paths["ingest"] / "shards", "stop", Path(folder))
            model, averaged = fit(config.model_copy(update={"images": images, "state_every_s": 1e9}), paths, Path(folder), "cpu")
            last = json.loads((Path(folder) / "metrics.jsonl").read_text().splitlines()[-1])
        taken_s, seen = taken_s + last["seconds"], last["images_seen"]
        if left:
            images = max(images, int(images * (seconds - taken_s) / taken_s))
    model.load_state_dict(averaged)
    facts = {"parameters": without_tables(model), "images_seen": seen, "seconds": taken_s, "loss": last["loss"]}
    return model.eval().requires_grad_(False), facts


@torch.no_grad()
def encodings(clip: CLIP, tokenizer: Tokenizer, texts: list[str]) -> Tensor:
    """Return the projected hidden states of the text tower, float16 (B, context, E); padding is zero, as DALLE2-pytorch wants it."""
    found = torch.zeros(len(texts), tokenizer.context, clip.config.embed_dim, dtype=torch.float16)
    for start in range(0, len(texts), 256):
        ids = tokenizer(texts[start : start + 256])
        hidden = clip.text_project(clip.text(ids)) * (ids != PAD)[..., None]
        found[start : start + len(ids), : ids.shape[1]] = hidden
    return found


def train_theirs(config: RunConfig, told: dict[str, Any], data: dict[str, Tensor], context: int) -> dict[str, Any]:
    """Train DALLE2-pytorch's in its own process; returns its pictures and what it took."""
    embed_dim = data["z_i"].shape[1]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        torch.save(data, folder / "data.pt")
        told |= {
            "data": str(folder / "data.pt"), "out": str(folder / "out.pt"), "bf16": config.decoder.precision == "bf16",
            "batch": {"prior": config.prior.batch_size, "decoder": config.decoder.batch_size}, "learning_rate": THEIR_RATE,
            "guidance": config.decoder.guidance, "prior": {"embed_dim": embed_dim, "heads": 4, "text_len": context},
            "decoder": {  # cond_dim is not embed_dim: with equal ones its U-Net leaves out the layer that makes tokens of z_i
                "embed_dim": embed_dim, "cond_dim": embed_dim // 2, "dim_mults": list(config.decoder.multiples), "blocks": 1,
                "text_len": context, "side_px": config.decoder.image_size_px, "sampling_steps": 64,
            },
        }  # fmt: skip
        (folder / "told.json").write_text(json.dumps(told))
        command = [str(PYTHON), str(PEERS / "peers" / "dalle2_training.py"), str(folder / "told.json")]
        subprocess.run(command, check=True, env=os.environ | {"TQDM_DISABLE": "1"})
        found: dict[str, Any] = torch.load(folder / "out.pt")
    return found


def missed(ours: tuple[float, float], theirs: tuple[float, float]) -> list[str]:
    """Return which of the distances, Fréchet and kernel, is not lower than theirs."""
    both = zip(("Fréchet", "kernel"), ours, theirs, strict=True)
    return [f"{name} distance {own:.2f}, DALLE2-pytorch {other:.2f}: ours is to be lower" for name, own, other in both if own >= other]


def main() -> int:
    """Train both and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path)
    parser.add_argument("--recipe", default="quickstart")
    parser.add_argument("--seconds", type=float, default=600)
    parser.add_argument("--pictures", type=int, default=128)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, help="A folder for a sheet of the pictures.")
    chosen = parser.parse_args()
    network = features.efficientnet_lite0()
    if not PYTHON.exists() or chosen.root is None or network is None:
        print("skipped: needs DALLE2-pytorch (make peers), the feature network and --root with a run's stages")
        return 0
    torch.set_num_threads(chosen.threads)
    config = load_recipe(chosen.recipe)
    assert isinstance(config.prior, PriorConfig) and isinstance(config.decoder, DecoderConfig)
    paths = {name: newest(chosen.root / name) for name in ("ingest", "clip", "embed")}
    seconds = {"prior": PRIOR_SHARE * chosen.seconds, "decoder": (1 - PRIOR_SHARE) * chosen.seconds}
    prior, of_prior = train_ours(jobs.fit_prior, config.prior, paths, seconds["prior"])
    decoder, of_decoder = train_ours(jobs.fit_decoder, config.decoder, paths, seconds["decoder"])
    clip, tokenizer = clip_model.load(paths["clip"])
    side_px = config.decoder.image_size_px
    held = read_table(paths["embed"] / "metadata", "held_out_concept")
    places = np.random.default_rng(0).permutation(held.num_rows)[: chosen.pictures]
    held = held.take(places)
    prompts = held["caption"].to_pylist()
    real = Pictures(held, paths["ingest"] / "shards", side_px)[range(len(prompts))].numpy()
    started_s = time.monotonic()
    drawn = {"ours": Unclip(clip, tokenizer, prior, decoder).generate(prompts, seed=range(len(prompts)))[:, 0]}  # type: ignore[arg-type]
    drawing_s = time.monotonic() - started_s
    table, z_i = embeddings.read(paths["embed"], "train")
    captions = table["caption"].to_pylist()
    data = {
        "z_i": z_i[torch.arange(len(z_i))],
        "z_t": clip_model.embed_texts(clip, tokenizer, captions), "encodings": encodings(clip, tokenizer, captions),
        "images": Pictures(table, paths["ingest"] / "shards", side_px)[range(len(captions))],
        "asked_z_t": clip_model.embed_texts(clip, tokenizer, prompts), "asked_encodings": encodings(clip, tokenizer, prompts),
    }  # fmt: skip
    parameters = {"prior": of_prior["parameters"], "decoder": of_decoder["parameters"]}
    told = {"seconds": seconds, "threads": chosen.threads, "parameters": parameters}
    theirs = train_theirs(config, told, data, tokenizer.context)
    drawn["DALLE2-pytorch"] = theirs["images"].permute(0, 2, 3, 1).contiguous().numpy()
    print(
        f"{datetime.date.today()}, {chosen.threads} thread(s), {chosen.seconds:g} s of training each on {len(captions):,} pairs of "
        f"{side_px} px, {len(prompts)} held-out captions, {features.LITE_NAME}, DALLE2-pytorch {theirs['version']}, "
        f"ours drew in {drawing_s:.0f} s"
    )
    print("ours: " + json.dumps({"prior": of_prior, "decoder": of_decoder}))
    print("DALLE2-pytorch: " + json.dumps({"prior": theirs["prior"], "decoder": theirs["decoder"]}))
    of_real = np.asarray(network(real), np.float64)
    print("\n| pictures | Fréchet distance | kernel distance x 1000 |\n|---|---|---|")
    reached: dict[str, tuple[float, float]] = {}
    for name, pictures in drawn.items():
        made = np.asarray(network(pictures), np.float64)
        reached[name] = distances.frechet(of_real, made), 1000 * distances.kernel_distance(of_real, made)
        print(f"| {name} | {reached[name][0]:.2f} | {reached[name][1]:.2f} |")
    if chosen.out:
        from indexing.pictures import sheet, write_png

        chosen.out.mkdir(parents=True, exist_ok=True)
        rows = {"real": real, **drawn}
        write_png(sheet([list(each[:12]) for each in rows.values()], list(rows)), chosen.out / "quality_vs_dalle2.png")
    return outcome(missed(*reached.values()))


if __name__ == "__main__":
    sys.exit(main())
