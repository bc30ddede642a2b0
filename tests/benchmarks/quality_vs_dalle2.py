"""What prior and decoder draw after a given time of training, beside DALLE2-pytorch on the same
pictures, embeddings, cores and seconds.

    make peers && python -m tests.benchmarks.quality_vs_dalle2 --root ROOT [--seconds 600]
    [--pictures 128] [--threads 1] [--out DIR]

ROOT holds a run's ingest, clip and embed stages. Ours are the recipe's [prior] and [decoder];
DALLE2-pytorch's have as many parameters,
the same batches, schedule of the rate, precision and averaging, get our CLIP's text encodings ready
and draw in 64 + 64 steps. A fifth of
the time goes to the prior. Both draw captions of held-out concepts; the Fréchet distance to the
real pictures is on EfficientNet-Lite0's
features (never FID: another network, and few pictures), with the unbiased kernel distance beside
it. One seed for each picture. Ends with
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
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from flows.config.run_config import RunConfig, load_recipe
from tests.benchmarks.models_vs_dalle2 import PYTHON
from tests.helpers import equal_time_training
from tests.helpers.peer_environment import SCRIPTS
from tests.helpers.shortfalls import told as outcome
from training.models import imagenet_features

THEIR_RATE = {"prior": 1e-3, "decoder": 1e-3}


def train_theirs(
    config: RunConfig, told: dict[str, Any], data: dict[str, Tensor], context: int
) -> dict[str, Any]:
    """Train DALLE2-pytorch's in its own process; returns its pictures and what it took."""
    embed_dim = data["z_i"].shape[1]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        torch.save(data, folder / "data.pt")
        told |= {
            "data": str(folder / "data.pt"),
            "out": str(folder / "out.pt"),
            "bf16": config.decoder.precision == "bf16",
            "batch": {"prior": config.prior.batch_size, "decoder": config.decoder.batch_size},
            "learning_rate": THEIR_RATE,
            "guidance": config.decoder.guidance,
            "prior": {"embed_dim": embed_dim, "heads": 4, "text_len": context},
            # cond_dim is not embed_dim: with equal ones its U-Net leaves out the layer that makes
            # tokens of z_i
            "decoder": {
                "embed_dim": embed_dim,
                "cond_dim": embed_dim // 2,
                "dim_mults": list(config.decoder.multiples),
                "blocks": 1,
                "text_len": context,
                "side_px": config.decoder.image_size_px,
                "sampling_steps": 64,
            },
        }
        (folder / "told.json").write_text(json.dumps(told))
        command = [str(PYTHON), str(SCRIPTS / "dalle2_training.py"), str(folder / "told.json")]
        subprocess.run(command, check=True, env=os.environ | {"TQDM_DISABLE": "1"})
        found: dict[str, Any] = torch.load(folder / "out.pt")
    return found


def missed(ours: tuple[float, float], theirs: tuple[float, float]) -> list[str]:
    """Return which of the distances, Fréchet and kernel, is not lower than theirs."""
    both = zip(("Fréchet", "kernel"), ours, theirs, strict=True)
    return [
        f"{name} distance {own:.2f}, DALLE2-pytorch {other:.2f}: ours is to be lower"
        for name, own, other in both
        if own >= other
    ]


def main() -> int:
    """Train both and print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--root", type=Path)
    parser.add_argument("--recipe", default="quickstart")
    parser.add_argument("--seconds", type=float, default=600)
    parser.add_argument("--pictures", type=int, default=128)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, help="A folder for a sheet of the pictures.")
    chosen = parser.parse_args()
    network = imagenet_features.efficientnet_lite0()
    if not PYTHON.exists() or chosen.root is None or network is None:
        print(
            "skipped: needs DALLE2-pytorch (make peers), the feature network and --root with a "
            "run's stages"
        )
        return 0
    torch.set_num_threads(chosen.threads)
    config = load_recipe(chosen.recipe)
    ours = equal_time_training.trained(config, chosen.root, chosen.seconds, chosen.pictures)
    started_s = time.monotonic()
    drawn = {"ours": ours.system.generate(ours.prompts, seed=range(len(ours.prompts)))[:, 0]}
    drawing_s = time.monotonic() - started_s
    data = ours.for_peers()
    told = {"seconds": ours.seconds, "threads": chosen.threads, "parameters": ours.parameters}
    theirs = train_theirs(config, told, data, ours.system.tokenizer.context)
    drawn["DALLE2-pytorch"] = theirs["images"].permute(0, 2, 3, 1).contiguous().numpy()
    print(
        f"{datetime.date.today()}, {chosen.threads} thread(s), {chosen.seconds:g} s of training "
        f"each on {len(data['z_i']):,} pairs of "
        f"{ours.side_px} px, {len(ours.prompts)} held-out captions, "
        f"{imagenet_features.LITE_NAME}, DALLE2-pytorch {theirs['version']}, "
        f"ours drew in {drawing_s:.0f} s"
    )
    print("ours: " + json.dumps(ours.facts))
    print("DALLE2-pytorch: " + json.dumps({"prior": theirs["prior"], "decoder": theirs["decoder"]}))
    of_real = np.asarray(network(ours.real), np.float64)
    print("\n| pictures | Fréchet distance | kernel distance x 1000 |\n|---|---|---|")
    reached: dict[str, tuple[float, float]] = {}
    for name, pictures in drawn.items():
        reached[name] = equal_time_training.distances_of(
            of_real, np.asarray(network(pictures), np.float64)
        )
        print(f"| {name} | {reached[name][0]:.2f} | {reached[name][1]:.2f} |")
    if chosen.out:
        equal_time_training.write_sheet(
            {"real": ours.real, **drawn}, chosen.out / "quality_vs_dalle2.png"
        )
    return outcome(missed(*reached.values()))


if __name__ == "__main__":
    sys.exit(main())
