"""Layout of the pictures of a decoder's latents x_t, for the commands and the report.

`training.generation.latents` draws the images. Reads and writes no files. Legend: B images,
R rows, C columns, S the decoder's side; images are uint8 (S, S, 3).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from training.generation.latents import AcrossTime, Shared
from training.generation.reconstruction import Described
from training.models.pixels import to_images


@dataclass(frozen=True)
class Grid:
    """Images (R, C, S, S, 3) with a label for every row and column."""

    images: np.ndarray
    rows: list[str]
    columns: list[str]


def across_time(frames: AcrossTime, prompts: Sequence[str]) -> Grid:
    """Return a grid of two rows for every prompt: x_t, and the x_0 predicted from it."""
    images = np.stack([frames.x_t, frames.x_0], 1).reshape(-1, *frames.x_t.shape[1:])
    rows = [f"{prompt}: {what}" for prompt in prompts for what in ("x_t", "x_0 predicted from it")]
    return Grid(images, rows, [f"t = {t}" for t in frames.times])


def shared(latents: Shared, pictures: Described, times: Sequence[int]) -> Grid:
    """Return a grid of one row for every image: the image, then for every t its x_t and samples."""
    originals = to_images(pictures.x_0)[:, None]  # (B, 1, S, S, 3)
    parts = [
        np.concatenate([latents.x_t[:, k, None], latents.samples[:, k]], 1)
        for k in range(len(times))
    ]
    count = latents.samples.shape[2]
    columns = [
        "the picture",
        *(
            label
            for t in times
            for label in (f"x_t, t = {t}", *(f"sample {number + 1}" for number in range(count)))
        ),
    ]
    return Grid(np.concatenate([originals, *parts], 1), list(pictures.captions), columns)


def interpolation(
    images: np.ndarray, first: Described, second: Described, times: Sequence[int]
) -> Grid:
    """Return a grid of one row for every pair and t: the first image, the blends, the second."""
    a, b = to_images(first.x_0), to_images(second.x_0)
    rows = [
        np.concatenate([a[pair, None], images[pair, k], b[pair, None]])
        for pair in range(len(images))
        for k in range(len(times))
    ]
    labels = [
        f"t = {t}: {one} to {other}"
        for one, other in zip(first.captions, second.captions, strict=True)
        for t in times
    ]
    weights = [f"w = {weight:.3g}" for weight in np.linspace(0, 1, images.shape[2])]
    return Grid(np.stack(rows), labels, ["A", *weights, "B"])
