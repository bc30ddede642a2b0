"""Noise depends on a sample's own seed and on what it is for, not on its batch."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.helpers.small_systems import write_system
from training.diffusion.noise import Stream, generators, noise, noise_like
from training.generation import manipulations
from training.generation.beam_search import Beam, search
from training.generation.unclip import Unclip
from training.models.upsampler import Upsampler
from training.models.upsampler_cascade import enlarge
from training.sections.upsampler_section import UpsamplerConfig


def test_a_samples_noise_does_not_depend_on_its_batch() -> None:
    whole = noise((5, 3, 8, 8), generators(range(5)))
    parts = torch.cat(
        [noise((2, 3, 8, 8), generators([0, 1])), noise((3, 3, 8, 8), generators([2, 3, 4]))]
    )
    assert torch.equal(whole, parts)
    assert not torch.equal(whole[0], whole[1])


def test_generators_advance_from_draw_to_draw() -> None:
    own = generators([7, 8])
    assert not torch.equal(noise((2, 20), own), noise((2, 20), own))


def test_noise_is_standard_normal() -> None:
    eps = noise((100, 1000), generators(range(100)))
    assert abs(float(eps.mean())) < 0.015
    assert float(eps.var()) == pytest.approx(1, abs=0.02)


def test_noise_like_takes_the_dtype_and_the_same_values() -> None:
    single, double = (
        noise_like(torch.zeros(2, 40, dtype=dtype), generators([1, 2]))
        for dtype in (torch.float32, torch.float64)
    )
    assert double.dtype == torch.float64
    assert torch.equal(single, double.float())


def test_a_wrong_number_of_generators_is_named() -> None:
    with pytest.raises(ValueError, match="2 generators for a batch of 3"):
        noise((3, 4), generators([1, 2]))


def test_streams_of_one_seed_never_meet() -> None:
    # torch looks at 32 bits of a seed: the first up-sampler's 2^29 + 5 would otherwise be the
    # prior's 5
    seeds = [0, 1, 5, 2**29 - 1, 2**29 + 5, 3 * 1_000_003 + 1, 2**31 * 1_000_003]
    drawn = {
        stream: [noise((1, 6), generators([seed], stream)) for seed in seeds] for stream in Stream
    }
    distinct = {tuple(eps[0].tolist()) for each in drawn.values() for eps in each}
    assert len(distinct) == len(Stream) * len({seed % 2**29 for seed in seeds})
    assert torch.equal(drawn[Stream.PRIOR][2], drawn[Stream.PRIOR][4]), (
        "only seeds 2^29 apart share noise"
    )


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[tuple[float, ...]]:
    """The beginnings of everything that is drawn for a sample, one a (purpose, picture, step)."""
    found: list[tuple[float, ...]] = []
    normal_ = torch.Tensor.normal_

    def noting(self: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        eps = normal_(self, *args, **kwargs)
        found.append(tuple(eps.flatten()[:8].tolist()))
        return eps

    monkeypatch.setattr(torch.Tensor, "normal_", noting)
    return found


@pytest.fixture(scope="module")
def system(tmp_path_factory: pytest.TempPathFactory) -> Unclip:
    return Unclip.load(write_system(tmp_path_factory.mktemp("system")))


@pytest.mark.parametrize("sampler", ["dpm_solver", "ancestral"])
def test_no_two_purposes_pictures_and_steps_share_noise(
    system: Unclip, drawn: list[tuple[float, ...]], monkeypatch: pytest.MonkeyPatch, sampler: str
) -> None:
    monkeypatch.setattr(
        system.decoder, "config", system.decoder.config.model_copy(update={"sampler": sampler})
    )
    prompts = ["blue", "blue", "a red heart"]
    pictures = system.generate(prompts, count=2, seed=range(3))
    assert len(drawn) == 6 * (
        2 * system.prior.config.sampling_steps
        + (1 if sampler == "dpm_solver" else system.decoder.config.sampling_steps)
    )
    assert len(set(drawn)) == len(drawn)
    assert not np.array_equal(pictures[0], pictures[1]), (
        "equal captions are drawn with noise of their own"
    )
    models = [
        Upsampler(
            UpsamplerConfig(image_size_px=64 * factor, factor=2, width=8, multiples=(1,), depth=1)
        )
        for factor in (1, 2)
    ]
    before = len(drawn)
    assert enlarge(models, pictures[0], [0, 1]).shape == (2, 32, 32, 3)
    assert len(drawn) == before + 4 and len(set(drawn)) == len(drawn)


def test_search_shares_no_noise_among_members_and_steps(
    system: Unclip, drawn: list[tuple[float, ...]]
) -> None:
    search(
        system,
        ["blue"],
        Beam(members=6, keep=2, checks=(0.5,)),
        0,
        steps=4,
        score=lambda pictures, _: pictures.astype(np.float32).mean((1, 2, 3)),
    )
    assert len(drawn) == 6 * (2 * system.prior.config.sampling_steps + 1 + 3) and len(
        set(drawn)
    ) == len(drawn)


def test_inversion_and_variations_share_no_noise(
    system: Unclip, drawn: list[tuple[float, ...]]
) -> None:
    pictures = system.generate(["blue"])[0]
    latents = manipulations.invert(system, pictures, 4)
    manipulations.vary(system, latents, 1.0, 3, 0, 4)
    manipulations.variations(system, pictures, 3, 1, 4)
    assert len(drawn) > 20 and len(set(drawn)) == len(drawn)


def test_seeds_that_do_not_fit_the_prompts_are_told(system: Unclip) -> None:
    with pytest.raises(ValueError, match="2 seeds for 3 prompts"):
        system.generate(["a", "b", "c"], seed=[1, 2])
