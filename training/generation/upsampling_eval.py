"""A trained up-sampler against interpolation on images whose large form is known, and its peak
memory.

Images are uint8 (B, H, W, 3). Reads and writes no files.
"""

from typing import Any, TypedDict

import cv2
import numpy as np
import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from training.generation.manipulations import psnr_db
from training.generation.unclip import SEED_STRIDE
from training.models.pixels import to_float, to_images
from training.models.upsampler import Upsampler, shrink
from training.models.upsampler_cascade import enlarge

INTERPOLATIONS = {"bicubic": cv2.INTER_CUBIC, "lanczos": cv2.INTER_LANCZOS4}


class PsnrFigures(TypedDict):
    """How near enlarged images come to n real ones, by way of enlarging."""

    n: int
    psnr_db: dict[str, float]
    standard_error_db: dict[str, float]
    """Empty for a single image."""
    better_than: dict[str, float]
    """Share of images on which the up-sampler beats an interpolation."""


def interpolate(pictures: np.ndarray, factor: int, name: str) -> np.ndarray:
    """Return images at `factor` times their sides by one of INTERPOLATIONS."""
    size = (pictures.shape[2] * factor, pictures.shape[1] * factor)
    return np.stack(
        [cv2.resize(picture, size, interpolation=INTERPOLATIONS[name]) for picture in pictures]
    )


def compare(
    model: Upsampler, pictures: np.ndarray, seed: int = 0
) -> tuple[PsnrFigures, dict[str, np.ndarray]]:
    """Shrink images, enlarge them again in every way, and return figures and images.

    Images are (B, S, S, 3) by name; "small" are the shrunken ones.
    """
    factor = model.config.factor
    small = to_images(shrink(to_float(torch.from_numpy(pictures)), factor))
    results = {
        "small": small,
        **{name: interpolate(small, factor, name) for name in INTERPOLATIONS},
    }
    seeds = [seed * SEED_STRIDE + number for number in range(len(small))]
    results |= {"up-sampler": enlarge([model], small, seeds), "real": pictures}
    psnr = {
        name: np.array([psnr_db(a, b) for a, b in zip(results[name], pictures, strict=True)])
        for name in results
        if name not in ("small", "real")
    }
    figures: PsnrFigures = {
        "n": len(pictures),
        "psnr_db": {name: round(float(values.mean()), 3) for name, values in psnr.items()},
        "standard_error_db": {
            name: round(float(values.std(ddof=1) / len(values) ** 0.5), 3)
            for name, values in psnr.items()
        }
        if len(pictures) > 1
        else {},
        "better_than": {
            name: round(float((psnr["up-sampler"] > psnr[name]).mean()), 3)
            for name in INTERPOLATIONS
        },
    }
    return figures, results


def peak_bytes(model: Upsampler, side_px: int, tile_px: int | None = None) -> int:
    """Measure the peak memory of tensors, without the weights, while an image is sampled for one
    step.

    side_px: the side of the enlarged image.
    """
    side = side_px // model.config.factor
    with _Held() as held:
        model.sample(torch.zeros(1, 3, side, side), [0], steps=1, tile_px=tile_px)
    return held.peak


class _Held(TorchDispatchMode):
    """Sums the storages of all live tensors that operators made; kernels' scratch memory is not
    seen.
    """

    def __init__(self) -> None:
        super().__init__()
        self.alive: dict[int, tuple[StorageWeakRef, int]] = {}
        self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        inputs = [value for value in tree_leaves((args, kwargs)) if isinstance(value, Tensor)]
        input_storages = {value.untyped_storage()._cdata for value in inputs}
        for value in tree_leaves(result):
            if isinstance(value, Tensor) and value.untyped_storage()._cdata not in input_storages:
                storage = value.untyped_storage()
                self.alive[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        self.alive = {
            address: (storage, size)
            for address, (storage, size) in self.alive.items()
            if not storage.expired()
        }
        self.peak = max(self.peak, sum(size for _, size in self.alive.values()))
        return result
