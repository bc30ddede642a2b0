"""Beam search at inference: several images of a prompt are denoised together, and the best by a
score are copied.

At some steps the x_0 predicted from each partially denoised x_t is scored; the best replace the
others and continue with noise of their own. Without such steps it is the plain sampler. The score
is any callable.
Legend: P prompts, M members of a prompt's population, B = P * M rows, a prompt's rows next to each
other.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from training.diffusion.noise import Stream, generators, noise, noise_like
from training.diffusion.process import Denoise, Schedule, split
from training.diffusion.samplers import ddim_coefficients, timesteps
from training.generation.unclip import BATCH, SEED_STRIDE, Unclip
from training.models import clip as clip_model
from training.models.pixels import to_images

Score = Callable[[np.ndarray, np.ndarray], np.ndarray]
"""Scores images: (uint8 (B, S, S, 3), the number of each prompt (B,)) -> (B,), larger is better."""


@dataclass(frozen=True)
class Beam:
    """Size of a beam, and when it is pruned.

    Raises ValueError if `keep` does not divide `members`.
    """

    members: int
    """Images of a prompt that are denoised together."""
    keep: int = 1
    """Members that survive a check; each is copied members / keep times."""
    checks: Sequence[float] = ()
    """Shares of the steps after which the members are scored."""

    def __post_init__(self) -> None:
        if not 1 <= self.keep <= self.members or self.members % self.keep:
            raise ValueError(f"keep = {self.keep} of {self.members} members: it must divide them")

    def steps(self, count: int) -> set[int]:
        """Return the numbers of the steps, out of `count`, at which the members are scored."""
        if self.keep == self.members:
            return set()
        return {min(count - 1, max(1, round(share * count))) for share in self.checks}


@torch.no_grad()
def beam(
    denoise_of: Callable[[Tensor], Denoise],
    x_T: Tensor,
    schedule: Schedule,
    steps: int,
    options: Beam,
    score: Callable[[Tensor], Tensor],
    row_generators: list[torch.Generator],
) -> tuple[Tensor, Tensor]:
    """Denoise x_T (B, ...) by DDIM with eta = 1 in a beam.

    At each check the best members of a prompt by `score(x_0) -> (B,)` replace the others.
    `denoise_of(rows)` denoises under the conditions of these rows of x_T. row_generators: the noise
    of each row, which stays with the row when its member is replaced. Returns x_0, and for each row
    the row of x_T whose condition it ended with (B,).
    """
    check_steps = options.steps(steps)
    origin = torch.arange(len(x_T))
    x_t, denoise = x_T.clone(), denoise_of(origin)
    for step, (t, s) in enumerate(pairwise(timesteps(schedule, steps))):
        x_0, _ = split(denoise(x_t, torch.full((len(x_t),), t, device=x_t.device)))
        if step in check_steps:
            parents = survivors(score(x_0), options.members, options.keep)
            origin, x_t, x_0 = origin[parents], x_t[parents], x_0[parents]
            denoise = denoise_of(origin)
        of_x_0, of_x_t, sigma = ddim_coefficients(
            float(schedule.alpha_bar[t]), float(schedule.alpha_bar[s]), eta=1.0
        )
        x_t = of_x_t * x_t + of_x_0 * x_0
        if sigma > 0:
            x_t = x_t + sigma * noise_like(x_t, row_generators)
    return x_t, origin


def survivors(scores: Tensor, members: int, keep: int) -> Tensor:
    """Return for each row the row that replaces it, (B,).

    The `keep` best of each prompt are repeated members / keep times each; equal scores prefer the
    first row.
    """
    by_prompt = scores.view(-1, members)
    best = by_prompt.argsort(dim=1, descending=True, stable=True)[:, :keep]  # (P, keep)
    rows = best + members * torch.arange(len(by_prompt), device=scores.device)[:, None]
    return rows.repeat_interleave(members // keep, 1).flatten()


def search(
    model: Unclip,
    prompts: Sequence[str],
    options: Beam,
    seed: int,
    steps: int | None = None,
    guidance: float | None = None,
    score: Score | None = None,
) -> np.ndarray:
    """Draw all members of each prompt's beam, uint8 (P, members, S, S, 3).

    Without a score the members are independent samples. An image costs `steps` calls of the decoder
    in both cases, and depends only on its prompt, the seed and the settings. steps, guidance: None
    for the decoder's config.
    """
    decoder, texts, members = model.decoder, list(prompts), options.members
    S, steps = decoder.config.image_size_px, steps or decoder.config.sampling_steps
    w = decoder.config.guidance if guidance is None else guidance
    options = options if score is not None else Beam(members, keep=members)
    z_t = clip_model.embed_texts(model.clip, model.tokenizer, texts).to(model.device)
    ids = model.tokenizer(texts).to(model.device)
    prompts_at_once = max(1, BATCH // members)
    images = []
    for start in range(0, len(texts), prompts_at_once):
        end = min(start + prompts_at_once, len(texts))
        rows = torch.arange(start, end).repeat_interleave(members)
        seeds = [seed * SEED_STRIDE + number for number in range(members)] * (end - start)
        z_i = model.prior.sample(z_t[rows], ids[rows], seeds)
        x_T = noise((len(rows), 3, S, S), generators(seeds, Stream.DECODER), model.device)

        def denoise_of(origin: Tensor, z_i: Tensor = z_i, rows: Tensor = rows) -> Denoise:
            return decoder.guided_denoise(z_i[origin], ids[rows][origin], w)

        def score_x_0(x_0: Tensor, rows: Tensor = rows) -> Tensor:
            assert score is not None
            return torch.from_numpy(np.asarray(score(to_images(x_0), rows.numpy()), np.float32))

        step_generators = generators(seeds, Stream.STEPS)
        is_bf16 = decoder.config.precision == "bf16"  # the precision of its training
        with torch.autocast(model.device.type, torch.bfloat16, enabled=is_bf16):
            x_0, _ = beam(
                denoise_of, x_T, decoder.schedule, steps, options, score_x_0, step_generators
            )
        images.append(to_images(x_0))
    return np.concatenate(images).reshape(len(texts), members, S, S, 3)
