"""Search at inference: several drawings of a prompt grow side by side, judged by the picture that
each is heading for.

A beam over partially denoised x_t: at some steps the x_0 predicted so far is scored, the best are
kept and take the others' places, and go on with noise of their own. With no such steps it is the
plain sampler. Knows a score as a callable only.
Legend: P prompts, M members of a prompt's population, B = P * M rows, a prompt's rows side by side.
"""

from collections.abc import Callable, Sequence
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
"""Judges pictures: (uint8 (B, S, S, 3), the prompt of each (B,)) -> (B,), more is better."""


@torch.no_grad()
def beam(
    denoise_of: Callable[[Tensor], Denoise],
    x_T: Tensor,
    members: int,
    schedule: Schedule,
    steps: int,
    score: Callable[[Tensor], Tensor],
    keep: int,
    checks: Sequence[float],
    noises: list[torch.Generator],
    eta: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """Denoise x_T (B, ...) by DDIM and return x_0 and the row of x_T whose condition each ended
    with (B,).

    At each of `checks` (shares of the steps taken) a prompt's `keep` best members by `score(x_0) ->
    (B,)` are each copied members / keep times. `denoise_of(rows)` denoises under the conditions of
    these rows. `noises`: a generator a row, which stays at its place. Raises ValueError where keep
    does not divide members.
    """
    if not 1 <= keep <= members or members % keep:
        raise ValueError(f"keep = {keep} of {members} members: it must divide them")
    times = timesteps(schedule, steps)
    at = (
        {min(steps - 1, max(1, round(share * steps))) for share in checks}
        if keep < members
        else set()
    )
    origin = torch.arange(len(x_T))
    x_t, denoise = x_T.clone(), denoise_of(origin)
    for step, (t, s) in enumerate(pairwise(times)):
        x_0, _ = split(denoise(x_t, torch.full((len(x_t),), t, device=x_t.device)))
        if step in at:
            parents = survivors(score(x_0), members, keep)
            origin, x_t, x_0 = origin[parents], x_t[parents], x_0[parents]
            denoise = denoise_of(origin)
        of_x_0, of_x_t, sigma = ddim_coefficients(
            float(schedule.alpha_bar[t]), float(schedule.alpha_bar[s]), eta
        )
        x_t = of_x_t * x_t + of_x_0 * x_0
        if sigma > 0:
            x_t = x_t + sigma * noise_like(x_t, noises)
    return x_t, origin


def survivors(scores: Tensor, members: int, keep: int) -> Tensor:
    """Return the row that goes on in each row's place (B,): a prompt's best, each as often as the
    next; of equals the first.
    """
    by_prompt = scores.view(-1, members)
    best = by_prompt.argsort(dim=1, descending=True, stable=True)[:, :keep]  # (P, keep)
    rows = best + members * torch.arange(len(by_prompt), device=scores.device)[:, None]
    return rows.repeat_interleave(members // keep, 1).flatten()


def search(
    model: Unclip,
    prompts: Sequence[str],
    members: int,
    seed: int,
    steps: int | None = None,
    guidance: float | None = None,
    score: Score | None = None,
    keep: int = 1,
    checks: Sequence[float] = (),
) -> np.ndarray:
    """Draw `members` pictures of each prompt, uint8 (P, members, S, S, 3), by a beam when there is
    a score, else each on its own.

    A picture costs `steps` calls of the decoder in either case, and depends on its prompt, the seed
    and the settings alone.
    """
    decoder, texts = model.decoder, list(prompts)
    S, steps = decoder.config.image_size_px, steps or decoder.config.sampling_steps
    w = decoder.config.guidance if guidance is None else guidance
    z_t = clip_model.embed_texts(model.clip, model.tokenizer, texts).to(model.device)
    ids = model.tokenizer(texts).to(model.device)
    at_once = max(1, BATCH // members)
    pictures = []
    for start in range(0, len(texts), at_once):
        rows = torch.arange(start, min(start + at_once, len(texts))).repeat_interleave(members)
        seeds = [seed * SEED_STRIDE + number for number in range(members)] * (len(rows) // members)
        z_i = model.prior.sample(z_t[rows], ids[rows], seeds)
        x_T = noise((len(rows), 3, S, S), generators(seeds, Stream.DECODER), model.device)

        def denoise_of(member_z_i: Tensor, z_i: Tensor = z_i, rows: Tensor = rows) -> Denoise:
            return decoder.guided_denoise(z_i[member_z_i], ids[rows][member_z_i], w)

        def judged(x_0: Tensor, rows: Tensor = rows) -> Tensor:
            assert score is not None
            return torch.from_numpy(np.asarray(score(to_images(x_0), rows.numpy()), np.float32))

        noises = generators(seeds, Stream.STEPS)
        limit = members if score is None else keep
        with torch.autocast(
            model.device.type, torch.bfloat16, enabled=decoder.config.precision == "bf16"
        ):  # as it was trained
            x_0, _ = beam(
                denoise_of, x_T, members, decoder.schedule, steps, judged, limit, checks, noises
            )
        pictures.append(to_images(x_0))
    return np.concatenate(pictures).reshape(len(texts), members, S, S, 3)
