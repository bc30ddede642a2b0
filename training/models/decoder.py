"""The decoder: a U-Net that draws an image from a CLIP image embedding z_i and a caption (unCLIP,
section 2.1; GLIDE's U-Net).

z_i is added to the timestep embedding and becomes extra context tokens after the caption's; image
tokens attend to both. The network predicts x_0 by default. Knows nothing of CLIP's weights or of
files.
Legend: B batch, N context tokens, D width, E embedding dimensions, C channels, S side, H heads.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from training.diffusion import samplers
from training.diffusion.likelihood import hybrid_loss
from training.diffusion.noise import Stream, generators, noise
from training.diffusion.process import (
    Denoise,
    Prediction,
    Schedule,
    as_denoise,
    simple_loss,
    snr_weight,
    split,
    training_target,
)
from training.diffusion.variance import Variance
from training.models.diffusion_prior import without_captions
from training.models.tokenizer import PAD
from training.models.transformer import TextEncoder, attend, heads_of, time_features
from training.optim.step import Step
from training.sections.clip_section import ClipConfig
from training.sections.decoder_section import GROUPS, DecoderConfig

# Streams of randomness in a step.
DROP_Z, DROP_TEXT, TIME, NOISE, Z_LEVEL, Z_NOISE = 1, 2, 3, 4, 5, 6


@dataclass(frozen=True)
class Condition:
    """The conditions of a batch, computed once for all steps."""

    added: Tensor  # (B, 4D), added to the time embedding
    context: Tensor  # (B, N, D_text)
    is_key: Tensor  # bool (B, N), false for padding


class ResBlock(nn.Module):
    """norm, conv, modulation by the time embedding, conv; the last conv starts at zero.

    Dhariwal & Nichol 2021.
    """

    def __init__(self, before: int, after: int, added: int, dropout: float) -> None:
        super().__init__()
        self.norm_1, self.norm_2 = nn.GroupNorm(GROUPS, before), nn.GroupNorm(GROUPS, after)
        self.conv_1, self.conv_2 = (
            nn.Conv2d(before, after, 3, padding=1),
            nn.Conv2d(after, after, 3, padding=1),
        )
        self.modulate = nn.Linear(added, 2 * after)
        self.dropout = nn.Dropout(dropout)
        self.skip = nn.Conv2d(before, after, 1) if before != after else nn.Identity()
        nn.init.zeros_(self.conv_2.weight)

    def forward(self, x: Tensor, added: Tensor) -> Tensor:
        """Map (B, C, S, S) to (B, C', S, S)."""
        h = self.conv_1(F.silu(self.norm_1(x)))
        scale, shift = self.modulate(added)[:, :, None, None].chunk(2, 1)
        h = self.conv_2(self.dropout(F.silu(self.norm_2(h) * (1 + scale) + shift)))
        return self.skip(x) + h


class ContextAttention(nn.Module):
    """Positions attend to each other and to the context tokens in one softmax (GLIDE)."""

    def __init__(self, width: int, text_width: int) -> None:
        super().__init__()
        self.heads = heads_of(width)
        self.norm, self.norm_context = nn.GroupNorm(GROUPS, width), nn.LayerNorm(text_width)
        self.qkv, self.kv = nn.Linear(width, 3 * width), nn.Linear(text_width, 2 * width)
        self.out = nn.Linear(width, width)
        nn.init.zeros_(self.out.weight)

    def forward(self, x: Tensor, condition: Condition) -> Tensor:
        """Map (B, C, S, S) to the same shape."""
        B, C, S, _ = x.shape
        positions = self.norm(x).flatten(2).transpose(1, 2)  # (B, S*S, C)
        q, k, v = (
            self.qkv(positions)
            .view(B, S * S, 3, self.heads, C // self.heads)
            .permute(2, 0, 3, 1, 4)
        )
        k_c, v_c = (
            self.kv(self.norm_context(condition.context))
            .view(B, -1, 2, self.heads, C // self.heads)
            .permute(2, 0, 3, 1, 4)
        )
        mask = torch.cat([condition.is_key.new_ones(B, S * S), condition.is_key], 1)[:, None, None]
        y = attend(q, torch.cat([k, k_c], 2), torch.cat([v, v_c], 2), mask.expand(B, 1, S * S, -1))
        y = self.out(y.transpose(1, 2).reshape(B, S * S, C))
        return x + y.transpose(1, 2).reshape(B, C, S, S)


class Decoder(nn.Module):
    """The U-Net with its caption encoder and its sampling."""

    def __init__(
        self, config: DecoderConfig, embed_dim: int, vocab_size: int, context: int
    ) -> None:
        super().__init__()
        self.config = config
        self.schedule = _schedule(config)
        added, widths = 4 * config.width, [config.width * multiple for multiple in config.multiples]
        self.text = TextEncoder(vocab_size, context, config.text_width, config.text_depth)
        self.null_z = nn.Parameter(torch.randn(embed_dim) * embed_dim**-0.5)
        self.z_to_added = nn.Linear(embed_dim, added)
        self.z_to_tokens = nn.Linear(embed_dim, config.z_tokens * config.text_width)
        self.text_to_added = nn.Linear(config.text_width, added)
        self.time = nn.Sequential(
            nn.Linear(config.width, added), nn.SiLU(), nn.Linear(added, added)
        )
        self.z_scale = embed_dim**0.5
        folded, side = 3 * config.patch_px**2, config.image_size_px // config.patch_px
        self.enter = nn.Conv2d(folded, widths[0], 3, padding=1)
        self.places = nn.Parameter(torch.randn(1, widths[0], side, side) * 0.1)
        self.down, self.up = nn.ModuleList(), nn.ModuleList()
        before, skips = widths[0], [widths[0]]
        for level, after in enumerate(widths):
            for _ in range(config.depth):
                self.down.append(self._level(before, after, side, added))
                before = after
                skips.append(after)
            if level < len(widths) - 1:
                self.down.append(nn.Conv2d(after, after, 3, stride=2, padding=1))
                skips.append(after)
                side //= 2
        self.layout = nn.Linear(added, before * side * side) if config.layout else None
        self.middle = nn.ModuleList(
            [
                self._level(before, before, side, added),
                ResBlock(before, before, added, config.dropout),
            ]
        )
        for level, after in reversed(list(enumerate(widths))):
            for _ in range(config.depth + 1):
                self.up.append(self._level(before + skips.pop(), after, side, added))
                before = after
            if level:
                self.up.append(Upsample(before))
                side *= 2
        self.norm = nn.GroupNorm(GROUPS, before)
        self.leave = nn.Conv2d(before, folded * (2 if config.learned_variance else 1), 3, padding=1)
        nn.init.zeros_(self.leave.weight)
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def _level(self, before: int, after: int, side: int, added: int) -> nn.Module:
        config = self.config
        block = ResBlock(before, after, added, config.dropout)
        return (
            nn.ModuleList([block, ContextAttention(after, config.text_width)])
            if side in config.attention_px
            else block
        )

    def condition(
        self,
        z_i: Tensor,
        ids: Tensor,
        drop_z: Tensor | None = None,
        drop_text: Tensor | None = None,
    ) -> Condition:
        """Encode unit vectors z_i (B, E) and caption ids (B, N).

        Rows where `drop_z` or `drop_text`, bool (B,), is set get the null z or the empty caption.
        """
        z = z_i * self.z_scale
        if drop_z is not None:
            z = torch.where(drop_z[:, None], self.null_z * self.z_scale, z)
        if drop_text is not None:
            ids = without_captions(ids, drop_text)
        is_word = ids != PAD
        hidden = self.text(ids)
        pooled = (hidden * is_word[..., None]).sum(1) / is_word.sum(1, keepdim=True)
        tokens = self.z_to_tokens(z).view(len(z), self.config.z_tokens, -1)
        context = torch.cat([hidden, tokens], 1)
        is_key = torch.cat([is_word, is_word.new_ones(len(z), self.config.z_tokens)], 1)
        return Condition(self.z_to_added(z) + self.text_to_added(pooled), context, is_key)

    @property
    def device(self) -> torch.device:
        """Device of the weights."""
        return self.null_z.device

    @property
    def variance(self) -> Variance:
        """The variance of an ancestral step: the learned one, or else the posterior's."""
        return "learned" if self.config.learned_variance else "small"

    def forward(self, x_t: Tensor, t: Tensor, condition: Condition) -> Prediction:
        """Predict what `parametrisation` names, float32 (B, 3, S, S).

        Takes noised images in [-1, 1], (B, 3, S, S), and times (B,). If the variance is learned,
        returns a pair with its fraction in [0, 1], of the same shape.
        """
        added = F.silu(self.time(time_features(t, self.config.width)) + condition.added)
        x = F.pixel_unshuffle(x_t, self.config.patch_px).contiguous(
            memory_format=torch.channels_last
        )
        x = self.enter(x) + self.places
        skips = [x]
        for layer in self.down:
            x = self._run(layer, x, added, condition)
            skips.append(x)
        if self.layout is not None:
            x = x + self.layout(added).view(len(x), x.shape[2], x.shape[3], x.shape[1]).permute(
                0, 3, 1, 2
            )  # (B, C, S, S)
        for layer in self.middle:
            x = self._run(layer, x, added, condition)
        for layer in self.up:
            if not isinstance(layer, Upsample):
                x = torch.cat([x, skips.pop()], 1)
            x = self._run(layer, x, added, condition)
        x = self.leave(F.silu(self.norm(x)))
        x = F.pixel_shuffle(x, self.config.patch_px).float()
        if not self.config.learned_variance:
            return x.contiguous()
        # `leave` starts at zero, so the fraction starts at 0.5
        prediction, fraction = x.chunk(2, 1)
        return prediction.contiguous(), fraction.sigmoid()

    @staticmethod
    def _run(layer: nn.Module, x: Tensor, added: Tensor, condition: Condition) -> Tensor:
        if isinstance(layer, nn.ModuleList):
            return layer[1](layer[0](x, added), condition)
        return layer(x, added) if isinstance(layer, ResBlock) else layer(x)

    def loss(self, step: Step, x_0: Tensor, z_i: Tensor, ids: Tensor) -> Tensor:
        """Return the SNR-weighted loss of images x_0 in [-1, 1], (b, 3, S, S).

        z_i are unit vectors (b, E), ids caption ids (b, N). If the variance is learned, 0.001 L_vlb
        is added, which trains only the variance. Times are drawn as `time_power` says, which
        weights the terms of L_vlb but does not change the best variance at any time.
        """
        config, device = self.config, x_0.device
        drop_z = step.uniform(DROP_Z) < config.z_drop
        drop_text = step.uniform(DROP_TEXT) < config.text_drop
        t = (1 + step.uniform(TIME) ** (1 / config.time_power) * config.T).long()
        t = t.clamp_(max=config.T).to(device)
        eps = step.normal(NOISE, *x_0.shape[1:]).to(device)
        if config.z_noise > 0:
            level = step.uniform(Z_LEVEL) * config.z_noise
            z_eps = step.normal(Z_NOISE, z_i.shape[1])
            z_i = augmented(z_i, level.to(device), z_eps.to(device))
        condition = self.condition(z_i, ids, drop_z.to(device), drop_text.to(device))
        prediction, fraction = split(self(self.schedule.q_sample(x_0, t, eps), t, condition))
        weight = snr_weight(
            self.schedule, t, config.snr_ceiling, config.snr_floor, config.parametrisation
        )
        if fraction is not None:
            return hybrid_loss(
                self.schedule, x_0, eps, t, (prediction, fraction), config.parametrisation, weight
            )
        return simple_loss(
            prediction, training_target(self.schedule, x_0, eps, t, config.parametrisation), weight
        )

    @torch.no_grad()
    def sample(
        self,
        z_i: Tensor,
        ids: Tensor,
        seeds: list[int],
        steps: int | None = None,
        guidance: float | None = None,
    ) -> Tensor:
        """Draw an image, float32 (B, 3, S, S) in [-1, 1], for every row of z_i (B, E), ids (B, N)
        and seeds.

        The rows are independent. steps, guidance: None for the config's values.
        """
        w = self.config.guidance if guidance is None else guidance
        S, sample_generators = self.config.image_size_px, generators(seeds, Stream.DECODER)
        x_T = noise((len(z_i), 3, S, S), sample_generators, z_i.device)
        denoise, count = self.guided_denoise(z_i, ids, w), steps or self.config.sampling_steps
        if self.config.sampler == "ancestral":
            return samplers.ancestral(
                denoise,
                x_T,
                self.schedule,
                count,
                self.variance,
                options=samplers.SamplerOptions(generator=sample_generators),
            ).clamp_(-1, 1)
        sampler = samplers.ddim if self.config.sampler == "ddim" else samplers.dpm_solver
        return sampler(denoise, x_T, self.schedule, count).clamp_(-1, 1)

    def guided_denoise(self, z_i: Tensor, ids: Tensor, w: float) -> Denoise:
        """Return `denoise(x_t, t) -> x_0` under these conditions, with guidance weight w.

        It makes one network call for each step. w = 0 ignores the conditions.
        """
        parametrisation = self.config.parametrisation
        if w in (0, 1):  # only one of the two halves is needed
            is_dropped = torch.full((len(z_i),), w == 0, device=z_i.device)
            condition = self.condition(z_i, ids, is_dropped, is_dropped)
            return as_denoise(
                lambda x_t, t: self(x_t, t, condition), self.schedule, parametrisation, clip=1.0
            )
        drop = torch.arange(2 * len(z_i), device=z_i.device) >= len(z_i)
        condition = self.condition(z_i.repeat(2, 1), ids.repeat(2, 1), drop, drop)
        both = as_denoise(lambda x_t, t: self(x_t, t, condition), self.schedule, parametrisation)
        return samplers.guided(both, w, self.config.dynamic_threshold, clip=1.0)


def _schedule(config: DecoderConfig) -> Schedule:
    """Return the diffusion schedule, on the CPU even under `count_parameters`' meta device.

    Its values are checked, which a meta tensor does not allow.
    """
    with torch.device("cpu"):
        schedule = Schedule.cosine(config.T)
        return schedule.shifted(config.snr_shift) if config.snr_shift != 1 else schedule


def augmented(z_i: Tensor, level: Tensor, eps: Tensor) -> Tensor:
    """Add noise to embeddings z_i (B, E) and rescale them to their length.

    eps ~ N(0, I), (B, E); the noise is about `level` (B,) times as long as z_i.
    """
    length = z_i.norm(dim=1, keepdim=True)
    return F.normalize(z_i + eps * (level[:, None] * length / z_i.shape[1] ** 0.5), dim=1) * length


class Upsample(nn.Module):
    """Nearest-neighbour upsampling by 2, then a convolution."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, C, S, S) to (B, C, 2S, 2S)."""
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


def count_parameters(
    config: DecoderConfig, clip: ClipConfig, vocab_size: int, context: int = 77
) -> int:
    """Count the decoder's parameters without allocating them."""
    with torch.device("meta"):
        return sum(
            p.numel() for p in Decoder(config, clip.embed_dim, vocab_size, context).parameters()
        )
