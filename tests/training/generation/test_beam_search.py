"""Search over partially denoised pictures finds what its score asks for, and without a score is the
plain sampler.
"""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.helpers.small_systems import write_system
from training.diffusion.noise import generators, noise
from training.diffusion.process import Schedule
from training.diffusion.samplers import SamplerOptions, ddim
from training.generation.beam_search import Beam, beam, search, survivors
from training.generation.unclip import Unclip

SCHEDULE = Schedule.cosine(1000)


def two_modes(rows: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
    """Denoise exactly where data is -1 or 1, equally often, in each of 4 dimensions: x_0 =
    tanh(sqrt(alpha_bar) x_t / (1 - alpha_bar)).
    """

    def denoise(x_t: Tensor, t: Tensor) -> Tensor:
        alpha_bar = SCHEDULE.alpha_bar.to(x_t.dtype)[t][:, None]
        return torch.tanh(alpha_bar.sqrt() * x_t / (1 - alpha_bar).clamp(min=1e-8))

    return denoise


def run(members: int, keep: int, checks: tuple[float, ...], prompts: int = 40) -> Tensor:
    x_T = noise((prompts * members, 4), generators(range(prompts * members)))
    own = generators(range(10_000, 10_000 + prompts * members))
    options = Beam(members, keep, checks)
    x_0, _ = beam(two_modes, x_T, SCHEDULE, 40, options, lambda x_0: x_0.sum(1), own)
    return x_0.view(prompts, members, 4)


def test_without_a_choice_it_is_the_sampler() -> None:
    x_T = noise((6, 4), generators(range(6)))
    x_0, origin = beam(
        two_modes,
        x_T,
        SCHEDULE,
        20,
        Beam(1, 1, (0.5,)),
        lambda x_0: x_0.sum(1),
        generators(range(6)),
    )
    plain = ddim(
        two_modes(torch.arange(6)),
        x_T,
        SCHEDULE,
        20,
        eta=1.0,
        options=SamplerOptions(generator=generators(range(6))),
    )
    assert torch.allclose(x_0, plain, atol=1e-5) and origin.tolist() == list(range(6))


def test_a_beam_finds_rare_data_more_often_than_best_of_as_many() -> None:
    # All four dimensions at 1: one in 16 by chance, so best of 8 has it in 1 - (15/16)^8 = 40 % of
    # the prompts.
    plain = (run(8, 8, ()) > 0.9).all(2).any(1).float().mean()
    searched = (run(8, 2, (0.3, 0.5, 0.7)) > 0.9).all(2).any(1).float().mean()
    assert 0.2 < plain < 0.6 and searched > plain + 0.25


def test_the_best_take_the_places_of_the_others_within_their_prompt() -> None:
    scores = torch.tensor([0.1, 0.9, 0.5, 0.7, 5.0, 5.0, 6.0, 1.0])
    assert survivors(scores, 4, 2).tolist() == [1, 1, 3, 3, 6, 6, 4, 4]
    assert survivors(scores, 4, 1).tolist() == [1] * 4 + [6] * 4
    with pytest.raises(ValueError, match="keep = 3 of 4"):
        Beam(members=4, keep=3)


def test_conditions_follow_their_survivors() -> None:
    seen: list[list[int]] = []

    def denoise_of(rows: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
        seen.append(rows.tolist())
        return lambda x_t, t: rows[:, None].float().expand(-1, 4)

    x_T = noise((4, 4), generators(range(4)))
    x_0, origin = beam(
        denoise_of,
        x_T,
        SCHEDULE,
        10,
        Beam(4, 2, (0.5, 0.8)),
        lambda x_0: x_0[:, 0],
        generators(range(4)),
    )
    assert seen == [[0, 1, 2, 3], [3, 3, 2, 2], [3, 3, 3, 3]] and origin.tolist() == [3, 3, 3, 3]
    assert x_0[:, 0].tolist() == [3, 3, 3, 3]


def test_a_systems_pictures_follow_the_score_and_repeat(tmp_path: Path) -> None:
    model, prompts = Unclip.load(write_system(tmp_path)), ["a red disc", "a blue square"]

    def bright(pictures: np.ndarray, prompt: np.ndarray) -> np.ndarray:
        assert len(pictures) == len(prompt) and set(prompt) <= {0, 1}
        return np.asarray(pictures.astype(np.float32).mean((1, 2, 3)))

    plain = search(model, prompts, Beam(4), 0, steps=6)
    assert plain.shape[:2] == (2, 4) and plain.dtype == np.uint8
    assert np.array_equal(plain, search(model, prompts, Beam(4), 0, steps=6))
    assert not np.array_equal(plain, search(model, prompts, Beam(4), 1, steps=6))
    options = Beam(16, 2, (0.5, 0.7, 0.9))
    lit = search(model, prompts, options, 0, steps=10, score=bright)
    dim = search(
        model,
        prompts,
        options,
        0,
        steps=10,
        score=lambda pictures, prompt: -bright(pictures, prompt),
    )
    assert lit.mean() > dim.mean() + 3
