"""Conversion of images between uint8 (B, H, W, 3) and float32 (B, 3, H, W) in [-1, 1].

Files and people use the first form, networks the second.
Legend: B images, H x W pixels, S a side.
"""

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from training.sections.preprocessing import Interpolation


def to_float(pictures: Tensor) -> Tensor:
    """Convert uint8 (B, H, W, 3) to float32 (B, 3, H, W) in [-1, 1]."""
    return pictures.permute(0, 3, 1, 2).float().div_(127.5).sub_(1)


def to_pixels(images: Tensor, side_px: int, interpolation: Interpolation = "area") -> Tensor:
    """Convert square images, uint8 (B, H, H, 3), to float32 (B, 3, S, S) in [-1, 1].

    They are resized if their side is not S.
    """
    x = to_float(images)
    if x.shape[-2:] == (side_px, side_px):
        return x
    if interpolation == "area":
        return F.interpolate(x, (side_px, side_px), mode="area")
    return F.interpolate(x, (side_px, side_px), mode=interpolation, antialias=True).clamp_(-1, 1)


def to_images(x: Tensor) -> np.ndarray:
    """Convert images in [-1, 1], (B, 3, S, S), to uint8 (B, S, S, 3)."""
    return (
        ((x.clamp(-1, 1) + 1) * 127.5)
        .round()
        .to(torch.uint8)
        .permute(0, 2, 3, 1)
        .contiguous()
        .cpu()
        .numpy()
    )
