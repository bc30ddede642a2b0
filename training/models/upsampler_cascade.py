"""Trained up-samplers, one behind the other: how they are read and what they draw.

Pictures are uint8 (B, H, W, 3). Reads an up-sampler stage's folder; writes nothing.
"""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file

from training.diffusion.noise import Stream
from training.models.pixels import to_float, to_images
from training.models.upsampler import Upsampler, UpsamplerConfig

STREAMS = (Stream.UPSAMPLER, Stream.UPSAMPLER_2)


def load(folder: Path) -> Upsampler:
    """Read a trained up-sampler (its averaged weights) from its stage's folder, in evaluation
    mode.
    """
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
    """Draw pictures (B, H, W, 3) larger by one model behind the other, each from noise of its own;
    `seeds` (B).

    One picture after the other, so that memory grows with one alone.
    """
    for model, stream in zip(models, STREAMS[: len(models)], strict=True):
        low, device = to_float(torch.from_numpy(pictures)), next(model.parameters()).device
        loaded = [
            model.sample(x[None].to(device), [seed], steps, stream=stream)
            for x, seed in zip(low, seeds, strict=True)
        ]
        pictures = np.concatenate([to_images(x) for x in loaded])
    return pictures
