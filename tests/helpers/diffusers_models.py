"""diffusers' unCLIP classes: made at a size, put together as its pipeline does without
super-resolution, and what they are trained on.

Text embeddings and encodings come ready. Trained, z_i and z_t are unit vectors times the root of
their dimensions, so that layers see unit
variance; the prior predicts z_i normalised by `clip_mean` and `clip_std`, the decoder noise and the
variance that its pipeline wants.
Legend: B batch, E embedding dimensions, N tokens, S side, T diffusion steps.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from training.diffusion.likelihood import hybrid_loss
from training.diffusion.process import Schedule

STEPS = {"prior": 25, "decoder": 25}  # the pipeline's defaults, as are the weights of its guidance
GUIDANCE = (4.0, 8.0)
Noise = list[torch.Generator] | None


def make_prior(embed_dim: int, tokens: int, heads: int, depth: int) -> nn.Module:
    """Return its prior, 64 times as wide as it has heads."""
    from diffusers import PriorTransformer

    prior = PriorTransformer(
        num_attention_heads=heads,
        attention_head_dim=64,
        num_layers=depth,
        embedding_dim=embed_dim,
        num_embeddings=tokens,
    )
    prior.clip_mean.requires_grad_(False)
    prior.clip_std.requires_grad_(False)
    return prior


class Decoder(nn.Module):
    """Its U-Net and its text projection."""

    def __init__(
        self,
        embed_dim: int,
        side_px: int,
        widths: Sequence[int],
        blocks: int,
        head_width: int = 64,
        groups: int = 32,
    ) -> None:
        from diffusers import UNet2DConditionModel
        from diffusers.pipelines.deprecated.unclip.text_proj import UnCLIPTextProjModel

        super().__init__()
        plain = len(widths) - 1
        self.unet = UNet2DConditionModel(
            sample_size=side_px,
            in_channels=3,
            out_channels=6,
            layers_per_block=blocks,
            block_out_channels=tuple(widths),
            down_block_types=("ResnetDownsampleBlock2D",) * plain + ("SimpleCrossAttnDownBlock2D",),
            mid_block_type="UNetMidBlock2DSimpleCrossAttn",
            up_block_types=("SimpleCrossAttnUpBlock2D",) + ("ResnetUpsampleBlock2D",) * plain,
            attention_head_dim=head_width,
            cross_attention_dim=embed_dim,
            class_embed_type="identity",
            resnet_time_scale_shift="scale_shift",
            norm_num_groups=groups,
        )
        self.text = UnCLIPTextProjModel(
            clip_embeddings_dim=embed_dim,
            time_embed_dim=4 * widths[0],
            cross_attention_dim=embed_dim,
        )

    def mask(self, is_word: Tensor) -> Tensor:
        """Return which context tokens are real: all that are made from z_i, in front of the words
        (B, N).
        """
        return F.pad(is_word, (self.text.clip_extra_context_tokens, 0), value=True)


class Diffusers:
    """Its parts put together as its pipeline does."""

    def __init__(self, prior: Any, decoder: Decoder) -> None:
        from diffusers import UnCLIPScheduler

        self.prior, self.decoder = prior.eval(), decoder.eval()
        self.prior_scheduler = UnCLIPScheduler(
            variance_type="fixed_small_log", clip_sample_range=5.0, prediction_type="sample"
        )
        self.scheduler = UnCLIPScheduler(variance_type="learned_range")

    @torch.no_grad()
    def __call__(
        self,
        z_t: Tensor,
        encodings: Tensor,
        is_word: Tensor,
        guidance: tuple[float, float] = GUIDANCE,
        seeds: Sequence[int] | None = None,
    ) -> Tensor:
        """Draw pictures (B, 3, S, S) in [-1, 1] for ready texts, the empty ones first.

        z_t is (2 B, E), encodings (2 B, N, E), is_word (2 B, N). guidance: of prior and decoder.
        seeds: one for each picture.
        """
        from diffusers.utils.torch_utils import randn_tensor

        noise = None if seeds is None else [torch.Generator().manual_seed(seed) for seed in seeds]
        B, S = len(z_t) // 2, self.decoder.unet.config.sample_size

        def embedding(x_t: Tensor, t: Tensor) -> Tensor:
            found = self.prior(
                x_t.repeat(2, 1), t, z_t, encodings, is_word
            ).predicted_image_embedding
            free, told = found.chunk(2)
            return free + guidance[0] * (told - free)

        z_i = walk(
            self.prior_scheduler,
            STEPS["prior"],
            randn_tensor((B, z_t.shape[1]), noise),
            embedding,
            noise,
        )
        context, added = self.decoder.text(
            image_embeddings=self.prior.post_process_latents(z_i),
            prompt_embeds=z_t,
            text_encoder_hidden_states=encodings,
            do_classifier_free_guidance=True,
        )
        mask = self.decoder.mask(is_word)

        def eps(x_t: Tensor, t: Tensor) -> Tensor:
            found = self.decoder.unet(
                x_t.repeat(2, 1, 1, 1), t, context, class_labels=added, attention_mask=mask
            ).sample
            free, told = found.chunk(2)
            told, variance = told.chunk(2, 1)
            free = free[:, :3]
            return torch.cat([free + guidance[1] * (told - free), variance], 1)

        return walk(
            self.scheduler, STEPS["decoder"], randn_tensor((B, 3, S, S), noise), eps, noise
        ).clamp(-1, 1)


def walk(
    scheduler: Any,
    steps: int,
    x_t: Tensor,
    predict: Callable[[Tensor, Tensor], Tensor],
    noise: Noise = None,
) -> Tensor:
    """Take the scheduler's steps from noise to data."""
    scheduler.set_timesteps(steps)
    times = scheduler.timesteps
    for place, t in enumerate(times):
        before = times[place + 1] if place + 1 < len(times) else None
        x_t = scheduler.step(
            predict(x_t, t), t, x_t, prev_timestep=before, generator=noise
        ).prev_sample
    return x_t


def schedule_of(scheduler: Any) -> Schedule:
    """Return a scheduler's path as ours, whose t counts from 1."""
    return Schedule(
        torch.cat([torch.ones(1, dtype=torch.float64), scheduler.alphas_cumprod.double()])
    )


class PriorLoss(nn.Module):
    """The prior with its loss on z_i; its guidance goes from the empty text, which some captions
    are turned into.
    """

    def __init__(
        self, prior: Any, scheduler: Any, z_i: Tensor, empty: dict[str, Tensor], text_drop: float
    ) -> None:
        super().__init__()
        self.prior, self.empty, self.text_drop, self.schedule = (
            prior,
            empty,
            text_drop,
            schedule_of(scheduler),
        )
        with torch.no_grad():
            prior.clip_mean.copy_(z_i.mean(0))
            prior.clip_std.copy_(z_i.std(0))

    def forward(self, z_i: Tensor, **text: Tensor) -> Tensor:
        """Mean squared error for z_i (B, E) and the texts' z_t (B, E), encodings (B, N, E) and
        is_word (B, N).
        """
        text = dropped(text, self.empty, torch.rand(len(z_i)) < self.text_drop)
        x_0 = (z_i - self.prior.clip_mean) / self.prior.clip_std
        t = torch.randint(self.schedule.T, (len(z_i),))
        x_t = self.schedule.q_sample(x_0, t + 1, torch.randn_like(x_0))
        found = self.prior(
            x_t, t, text["z_t"], text["encodings"], text["is_word"]
        ).predicted_image_embedding
        return F.mse_loss(found.float(), x_0)


class DecoderLoss(nn.Module):
    """The decoder with its loss on eps; its guidance goes from the learned null z_i and the empty
    text.

    The term of L_vlb that is drawn, which teaches the variance, counts 0.001 as in DALLE2-pytorch:
    T times that, as in Nichol & Dhariwal
    2021, makes the rare one of t = 1 so large that clipping leaves nothing of its steps.
    """

    def __init__(
        self,
        decoder: Decoder,
        scheduler: Any,
        empty: dict[str, Tensor],
        z_drop: float,
        text_drop: float,
    ) -> None:
        super().__init__()
        self.decoder, self.empty, self.schedule = decoder, empty, schedule_of(scheduler)
        self.z_drop, self.text_drop = z_drop, text_drop

    def forward(self, x_0: Tensor, z_i: Tensor, **text: Tensor) -> Tensor:
        """Loss of pictures x_0 in [-1, 1], (B, 3, S, S), with z_i (B, E) and their texts."""
        decoder, B = self.decoder, len(x_0)
        null = decoder.text.learned_classifier_free_guidance_embeddings
        z_i = torch.where(torch.rand(B)[:, None] < self.z_drop, null, z_i)
        text = dropped(text, self.empty, torch.rand(B) < self.text_drop)
        context, added = decoder.text(
            image_embeddings=z_i,
            prompt_embeds=text["z_t"],
            text_encoder_hidden_states=text["encodings"],
            do_classifier_free_guidance=False,
        )
        t, eps = torch.randint(self.schedule.T, (B,)), torch.randn_like(x_0)
        x_t = self.schedule.q_sample(x_0, t + 1, eps)
        found = decoder.unet(
            x_t, t, context, class_labels=added, attention_mask=decoder.mask(text["is_word"])
        ).sample
        prediction, variance = found.float().chunk(2, 1)
        simple = F.mse_loss(prediction, eps)
        hybrid = hybrid_loss(
            self.schedule, x_0, eps, t + 1, (prediction, (variance + 1) / 2), "eps"
        )  # simple + 0.001 T times the term
        return simple + (hybrid - simple) / self.schedule.T


def dropped(
    text: dict[str, Tensor], empty: dict[str, Tensor], is_dropped: Tensor
) -> dict[str, Tensor]:
    """Return texts, each value (B, ...), of which some, bool (B,), are the empty one, each value
    (1, ...).
    """
    return {
        name: torch.where(is_dropped.view(-1, *[1] * (each.ndim - 1)), empty[name], each)
        for name, each in text.items()
    }
