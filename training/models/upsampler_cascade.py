"""A chain of trained up-samplers: loading them and enlarging images with them.

Images are uint8 (B, H, W, 3). Reads an up-sampler stage's folder; writes nothing.
"""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file

from training.diffusion.noise import Stream
from training.models.pixels import to_float, to_images
from training.models.upsampler import Upsampler
from training.sections.upsampler_section import UpsamplerConfig

STREAMS = (Stream.UPSAMPLER, Stream.UPSAMPLER_2)


def load(folder: Path) -> Upsampler:
    """Read a trained up-sampler (averaged weights) from its stage's folder, in evaluation mode."""
    facts = json.loads((folder / "config.json").read_text())
    model = Upsampler(UpsamplerConfig.model_validate(facts["upsampler"]))
    model.load_state_dict(load_file(folder / "weights.safetensors"))
    return model.eval().requires_grad_(False)


def enlarge(
    models: Sequence[Upsampler],
    pictures: np.ndarray,
    seeds: Sequence[int],
    steps: int | None = None,
) -> np.ndarray:
    """Enlarge images (B, H, W, 3) with one model after another, each with its own noise.

    seeds: one for each image. Images are enlarged one at a time, so that the memory in use is one
    image's.
    """
    for model, stream in zip(models, STREAMS[: len(models)], strict=True):
        low, device = to_float(torch.from_numpy(pictures)), next(model.parameters()).device
        loaded = [
            model.sample(x[None].to(device), [seed], steps, stream=stream)
            for x, seed in zip(low, seeds, strict=True)
        ]
        pictures = np.concatenate([to_images(x) for x in loaded])
    return pictures
