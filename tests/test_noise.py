"""Noise depends on a sample's own seed, not on its batch."""

import pytest
import torch

from training.noise import generators, noise, noise_like


def test_a_samples_noise_does_not_depend_on_its_batch() -> None:
    whole = noise((5, 3, 8, 8), generators(range(5)))
    parts = torch.cat([noise((2, 3, 8, 8), generators([0, 1])), noise((3, 3, 8, 8), generators([2, 3, 4]))])
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
    single, double = (noise_like(torch.zeros(2, 40, dtype=dtype), generators([1, 2])) for dtype in (torch.float32, torch.float64))
    assert double.dtype == torch.float64
    assert torch.equal(single, double.float())


def test_a_wrong_number_of_generators_is_named() -> None:
    with pytest.raises(ValueError, match="2 generators for a batch of 3"):
        noise((3, 4), generators([1, 2]))
