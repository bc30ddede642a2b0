"""How well the trained decoder accounts for pictures it was not trained on: bits per dimension, and
DDIM inversion by step count.

Reads an `embed` folder and ingest's shards, or picture files; writes nothing.
Legend: N pictures, E embedding dimensions, S the decoder's side.
"""

import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from PIL import Image
from torch import Tensor

from infra.errors import DataError
from training.data import embedding_dataset
from training.data.image_reader import LOCATION, Pictures
from training.diffusion.calibration import calibrate
from training.diffusion.likelihood import bits_per_dim
from training.diffusion.noise import Stream, generators
from training.diffusion.process import Denoise
from training.diffusion.samplers import ddim, ddim_invert
from training.diffusion.variance import Variance, measure_x_0_error
from training.generation import manipulations
from training.generation.unclip import BATCH, Unclip
from training.models.decoder import Decoder
from training.models.pixels import to_images, to_pixels
from training.models.tokenizer import Tokenizer

POINTS = 24
"""Times at which the decoder's own error is measured, for its calibration and the analytic
variance."""
REFINEMENTS = (0, 1)


@dataclass(frozen=True)
class Described:
    """Some pictures with what the decoder can be told of them."""

    x_0: Tensor  # (N, 3, S, S) in [-1, 1]
    z_i: Tensor  # (N, E)
    ids: Tensor  # (N, tokens)
    captions: list[str]
    keys: list[str]

    def __len__(self) -> int:
        return len(self.x_0)

    def first(self, count: int) -> "Described":
        """Return the first `count` pictures."""
        return self._part(slice(count))

    def halves(self) -> tuple["Described", "Described"]:
        """Return the first half and the second; an odd one at the end is left out."""
        half = len(self) // 2
        return self._part(slice(half)), self._part(slice(half, 2 * half))

    def _part(self, part: slice) -> "Described":
        return Described(
            self.x_0[part], self.z_i[part], self.ids[part], self.captions[part], self.keys[part]
        )


def read(
    embed: Path,
    shards: Path,
    split: str,
    tokenizer: Tokenizer,
    side_px: int,
    max_images: int,
    seed: int,
) -> Described:
    """Read pictures of a split, drawn by the seed, one of each concept, so that they are
    independent of each other.
    """
    table, z_i = embedding_dataset.read(embed, split, ["key", "caption", "concept", *LOCATION])
    rows = _one_a_concept(table, seed)[:max_images]
    chosen = table.take(pa.array(rows, pa.int64()))
    pictures = Pictures(chosen, shards, side_px)
    x_0 = (
        to_pixels(pictures[range(len(rows))], side_px)
        if len(rows)
        else torch.empty(0, 3, side_px, side_px)
    )
    captions = chosen["caption"].to_pylist()
    ids = tokenizer(captions) if captions else torch.empty(0, 2, dtype=torch.int64)
    return Described(
        x_0, z_i[torch.tensor(rows, dtype=torch.int64)], ids, captions, chosen["key"].to_pylist()
    )


def read_files(model: Unclip, files: Sequence[Path]) -> Described:
    """Read a person's picture files; they have no captions to tell, their names stand for them.
    Raises CallerError.
    """
    pictures = manipulations.read(model, files)
    x_0 = to_pixels(torch.from_numpy(pictures), model.decoder.config.image_size_px)
    names = [file.name for file in files]
    return Described(
        x_0, manipulations.embed(model, pictures), model.tokenizer([""] * len(names)), names, names
    )


def _one_a_concept(table: pa.Table, seed: int) -> list[int]:
    concepts = [
        concept or key
        for concept, key in zip(table["concept"].to_pylist(), table["key"].to_pylist(), strict=True)
    ]
    first: dict[str, int] = {}
    for row in np.random.default_rng(seed).permutation(len(concepts)).tolist():
        first.setdefault(concepts[row], row)
    return list(first.values())


def likelihood(
    decoder: Decoder, judged: Described, trained: Described, draws: int, seed: int
) -> dict[str, Any]:
    """Return the bound on -log2 p(x_0) in bits per dimension of `judged`, told z_i and caption, and
    told nothing.

    The second is the one to hold against PNG and other models of pictures: z_i is made from the
    picture itself. The decoder is calibrated on `trained` pictures
    (`training.diffusion.calibration`); unless it learned its variance, the best one for its errors
    there is taken (Bao et al. 2022). `draws`: network calls a picture for t = 2..T, beside one for
    t = 1.
    """
    if not len(judged) or not len(trained):
        raise DataError(
            f"{len(judged)} held-out and {len(trained)} training pictures: bits per dimension "
            "need one of each at least"
        )
    variance: Variance = "learned" if decoder.config.learned_variance else "analytic"
    figures: dict[str, Any] = {
        "T": decoder.schedule.T,
        "draws": draws,
        "variance": variance,
        "calibrated_on": len(trained),
        "png_bits_per_dim": float(
            np.mean([_png_bits(picture) for picture in to_images(judged.x_0)])
        ),
    }
    for condition, w in (("told_all", 1.0), ("told_nothing", 0.0)):
        z_condition, ids_condition = (
            generators(range(seed, seed + len(trained)), Stream.DATA),
            trained.x_0.to(decoder.device),
        )
        denoise = _denoise(decoder, trained, w)
        calibration = calibrate(denoise, ids_condition, decoder.schedule, POINTS, z_condition)
        x_0_error = None
        if variance == "analytic":
            x_0_error = measure_x_0_error(
                calibration(denoise), ids_condition, decoder.schedule, POINTS, z_condition
            )
        batches = ((x_0, calibration(denoise)) for x_0, denoise in _batches(decoder, judged, w))
        figures[condition] = bits_per_dim(
            batches, decoder.schedule, variance, x_0_error, draws, seed=seed
        )
        if len(judged) == 1:
            figures[condition]["standard_error"] = None
    return figures


def inversion(
    decoder: Decoder, pictures: Described, step_counts: Sequence[int]
) -> list[dict[str, Any]]:
    """Carry pictures to noise by DDIM inversion and back by DDIM, told z_i and caption; each
    picture's PSNR by step count.

    With and without a refinement of each inverted step, which costs a network call more. The
    decoder is calibrated on the pictures, as in `manipulate.invert`. Step counts above T are left
    out.
    """
    x_0 = pictures.x_0.to(decoder.device)
    denoise = _denoise(decoder, pictures, 1.0)
    denoise = calibrate(
        denoise, x_0, decoder.schedule, POINTS, generators(range(len(x_0)), Stream.DATA)
    )(denoise)
    rows = []
    for steps in (step_count for step_count in step_counts if step_count <= decoder.schedule.T):
        for refinements in REFINEMENTS:
            x_T = ddim_invert(denoise, x_0, decoder.schedule, steps, refinements)
            back = ddim(denoise, x_T, decoder.schedule, steps)
            image_db = [
                manipulations.psnr_db(a, b)
                for a, b in zip(to_images(back), to_images(x_0), strict=True)
            ]
            rows.append(
                {
                    "steps": steps,
                    "refinements": refinements,
                    "calls": steps * (2 + refinements),
                    "psnr_db": image_db,
                }
            )
    return rows


def _denoise(decoder: Decoder, pictures: Described, w: float) -> Denoise:
    device = decoder.device
    return decoder.guided_denoise(pictures.z_i.to(device), pictures.ids.to(device), w)


def _batches(decoder: Decoder, pictures: Described, w: float) -> Iterator[tuple[Tensor, Denoise]]:
    device = decoder.device
    for start in range(0, len(pictures), BATCH):
        part = slice(start, start + BATCH)
        yield (
            pictures.x_0[part].to(device),
            decoder.guided_denoise(pictures.z_i[part].to(device), pictures.ids[part].to(device), w),
        )


def _png_bits(picture: np.ndarray) -> float:
    """Bits per dimension that PNG at its best spends on a picture, header and all."""
    file = io.BytesIO()
    Image.fromarray(picture).save(file, "png", optimize=True)
    return 8 * file.tell() / picture.size
