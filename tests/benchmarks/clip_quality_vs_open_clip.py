"""What CLIP learns in a given time, beside open_clip on the same pictures, captions, cores and
seconds: retrieval and zero-shot.

    make peers && python -m tests.benchmarks.clip_quality_vs_open_clip --root ROOT [--recipe
    quickstart] [--seconds 300] [--threads 1]
        [--seeds 3] [--towers ResNet ViT]

ROOT holds a run's ingest and curate stages. Ours is the recipe's own [clip]; open_clip has the
towers that it offers for such pictures: a
ViT and its ResNet, of about as many parameters, trained as its trainer does with the better of its
usual learning rates for small models.
Both read pictures from memory and draw phrasings alike; who goes first changes with the seed.
Prints recall@5 of held-out pairs and top-1
over the held-out pictures' own names, of every seed and their mean, and ours less theirs with the
bootstrap's 95 % interval over concepts:
both answer the same questions, so it is each question's difference, averaged over the seeds, that
is resampled.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray
from torch import Tensor

from flows.config.run_config import RunConfig, load_recipe
from indexing.metrics.bootstrap import mean_figure
from indexing.metrics.retrieval import right_ranks
from indexing.metrics.zero_shot import ranks
from infra.storage.work_folder import local_work
from tests.benchmarks.clip_vs_open_clip import PYTHON
from tests.helpers.peer_environment import SCRIPTS
from tests.helpers.stage_folders import shards_in
from training.data import embedding_dataset
from training.data.image_reader import Pictures, read_table
from training.jobs import train
from training.models import clip as clip_model
from training.models.clip import CLIP
from training.models.pixels import to_pixels
from training.models.tokenizer import Tokenizer
from training.optim import loop
from training.optim.step import Step

SPLITS = ("held_out_concept", "held_out_style")
CALIBRATION_STEPS, RESAMPLES = 6, 10_000
TEXT = {"context_length": 24, "vocab_size": 49408, "width": 128, "heads": 2, "layers": 2}
TOWERS: dict[str, dict[str, Any]] = {
    "ViT": {"layers": 4, "width": 128, "head_width": 32, "patch_size": 4},
    "ResNet": {"layers": [1, 1, 1, 1], "width": 24},
}


Judged = dict[str, tuple[NDArray[np.bool_], NDArray[np.str_]]]
"""By figure: whether each question was answered right, and the questions' concepts."""


@dataclass
class Training:
    """What one training came to: the images seen, the seconds taken, and what was judged of each
    split.
    """

    seen: int
    seconds: float
    judged: list[Judged]


def judge(
    images: Tensor, texts: Tensor, names: Tensor, rows: list[dict[str, Any]], classes: list[str]
) -> Judged:
    """Judge recall@5 both ways and top-1 for unit vectors of pictures, their first captions, and
    the classes' names.
    """
    concepts = np.array([row["concept"] for row in rows])
    (pictures, picture_of), (captions, caption_of) = (
        np.unique([row[name] for row in rows], return_index=True, return_inverse=True)[1:]
        for name in ("sha256", "caption")
    )
    image, text = images.numpy()[pictures], texts.numpy()[captions]
    labels = np.array([classes.index(row["caption"]) for row in rows])
    return {
        "image to text R@5": (
            right_ranks(image, text, picture_of, caption_of) < 5,
            concepts[pictures],
        ),
        "text to image R@5": (
            right_ranks(text, image, caption_of, picture_of) < 5,
            concepts[captions],
        ),
        "zero-shot top-1": (ranks(images.numpy() @ names.numpy().T, labels) < 1, concepts),
    }


def train_ours(
    config: RunConfig, pictures: Pictures, phrasings: list[list[str]], seconds: float, seed: int
) -> tuple[CLIP, Tokenizer, int, float]:
    """Train the recipe's CLIP for that long; returns it with its averaged weights, and the images
    seen and seconds taken.
    """
    tokenizer = Tokenizer.fit((text for each in phrasings for text in each), config.tokenizer)
    texts = embedding_dataset.Captions(pa.array(phrasings), tokenizer)
    torch.manual_seed(seed)
    model = CLIP(config.clip, tokenizer.vocab_size, tokenizer.context)
    side_px = config.clip.image_size_px

    def loss_of(step: Step) -> Tensor:
        rows = step.samples(len(pictures))
        ids, _ = texts.draw(
            rows,
            embedding_dataset.towards_first(
                step.uniform(train.PHRASING), config.clip.first_caption
            ),
        )
        return model.loss(
            train.shifted(to_pixels(pictures[rows], side_px), step.uniform(train.SHIFT, 2)), ids
        )

    start = {name: value.clone() for name, value in model.state_dict().items()}
    images, spent_s, seen, taken_s = CALIBRATION_STEPS * config.clip.batch_size, 0.0, 0, 0.0
    for rehearsal in (
        True,
        True,
        False,
    ):  # the first reads the pictures, the second sees how many images fit
        model.load_state_dict(start)
        started_s = time.monotonic()
        section = config.clip.model_copy(
            update={"images": images, "state_every_s": 1e9, "seed": seed}
        )
        with tempfile.TemporaryDirectory() as folder:
            work = local_work(Path(folder))
            averaged = loop.run(model, section, loss_of, work, model.clamp_logit_scale)
        seen, taken_s = images, time.monotonic() - started_s
        spent_s += taken_s
        images = (
            max(images, int(images * (seconds - spent_s) / taken_s))
            if rehearsal and spent_s > taken_s
            else images
        )
    model.load_state_dict(averaged)
    return model.eval(), tokenizer, seen, taken_s


def newest(stage: Path) -> Path:
    """Return the folder of a stage that was committed last."""
    return max(stage.glob("*/manifest.json"), key=lambda path: path.stat().st_mtime).parent


def train_theirs(
    tower: str,
    config: RunConfig,
    chosen: argparse.Namespace,
    seed: int,
    folder: Path,
    held: list[tuple[list[dict[str, Any]], list[str]]],
) -> Training:
    """Train one of open_clip's models in its own process for as long, and judge it alike; `folder`
    holds the data.
    """
    shape = {
        "embed_dim": config.clip.embed_dim,
        "vision_cfg": {"image_size": config.clip.image_size_px} | TOWERS[tower],
        "text_cfg": TEXT,
    }
    told = {
        "data": str(folder / "data.pt"),
        "config": shape,
        "seconds": chosen.seconds,
        "threads": chosen.threads,
        "seed": seed,
        "out": str(folder / "out.pt"),
        "first_caption": config.clip.first_caption,
        "batch": config.clip.batch_size,
        "learning_rate": 1e-3,
        "weight_decay": 0.1,
        "bf16": config.clip.precision == "bf16",
    }
    (folder / "told.json").write_text(json.dumps(told))
    subprocess.run(
        [str(PYTHON), str(SCRIPTS / "open_clip_training.py"), str(folder / "told.json")], check=True
    )
    found = torch.load(folder / "out.pt")
    judged, image, text = [], 0, 0
    for rows, classes in held:
        count = len(rows)
        images, captions = found["image"][image : image + count], found["text"][text : text + count]
        names = found["text"][text + count : text + count + len(classes)]
        judged.append(judge(images, captions, names, rows, classes))
        image, text = image + count, text + count + len(classes)
    return Training(found["images_seen"], found["seconds"], judged)


def difference(ours: list[Training], theirs: list[Training], place: int, figure: str) -> str:
    """Tell ours less theirs in a split's figure, averaged over the seeds, with its interval over
    concepts.
    """
    gain = sum(
        a.judged[place][figure][0].astype(float) - b.judged[place][figure][0].astype(float)
        for a, b in zip(ours, theirs, strict=True)
    )
    found = mean_figure(gain / len(ours), ours[0].judged[place][figure][1], RESAMPLES, 0)
    return f"{found['value']:+.1%} ({found['low']:+.1%} to {found['high']:+.1%})"


def main() -> int:
    """Train all, seed by seed in turns, and print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--root", type=Path)
    parser.add_argument("--recipe", default="quickstart")
    parser.add_argument("--seconds", type=float, default=300)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--towers", nargs="+", choices=list(TOWERS), default=list(TOWERS))
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
    shards = shards_in(ingest)
    pictures = {split: Pictures(part, shards, side_px) for split, part in parts.items()}
    phrasings = parts["train"]["captions"].to_pylist()
    images = [pictures[split][range(len(pictures[split]))] for split in SPLITS]
    held = [
        (rows, sorted({row["caption"] for row in rows}))
        for rows in (parts[split].to_pylist() for split in SPLITS)
    ]
    trained: dict[str, list[Training]] = {name: [] for name in ("ours", *chosen.towers)}
    with tempfile.TemporaryDirectory() as name:
        folder, counts = Path(name), torch.tensor([len(each) for each in phrasings])
        data = {
            "images": pictures["train"][range(len(phrasings))],
            "phrasings": [text for each in phrasings for text in each],
            "firsts": counts.cumsum(0) - counts,
            "counts": counts,
            "held_out": torch.cat(images),
            "texts": [
                text
                for rows, classes in held
                for text in ([row["caption"] for row in rows] + classes)
            ],
        }
        torch.save(data, folder / "data.pt")
        for seed in range(chosen.seeds):
            for side in trained if seed % 2 == 0 else reversed(trained):
                if side != "ours":
                    trained[side].append(train_theirs(side, config, chosen, seed, folder, held))
                    continue
                model, tokenizer, seen, seconds = train_ours(
                    config, pictures["train"], phrasings, chosen.seconds, seed
                )
                judged = [
                    judge(
                        clip_model.embed_images(model, each),
                        clip_model.embed_texts(model, tokenizer, [row["caption"] for row in rows]),
                        clip_model.embed_texts(model, tokenizer, classes),
                        rows,
                        classes,
                    )
                    for each, (rows, classes) in zip(images, held, strict=True)
                ]
                trained[side].append(Training(seen, seconds, judged))
    print(
        f"{chosen.seconds:g} s, {chosen.threads} thread(s), {len(phrasings):,} training pairs, "
        f"{chosen.seeds} seed(s)"
    )
    for side, each in trained.items():
        print(
            f"{side:<8} images seen: "
            f"{', '.join(f'{one.seen:,} in {one.seconds:.0f} s' for one in each)}"
        )
    for place, (split, (rows, classes)) in enumerate(zip(SPLITS, held, strict=True)):
        print(f"{split}: {len(rows)} pairs, {len(classes)} names")
        for figure in trained["ours"][0].judged[place]:
            print(f"  {figure}")
            for side, each in trained.items():
                values = [float(one.judged[place][figure][0].mean()) for one in each]
                told = f"{np.mean(values):6.1%}  (seeds: {', '.join(f'{value:.1%}' for value in values)})"  # noqa: E501
                print(
                    f"    {side:<8} {told}"
                    + (
                        f"  ours less this {difference(trained['ours'], each, place, figure)}"
                        if side != "ours"
                        else ""
                    )
                )
    return 0


if __name__ == "__main__":
    sys.exit(main())
