"""DALLE2-pytorch in its own environment (`make peers`): its import and its models, for the
benchmarks' processes.

What it merely imports (trainers, augmentations, a VQ-GAN, other CLIPs) is stood in for by empty
modules; nothing of that is called.
Knows nothing of ours.
"""

import importlib.machinery
import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from types import ModuleType
from typing import Any

from torch import nn

ONLY_IMPORTED = (
    "accelerate",
    "coca_pytorch",
    "ema_pytorch",
    "kornia",
    "open_clip",
    "pytorch_warmup",
    "torchvision",
    "vector_quantize_pytorch",
    "x_clip",
)


class _Empty(ModuleType):
    """A module in which every name is an empty class."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (), {})


class _Finder(MetaPathFinder, Loader):
    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> Any:
        if name.split(".")[0] in ONLY_IMPORTED:
            return importlib.machinery.ModuleSpec(name, self, is_package=True)
        return None

    def create_module(self, spec: Any) -> ModuleType:
        return _Empty(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        return None


def import_dalle2() -> Any:
    """Import it."""
    sys.meta_path.insert(0, _Finder())
    import dalle2_pytorch

    return dalle2_pytorch


def make_prior(dalle2: Any, told: dict[str, Any]) -> nn.Module:
    """Return its diffusion prior on ready embeddings and text encodings; its width is the
    embedding's.
    """
    network = dalle2.DiffusionPriorNetwork(
        dim=told["embed_dim"],
        depth=told["depth"],
        dim_head=64,
        heads=told["heads"],
        num_timesteps=1000,
        max_text_len=told["text_len"],
    )
    return dalle2.DiffusionPrior(
        network,
        image_embed_dim=told["embed_dim"],
        timesteps=1000,
        sample_timesteps=64,
        cond_drop_prob=0.1,
        condition_on_text_encodings=told["text_len"] > 0,
    )


def make_decoder(dalle2: Any, told: dict[str, Any]) -> nn.Module:
    """Return its decoder of one U-Net, told z_i and text encodings, with the learned variance of
    the paper.
    """
    unet = dalle2.Unet(
        dim=told["dim"],
        image_embed_dim=told["embed_dim"],
        text_embed_dim=told["embed_dim"],
        cond_dim=told["cond_dim"],
        channels=3,
        dim_mults=tuple(told["dim_mults"]),
        num_resnet_blocks=told["blocks"],
        cond_on_text_encodings=True,
        max_text_len=told["text_len"],
    )
    return dalle2.Decoder(
        unet,
        image_size=told["side_px"],
        timesteps=1000,
        sample_timesteps=told.get("sampling_steps"),
    )
