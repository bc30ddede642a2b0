"""An up-sampler: a convolutional diffusion model that draws an image at several times its side
(unCLIP, section 2.1; ADM's U-Net).

It sees the noised image next to the enlarged small one. It has no attention and no other condition,
and is trained on crops, so it can sample any size in tiles: only the image itself grows with the
size, not the network's memory. It predicts x_0 as the enlarged image plus a difference that starts
at zero. Knows nothing of files.
Legend: B batch, C channels, H x W the small image, f the factor, S a side in pixels.
"""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from training.diffusion import samplers
from training.diffusion.noise import Stream, generators, noise
from training.diffusion.process import Schedule, as_denoise, simple_loss, snr_weight
from training.models.decoder import ResBlock, Upsample
from training.models.pixels import to_float
from training.models.transformer import time_features
from training.optim.step import Step
from training.sections.decoder_section import GROUPS
from training.sections.upsampler_section import UpsamplerConfig

TIME, NOISE, CROP, DEGRADE, IS_DEGRADED = 1, 2, 3, 4, 5  # streams of randomness in a step
TILES_AT_ONCE = 16


class Upsampler(nn.Module):
    """The convolutional U-Net with its loss and its tiled sampling."""

    def __init__(self, config: UpsamplerConfig) -> None:
        super().__init__()
        self.config = config
        # The schedule's values are checked, which `count_parameters`' meta device cannot do.
        with torch.device("cpu"):
            self.schedule = (
                Schedule.cosine(config.T)
                if config.noise_schedule == "cosine"
                else Schedule.linear(config.T)
            )
        added, widths = 4 * config.width, [config.width * multiple for multiple in config.multiples]
        folded = 3 * config.patch_px**2
        self.time = nn.Sequential(
            nn.Linear(config.width, added), nn.SiLU(), nn.Linear(added, added)
        )
        self.enter = nn.Conv2d(2 * folded, widths[0], 3, padding=1)
        self.down, self.up = nn.ModuleList(), nn.ModuleList()
        before, skips = widths[0], [widths[0]]
        for level, after in enumerate(widths):
            for _ in range(config.depth):
                self.down.append(ResBlock(before, after, added, config.dropout))
                before = after
                skips.append(after)
            if level < len(widths) - 1:
                self.down.append(nn.Conv2d(after, after, 3, stride=2, padding=1))
                skips.append(after)
        self.middle = nn.ModuleList(
            ResBlock(before, before, added, config.dropout) for _ in range(2)
        )
        for level, after in reversed(list(enumerate(widths))):
            for _ in range(config.depth + 1):
                self.up.append(ResBlock(before + skips.pop(), after, added, config.dropout))
                before = after
            if level:
                self.up.append(Upsample(before))
        self.norm, self.leave = (
            nn.GroupNorm(GROUPS, before),
            nn.Conv2d(before, folded, 3, padding=1),
        )
        for p in self.leave.parameters():
            nn.init.zeros_(p)
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def forward(self, x_t: Tensor, t: Tensor, enlarged: Tensor) -> Tensor:
        """Predict x_0, float32 (B, 3, S, S').

        Takes noised images, times (B,) and the enlarged small images; images are in [-1, 1].
        """
        added = F.silu(self.time(time_features(t, self.config.width)))
        x = F.pixel_unshuffle(torch.cat([x_t, enlarged], 1), self.config.patch_px).contiguous(
            memory_format=torch.channels_last
        )
        x = self.enter(x)
        skips = [x]
        for layer in self.down:
            x = _run(layer, x, added)
            skips.append(x)
        for layer in self.middle:
            x = layer(x, added)
        for layer in self.up:
            if not isinstance(layer, Upsample):
                x = torch.cat([x, skips.pop()], 1)
            x = _run(layer, x, added)
        x = self.leave(F.silu(self.norm(x)))
        return enlarged + F.pixel_shuffle(x, self.config.patch_px).float()

    def loss(self, step: Step, pictures: Tensor) -> Tensor:
        """Return the min-SNR weighted error of x_0 on crops of images, uint8 (b, S, S, 3)."""
        from training.models import degradation  # needs OpenCV, which only training has

        config, device = self.config, next(self.parameters()).device
        x_0 = to_float(crops(pictures, config.crop_px, step.uniform(CROP, 2))).to(device)
        seeds = (step.uniform(DEGRADE).double() * 2**53).long().tolist()
        low = shrink(x_0, config.factor).cpu()
        low = degradation.apply(
            config.degradation, low, step.uniform(IS_DEGRADED) < config.degraded_share, seeds
        ).to(device)
        t = (1 + step.uniform(TIME) * config.T).long().clamp_(max=config.T).to(device)
        eps = step.normal(NOISE, *x_0.shape[1:]).to(device)
        prediction = self(self.schedule.q_sample(x_0, t, eps), t, enlarge(low, config.factor))
        return simple_loss(
            prediction,
            x_0,
            snr_weight(self.schedule, t, config.min_snr_gamma, parametrisation="x_0"),
        )

    @torch.no_grad()
    def sample(
        self,
        low: Tensor,
        seeds: list[int],
        steps: int | None = None,
        tile_px: int | None = None,
        stream: int = Stream.UPSAMPLER,
    ) -> Tensor:
        """Enlarge images in [-1, 1], (B, 3, H, W), to float32 (B, 3, f H, f W), each by its own
        seed.

        The network sees tiles of `tile_px` (default: the side of a training crop) that overlap by a
        quarter and are blended at every step, so its memory does not grow with the image. stream:
        each up-sampler of a chain needs its own, so that they do not start from the same noise.
        """
        config = self.config
        tile = (tile_px or config.crop_px) // config.factor
        height, width = low.shape[2:]
        low = F.pad(low, (0, max(0, tile - width), 0, max(0, tile - height)), mode="replicate")
        enlarged = enlarge(low, config.factor)
        x_T = noise(enlarged.shape, generators(seeds, stream), enlarged.device)

        def network(x_t: Tensor, t: Tensor) -> Tensor:
            total, weight = torch.zeros_like(x_t), x_t.new_zeros(1, 1, *x_t.shape[2:])
            window = _window(tile * config.factor, x_t)
            for row in range(len(x_t)):
                for corners in _chunks(list(tiles(low.shape[2], low.shape[3], tile))):
                    parts = [
                        (
                            slice(None),
                            *(
                                slice(config.factor * offset, config.factor * (offset + tile))
                                for offset in corner
                            ),
                        )
                        for corner in corners
                    ]
                    noised, beside = (
                        torch.stack([x[row][part] for part in parts]) for x in (x_t, enlarged)
                    )
                    predictions = self(noised, t[:1].expand(len(parts)), beside)
                    for part, x_0 in zip(parts, predictions, strict=True):
                        total[row][part] += x_0 * window
                        if row == 0:
                            weight[0][part] += window
            return total.div_(weight)

        denoise = as_denoise(network, self.schedule, "x_0", clip=1.0)
        x_0 = samplers.ddim(denoise, x_T, self.schedule, steps or config.sampling_steps)
        return x_0[:, :, : height * config.factor, : width * config.factor]


def _run(layer: nn.Module, x: Tensor, added: Tensor) -> Tensor:
    return layer(x, added) if isinstance(layer, ResBlock) else layer(x)


def crops(pictures: Tensor, side_px: int, chance: Tensor) -> Tensor:
    """Crop a square of that side from each image, uint8 (B, S, S, 3).

    chance: random position in [0, 1), (B, 2).
    """
    room = pictures.shape[1] - side_px + 1
    corners = (chance * room).long().tolist()
    return torch.stack(
        [
            picture[top : top + side_px, left : left + side_px]
            for picture, (top, left) in zip(pictures, corners, strict=True)
        ]
    )


def shrink(pictures: Tensor, factor: int) -> Tensor:
    """Return images (B, 3, H, W) at 1 / factor of their side, by area."""
    return F.avg_pool2d(pictures, factor)


def enlarge(pictures: Tensor, factor: int) -> Tensor:
    """Return images (B, 3, H, W) at `factor` times their side, bicubic, clamped to [-1, 1].

    The network's prediction is added to this image.
    """
    return F.interpolate(
        pictures, scale_factor=float(factor), mode="bicubic", align_corners=False
    ).clamp_(-1, 1)


def tiles(height: int, width: int, side: int) -> Iterator[tuple[int, int]]:
    """Yield corners of squares that cover height x width and overlap by at least a quarter."""
    step = max(1, side * 3 // 4)
    for top in [*range(0, height - side, step), height - side]:
        for left in [*range(0, width - side, step), width - side]:
            yield top, left


def _chunks(corners: list[tuple[int, int]]) -> Iterator[list[tuple[int, int]]]:
    for start in range(0, len(corners), TILES_AT_ONCE):
        yield corners[start : start + TILES_AT_ONCE]


def _window(side_px: int, like: Tensor) -> Tensor:
    """Return the weights of a tile's pixels, (side, side): 1 inside, low at the edges, never 0."""
    ramp = torch.arange(1, side_px + 1, device=like.device, dtype=like.dtype)
    edge = torch.minimum(ramp, ramp.flip(0)).div_(max(1, side_px // 4)).clamp_(max=1)
    return edge[:, None] * edge


def count_parameters(config: UpsamplerConfig) -> int:
    """Count the up-sampler's parameters without allocating them."""
    with torch.device("meta"):
        return sum(p.numel() for p in Upsampler(config).parameters())
