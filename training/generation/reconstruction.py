"""How well the decoder explains images it was not trained on: bits per dimension, and DDIM
inversion by step count.

Reads an `embed` folder and ingest's shards, or image files; writes nothing.
Legend: N images, E embedding dimensions, S the decoder's side.
"""

import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypedDict

import numpy as np
import pyarrow as pa
import torch
from PIL import Image
from torch import Tensor

from infra.errors import DataError
from infra.storage.shard_reader import ShardReader
from training.data import embedding_dataset
from training.data.image_reader import LOCATION, Pictures
from training.diffusion.calibration import calibrate
from training.diffusion.likelihood import BitsPerDim, bits_per_dim
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
"""Number of times at which the decoder's error is measured, for its calibration and for the
analytic variance."""
REFINEMENTS = (0, 1)


@dataclass(frozen=True)
class Described:
    """Images with their conditions for the decoder."""

    x_0: Tensor  # (N, 3, S, S) in [-1, 1]
    z_i: Tensor  # (N, E)
    ids: Tensor  # (N, tokens)
    captions: list[str]
    keys: list[str]

    def __len__(self) -> int:
        return len(self.x_0)

    def first(self, count: int) -> "Described":
        """Return the first `count` images."""
        return self._part(slice(count))

    def halves(self) -> tuple["Described", "Described"]:
        """Return the first half and the second half; an odd image at the end is dropped."""
        half = len(self) // 2
        return self._part(slice(half)), self._part(slice(half, 2 * half))

    def _part(self, part: slice) -> "Described":
        return Described(
            self.x_0[part], self.z_i[part], self.ids[part], self.captions[part], self.keys[part]
        )


def read(
    embed: Path,
    shards: ShardReader,
    split: str,
    tokenizer: Tokenizer,
    side_px: int,
    max_images: int,
    seed: int,
) -> Described:
    """Read images of a split, at most one of each concept so that they are independent.

    The seed chooses which.
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
    """Read a person's image files, without captions for the decoder; file names are the captions
    shown.

    Raises CallerError for a file that is not an image.
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


class Likelihood(TypedDict):
    """Bounds in bits per dimension, with what they were measured by."""

    T: int
    draws: int
    variance: Variance
    calibrated_on: int
    """Number of training images."""
    png_bits_per_dim: float
    told_all: BitsPerDim
    told_nothing: BitsPerDim


def likelihood(
    decoder: Decoder, judged: Described, trained: Described, draws: int, seed: int
) -> Likelihood:
    """Return upper bounds on -log2 p(x_0) in bits per dimension of `judged`, with and without
    conditions.

    Without conditions ("told_nothing") the bound is comparable with PNG and other models of images;
    with z_i and caption ("told_all") it is not, since z_i is computed from the image itself. The
    decoder is calibrated on `trained` images (`training.diffusion.calibration`). If it did not
    learn its variance, the best one for its errors on them is used (Bao et al. 2022). draws:
    network calls for each image for t = 2..T, plus one for t = 1. Raises DataError if one of the
    sets is empty.
    """
    if not len(judged) or not len(trained):
        raise DataError(
            f"{len(judged)} held-out and {len(trained)} training pictures: bits per dimension "
            "needs at least one of each"
        )
    variance: Variance = "learned" if decoder.config.learned_variance else "analytic"
    bounds: list[BitsPerDim] = []
    for w in (1.0, 0.0):
        data_generators = generators(range(seed, seed + len(trained)), Stream.DATA)
        trained_x_0 = trained.x_0.to(decoder.device)
        denoise = _denoise(decoder, trained, w)
        calibration = calibrate(denoise, trained_x_0, decoder.schedule, POINTS, data_generators)
        x_0_error = None
        if variance == "analytic":
            x_0_error = measure_x_0_error(
                calibration(denoise), trained_x_0, decoder.schedule, POINTS, data_generators
            )
        batches = ((x_0, calibration(denoise)) for x_0, denoise in _batches(decoder, judged, w))
        bound = bits_per_dim(batches, decoder.schedule, variance, x_0_error, draws, seed=seed)
        if len(judged) == 1:
            bound["standard_error"] = None
        bounds.append(bound)
    told_all, told_nothing = bounds
    return {
        "T": decoder.schedule.T,
        "draws": draws,
        "variance": variance,
        "calibrated_on": len(trained),
        "png_bits_per_dim": float(
            np.mean([_png_bits(picture) for picture in to_images(judged.x_0)])
        ),
        "told_all": told_all,
        "told_nothing": told_nothing,
    }


class InversionRow(TypedDict):
    """Result of DDIM inversion with one number of steps and refinements."""

    steps: int
    refinements: int
    calls: int
    """Network calls for one image, there and back."""
    psnr_db: list[float]
    """One for each image."""


def inversion(
    decoder: Decoder, pictures: Described, step_counts: Sequence[int]
) -> list[InversionRow]:
    """Map images to noise by DDIM inversion and back by DDIM; return each image's PSNR by step
    count.

    With z_i and caption, and with and without a refinement of each inverted step, which costs one
    more network call. The decoder is calibrated on the images, as in `manipulations.invert`. Step
    counts above T are skipped.
    """
    x_0 = pictures.x_0.to(decoder.device)
    denoise = _denoise(decoder, pictures, 1.0)
    denoise = calibrate(
        denoise, x_0, decoder.schedule, POINTS, generators(range(len(x_0)), Stream.DATA)
    )(denoise)
    rows: list[InversionRow] = []
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
    """Return the bits per dimension of an image as an optimised PNG file, header included."""
    file = io.BytesIO()
    Image.fromarray(picture).save(file, "png", optimize=True)
    return 8 * file.tell() / picture.size
