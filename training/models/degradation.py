"""Degradation of the small images that an up-sampler trains on, so that it removes a decoder's
faults instead of enlarging them.

`blur`: Gaussian, 3 pixels wide (unCLIP's first up-sampler). `bsr`: blur, resizing down or up and
back, noise and JPEG in a random order, as in latent diffusion's BSR degradation (Zhang et al. 2021,
arXiv 2103.14006; unCLIP's second up-sampler).
Legend: B batch, H x W the small image.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

if TYPE_CHECKING:  # the up-sampler imports this module
    from training.sections.upsampler_section import Degradation

BLUR_WIDTH, BLUR_SIGMA = 3, 0.6  # unCLIP, appendix C
MAX_NOISE = 25 / 255  # standard deviation for values in 0..1
JPEG_QUALITY = (30, 95)
RESIZES = (cv2.INTER_AREA, cv2.INTER_LINEAR, cv2.INTER_CUBIC)


def blur(pictures: Tensor) -> Tensor:
    """Blur images (B, 3, H, W) by a Gaussian of sigma 0.6 in a 3 x 3 window, edges mirrored."""
    return gaussian(pictures, BLUR_WIDTH, BLUR_SIGMA)


def gaussian(pictures: Tensor, width: int, sigma: float) -> Tensor:
    """Blur images (B, C, H, W) by a Gaussian in a window of odd `width`, with mirrored edges."""
    offset = torch.arange(width, dtype=torch.float32) - width // 2
    line = torch.exp(-(offset**2) / (2 * sigma**2))
    kernel = (
        (line[:, None] * line / line.sum() ** 2)
        .to(pictures)
        .expand(pictures.shape[1], 1, width, width)
    )
    return F.conv2d(
        F.pad(pictures, [width // 2] * 4, mode="reflect"), kernel, groups=pictures.shape[1]
    )


def bsr(picture: np.ndarray, draw: np.random.Generator) -> np.ndarray:
    """Degrade one image, float32 (H, W, 3) in 0..1, by blur, resizing, noise and JPEG.

    Their order and strength are random; the size stays the same.
    """
    steps: list[Callable[[np.ndarray, np.random.Generator], np.ndarray]] = [
        _blurred,
        _resized,
        _noisy,
        _blurred,
    ]
    for step in draw.permutation(len(steps)):
        picture = steps[step](picture, draw)
    return _compressed(picture, draw)


def _blurred(picture: np.ndarray, draw: np.random.Generator) -> np.ndarray:
    across, along, turn = draw.uniform(0.1, 1.2), draw.uniform(0.1, 1.2), draw.uniform(0, np.pi)
    y, x = np.mgrid[-2:3, -2:3]
    u, v = np.cos(turn) * x + np.sin(turn) * y, np.cos(turn) * y - np.sin(turn) * x
    kernel = np.exp(-(u**2) / (2 * across**2) - v**2 / (2 * along**2))
    return cv2.filter2D(picture, -1, kernel / kernel.sum(), borderType=cv2.BORDER_REFLECT_101)


def _resized(picture: np.ndarray, draw: np.random.Generator) -> np.ndarray:
    height, width = picture.shape[:2]
    there, back = (RESIZES[draw.integers(len(RESIZES))] for _ in range(2))
    scale = draw.uniform(0.5, 1.5)
    middle = cv2.resize(
        picture, (max(1, round(width * scale)), max(1, round(height * scale))), interpolation=there
    )
    return cv2.resize(middle, (width, height), interpolation=back).clip(0, 1)


def _noisy(picture: np.ndarray, draw: np.random.Generator) -> np.ndarray:
    deviation = draw.uniform(0, MAX_NOISE)
    channels = 3 if draw.random() < 0.5 else 1  # colour noise or grey noise
    return (
        picture + deviation * draw.standard_normal((*picture.shape[:2], channels), np.float32)
    ).clip(0, 1)


def _compressed(picture: np.ndarray, draw: np.random.Generator) -> np.ndarray:
    quality = int(draw.integers(JPEG_QUALITY[0], JPEG_QUALITY[1] + 1))
    data = cv2.imencode(
        ".jpg", (picture * 255).round().astype(np.uint8), [cv2.IMWRITE_JPEG_QUALITY, quality]
    )[1]
    decoded = cv2.imdecode(data, cv2.IMREAD_COLOR)
    assert decoded is not None, "OpenCV reads its own JPEG"
    return decoded.astype(np.float32) / 255


def apply(kind: "Degradation", pictures: Tensor, is_degraded: Tensor, seeds: list[int]) -> Tensor:
    """Degrade the images that `is_degraded`, bool (B,), selects, each by its own seed.

    pictures: float32 (B, 3, H, W) in [-1, 1] on the CPU.
    """
    if kind == "none" or not bool(is_degraded.any()):
        return pictures
    if kind == "blur":
        return torch.where(is_degraded[:, None, None, None], blur(pictures), pictures)
    degraded = pictures.clone()
    for index in is_degraded.nonzero()[:, 0].tolist():
        picture = ((pictures[index] + 1) / 2).permute(1, 2, 0).contiguous().numpy()
        degraded[index] = (
            torch.from_numpy(bsr(picture, np.random.default_rng(seeds[index]))).permute(2, 0, 1) * 2
            - 1
        )
    return degraded
