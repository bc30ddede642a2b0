"""Ours trained for given seconds on a run's pictures and embeddings, what a peer is to be trained
on beside, and how both are judged.

Reads the newest ingest, clip and embed stages of ROOT. A fifth of the time goes to the prior. Both
draw captions of held-out concepts.
"""

import json
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from flows.config.run_config import RunConfig
from indexing.metrics import frechet
from tests.benchmarks.clip_quality_vs_open_clip import newest
from tests.benchmarks.models_vs_dalle2 import without_tables
from tests.helpers.stage_folders import folders_of, shards_in
from training.data import embedding_dataset, shard_check
from training.data.image_reader import Pictures, read_table
from training.generation.unclip import Unclip
from training.jobs import train
from training.models import clip as clip_model
from training.models.clip import CLIP
from training.models.tokenizer import PAD, Tokenizer
from training.sections.decoder_section import DecoderConfig
from training.sections.loop_section import LoopConfig
from training.sections.prior_section import PriorConfig

PRIOR_SHARE = 0.2
CALIBRATION_STEPS = 6


@dataclass
class Trained:
    """Ours after its time, and the question: prompts, and the real pictures that they belong to,
    uint8 (P, S, S, 3).
    """

    system: Unclip
    paths: dict[str, Path]
    seconds: dict[str, float]
    facts: dict[str, dict[str, Any]]
    prompts: list[str]
    real: NDArray[np.uint8]

    @property
    def side_px(self) -> int:
        """Side of the pictures."""
        return self.system.decoder.config.image_size_px

    @property
    def parameters(self) -> dict[str, int]:
        """Parameters of prior and decoder without their token tables."""
        return {name: each["parameters"] for name, each in self.facts.items()}

    def for_peers(self) -> dict[str, Tensor]:
        """Return what peers are trained on, pairs of first captions, and what they are asked: unit
        vectors and uint8 pictures.
        """
        clip, tokenizer = self.system.clip, self.system.tokenizer
        table, z_i = embedding_dataset.read(self.paths["embed"], "train")
        captions = table["caption"].to_pylist()
        return {
            "z_i": z_i[torch.arange(len(z_i))],
            "z_t": clip_model.embed_texts(clip, tokenizer, captions),
            "encodings": encodings(clip, tokenizer, captions),
            "images": Pictures(table, shards_in(self.paths["ingest"]), self.side_px)[
                range(len(captions))
            ],
            "asked_z_t": clip_model.embed_texts(clip, tokenizer, self.prompts),
            "asked_encodings": encodings(clip, tokenizer, self.prompts),
        }


def trained(config: RunConfig, root: Path, seconds: float, pictures: int) -> Trained:
    """Train the recipe's prior and decoder for that long together, and choose so many prompts."""
    assert isinstance(config.prior, PriorConfig) and isinstance(config.decoder, DecoderConfig)
    paths = {name: newest(root / name) for name in ("ingest", "clip", "embed")}
    each_s = {"prior": PRIOR_SHARE * seconds, "decoder": (1 - PRIOR_SHARE) * seconds}
    prior, of_prior = train_ours(train.fit_prior, config.prior, paths, each_s["prior"])
    decoder, of_decoder = train_ours(train.fit_decoder, config.decoder, paths, each_s["decoder"])
    system = Unclip(*clip_model.load(paths["clip"]), prior, decoder)  # type: ignore[arg-type]
    held = read_table(paths["embed"] / "metadata", "held_out_concept")
    held = held.take(np.random.default_rng(0).permutation(held.num_rows)[:pictures])
    real = Pictures(held, shards_in(paths["ingest"]), config.decoder.image_size_px)[
        range(held.num_rows)
    ].numpy()
    return Trained(
        system,
        paths,
        each_s,
        {"prior": of_prior, "decoder": of_decoder},
        held["caption"].to_pylist(),
        real,
    )


def train_ours(
    fit: Callable[..., Any], config: LoopConfig, paths: dict[str, Path], seconds: float
) -> tuple[nn.Module, dict[str, Any]]:
    """Train as the stage does for that long, the time of seeing how many images fit included;
    returns the averaged model.
    """
    images, taken_s, seen = CALIBRATION_STEPS * config.batch_size, 0.0, 0
    for left in (1, 0):
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            folders = folders_of(paths, folder / "store", folder)
            shutil.copyfile(paths["clip"] / train.TOKENIZER, folder / train.TOKENIZER)
            if isinstance(config, DecoderConfig):
                table = read_table(paths["embed"] / "metadata", "train")
                shard_check.settle(table, folders.shards, "stop", folders.work)
            model, averaged = fit(
                config.model_copy(update={"images": images, "state_every_s": 1e9}), folders, "cpu"
            )
            last = json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])
        taken_s, seen = taken_s + last["seconds"], last["images_seen"]
        if left:
            images = max(images, int(images * (seconds - taken_s) / taken_s))
    model.load_state_dict(averaged)
    facts = {
        "parameters": without_tables(model),
        "images_seen": seen,
        "seconds": taken_s,
        "loss": last["loss"],
    }
    return model.eval().requires_grad_(False), facts


@torch.no_grad()
def encodings(clip: CLIP, tokenizer: Tokenizer, texts: list[str]) -> Tensor:
    """Return the projected hidden states of the text tower, float16 (B, context, E); padding is
    zero, as DALLE2-pytorch wants it.
    """
    found = torch.zeros(len(texts), tokenizer.context, clip.config.embed_dim, dtype=torch.float16)
    for start in range(0, len(texts), 256):
        ids = tokenizer(texts[start : start + 256])
        hidden = clip.text_project(clip.text(ids)) * (ids != PAD)[..., None]
        found[start : start + len(ids), : ids.shape[1]] = hidden
    return found


def distances_of(real: NDArray[Any], made: NDArray[Any]) -> tuple[float, float]:
    """Return the Fréchet and 1000 times the kernel distance of two sets' features."""
    return frechet.frechet(real, made), 1000 * frechet.kernel_distance(real, made)


def write_sheet(rows: dict[str, NDArray[np.uint8]], path: Path) -> None:
    """Write the first twelve pictures of every row."""
    from indexing.data.contact_sheet import SHEET_SCALE, contact_sheet
    from indexing.data.images import write_png

    path.parent.mkdir(parents=True, exist_ok=True)
    pictures = [list(row[:12]) for row in rows.values()]
    write_png(contact_sheet(pictures, list(rows), scale=SHEET_SCALE), path)
