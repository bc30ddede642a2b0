"""What CLIP learns in a given time, beside open_clip on the same pictures, captions, cores and seconds: retrieval and zero-shot.

    make peers && python -m tests.benchmarks.clip_quality_vs_open_clip --root ROOT [--recipe quickstart] [--seconds 300] [--threads 1]

ROOT holds a run's ingest and curate stages. Ours is the recipe's own [clip]; open_clip has the towers that it offers for such pictures: a
ViT and its ResNet, of about as many parameters, trained as its trainer does with the better of its usual learning rates for small models.
Both read pictures from memory. Prints recall@5 of held-out pairs and top-1 over the held-out pictures' own names, one seed.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from flows.config import RunConfig, load_recipe
from indexing.retrieval import retrieval
from indexing.zero_shot import class_embeddings, score
from tests.benchmarks.clip_vs_open_clip import PEERS, PYTHON
from training import clip as clip_model
from training import embeddings, jobs, loop
from training.clip import CLIP, to_pixels
from training.loop import Step
from training.pictures import Pictures, read_table
from training.tokenizer import Tokenizer

SPLITS = ("held_out_concept", "held_out_style")
CALIBRATION_STEPS = 6
TEXT = {"context_length": 24, "vocab_size": 49408, "width": 128, "heads": 2, "layers": 2}
TOWERS: dict[str, dict[str, Any]] = {
    "ViT": {"layers": 4, "width": 128, "head_width": 32, "patch_size": 4},
    "ResNet": {"layers": [1, 1, 1, 1], "width": 24},
}


def judge(images: Tensor, texts: Tensor, names: Tensor, rows: list[dict[str, Any]], classes: list[str]) -> dict[str, float]:
    """Return recall@5 both ways and top-1 for unit vectors of pictures and their first captions, and of the classes' names."""
    groups = [row["concept"] for row in rows]
    found = retrieval(images.numpy(), texts.numpy(), [row["sha256"] for row in rows], [row["caption"] for row in rows], groups, 2, 0)
    prompts = class_embeddings(lambda _: names.numpy(), classes, ["{}"])
    labels = [classes.index(row["caption"]) for row in rows]
    top = score(images.numpy() @ prompts.T, labels, classes, groups, 2, 0)
    return {
        "image to text R@5": found["image_to_text"]["recall@5"]["value"],
        "text to image R@5": found["text_to_image"]["recall@5"]["value"],
        "zero-shot top-1": top["top_1"]["value"],
    }


def train_ours(config: RunConfig, pictures: Pictures, phrasings: list[list[str]], seconds: float) -> tuple[CLIP, Tokenizer, int, float]:
    """Train the recipe's CLIP for that long; returns it with its averaged weights, and the images seen and seconds taken."""
    tokenizer = Tokenizer.fit((text for each in phrasings for text in each), config.tokenizer)
    texts = embeddings.Captions(pa.array(phrasings), tokenizer)
    torch.manual_seed(config.clip.seed)
    model = CLIP(config.clip, tokenizer.vocab_size, tokenizer.context)
    side_px = config.clip.image_size_px

    def loss_of(step: Step) -> Tensor:
        rows = step.samples(len(pictures))
        ids, _ = texts.draw(rows, step.uniform(jobs.PHRASING))
        return model.loss(jobs.shifted(to_pixels(pictures[rows], side_px), step.uniform(jobs.SHIFT, 2)), ids)

    start = {name: value.clone() for name, value in model.state_dict().items()}
    images, spent_s, seen, taken_s = CALIBRATION_STEPS * config.clip.batch_size, 0.0, 0, 0.0
    for rehearsal in (True, True, False):  # the first reads the pictures, the second sees how many images fit
        model.load_state_dict(start)
        started_s = time.monotonic()
        section = config.clip.model_copy(update={"images": images, "state_every_s": 1e9})
        with tempfile.TemporaryDirectory() as folder:
            averaged = loop.run(model, section, loss_of, Path(folder), model.clamp_logit_scale)
        seen, taken_s = images, time.monotonic() - started_s
        spent_s += taken_s
        images = max(images, int(images * (seconds - spent_s) / taken_s)) if rehearsal and spent_s > taken_s else images
    model.load_state_dict(averaged)
    return model.eval(), tokenizer, seen, taken_s


def newest(stage: Path) -> Path:
    """Return the folder of a stage that was committed last."""
    return max(stage.glob("*/manifest.json"), key=lambda path: path.stat().st_mtime).parent


def main() -> int:
    """Train both and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path)
    parser.add_argument("--recipe", default="quickstart")
    parser.add_argument("--seconds", type=float, default=300)
    parser.add_argument("--threads", type=int, default=1)
    chosen = parser.parse_args()
    if not PYTHON.exists() or chosen.root is None:
        print("skipped: needs open_clip (make peers) and --root with a run's data")
        return 0
    torch.set_num_threads(chosen.threads)
    config = load_recipe(chosen.recipe)
    ingest, curate = (newest(chosen.root / name) for name in ("ingest", "curate"))
    table = read_table(curate / "keep.parquet")
    side_px = config.clip.image_size_px
    parts = {split: table.filter(np.array(table["split"]) == split) for split in ("train", *SPLITS)}
    pictures = {split: Pictures(part, ingest / "shards", side_px) for split, part in parts.items()}
    phrasings = parts["train"]["captions"].to_pylist()
    rows = {split: parts[split].to_pylist() for split in SPLITS}
    classes = {split: sorted({row["caption"] for row in rows[split]}) for split in SPLITS}
    model, tokenizer, seen, seconds = train_ours(config, pictures["train"], phrasings, chosen.seconds)
    results = [("ours", seen, seconds, [
        judge(
            clip_model.embed_images(model, pictures[split][range(len(rows[split]))]),
            clip_model.embed_texts(model, tokenizer, [row["caption"] for row in rows[split]]),
            clip_model.embed_texts(model, tokenizer, classes[split]), rows[split], classes[split],
        ) for split in SPLITS])]  # fmt: skip
    for tower, vision in TOWERS.items():
        results.append(train_theirs(tower, vision, config, chosen, pictures, phrasings, rows, classes))
    print(f"{chosen.seconds:g} s, {chosen.threads} thread(s), {len(phrasings):,} training pairs")
    for name, seen, seconds, figures in results:
        for split, each in zip(SPLITS, figures, strict=True):
            told = ", ".join(f"{key} {value:6.1%}" for key, value in each.items())
            size = f"{len(rows[split])} pairs, {len(classes[split])} names"
            print(f"{name:<18} {seen:9,} images in {seconds:5.0f} s  {split:<17} {told}  ({size})")
    return 0


def train_theirs(
    tower: str, vision: dict[str, Any], config: RunConfig, chosen: argparse.Namespace, pictures: dict[str, Pictures],
    phrasings: list[list[str]], rows: dict[str, list[dict[str, Any]]], classes: dict[str, list[str]],
) -> tuple[str, int, float, list[dict[str, float]]]:  # fmt: skip
    """Train one of open_clip's models in its own process for as long, and judge it alike."""
    counts = torch.tensor([len(each) for each in phrasings])
    texts = [text for split in SPLITS for text in ([row["caption"] for row in rows[split]] + classes[split])]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        data = {
            "images": pictures["train"][range(len(phrasings))], "phrasings": [text for each in phrasings for text in each],
            "firsts": counts.cumsum(0) - counts, "counts": counts, "texts": texts,
            "held_out": torch.cat([pictures[split][range(len(rows[split]))] for split in SPLITS]),
        }  # fmt: skip
        torch.save(data, folder / "data.pt")
        shape = {"embed_dim": config.clip.embed_dim, "vision_cfg": {"image_size": config.clip.image_size_px} | vision, "text_cfg": TEXT}
        told = {
            "data": str(folder / "data.pt"), "config": shape, "seconds": chosen.seconds, "threads": chosen.threads,
            "out": str(folder / "out.pt"),
            "batch": config.clip.batch_size, "learning_rate": 1e-3, "weight_decay": 0.1, "bf16": config.clip.precision == "bf16",
        }  # fmt: skip
        (folder / "told.json").write_text(json.dumps(told))
        subprocess.run([str(PYTHON), str(PEERS / "peers" / "open_clip_training.py"), str(folder / "told.json")], check=True)
        found = torch.load(folder / "out.pt")
    figures, image, text = [], 0, 0
    for split in SPLITS:
        count = len(rows[split])
        images, captions = found["image"][image : image + count], found["text"][text : text + count]
        names = found["text"][text + count : text + count + len(classes[split])]
        figures.append(judge(images, captions, names, rows[split], classes[split]))
        image, text = image + count, text + count + len(classes[split])
    return f"open_clip {tower}", found["images_seen"], found["seconds"], figures


if __name__ == "__main__":
    sys.exit(main())
