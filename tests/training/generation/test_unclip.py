"""Pictures depend on prompt, seed and place alone, and a system read from its folders is the one
that was written.
"""

from pathlib import Path

import numpy as np
import pytest
import torch

from tests.helpers.small_systems import PROMPTS, E, write_system
from training.generation.unclip import Unclip
from training.models.pixels import to_images


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_system(tmp_path_factory.mktemp("run"))


@pytest.fixture(scope="module")
def system(folder: Path) -> Unclip:
    return Unclip.load(folder / "clip", folder / "prior", folder / "decoder")


def near(a: np.ndarray, b: np.ndarray) -> bool:
    """Say whether pictures are equal but for float rounding, which depends on how a batch is
    cut.
    """
    return int(np.abs(a.astype(int) - b.astype(int)).max()) <= 1


def test_equal_arguments_give_equal_pictures(system: Unclip) -> None:
    pictures = system.generate(PROMPTS, count=2, seed=3)
    assert pictures.dtype == np.uint8 and pictures.shape == (3, 2, 8, 8, 3)
    assert np.array_equal(pictures, system.generate(PROMPTS, count=2, seed=3))
    assert pictures.std() > 5


def test_two_loads_draw_the_same(system: Unclip, folder: Path) -> None:
    again = Unclip.load(folder / "clip", folder / "prior", folder / "decoder")
    assert np.array_equal(again.generate(PROMPTS), system.generate(PROMPTS))


def test_other_prompts_and_counts_do_not_change_a_picture(
    system: Unclip, monkeypatch: pytest.MonkeyPatch
) -> None:
    pictures = system.generate(PROMPTS, count=3, seed=3)
    for place, prompt in enumerate(PROMPTS):
        assert near(system.generate([prompt], count=3, seed=3)[0], pictures[place])
    assert near(system.generate(PROMPTS[::-1], seed=3)[::-1], pictures[:, :1])
    monkeypatch.setattr("training.generation.unclip.BATCH", 2)
    assert near(system.generate(PROMPTS, count=3, seed=3), pictures)


def test_prompt_seed_place_steps_and_guidance_matter(system: Unclip) -> None:
    two = system.generate(["blue"], count=2, seed=3)[0]
    others = [
        system.generate(["blue"], seed=4)[0, 0],
        system.generate(["a red heart"], seed=3)[0, 0],
        two[1],
        system.generate(["blue"], seed=3, steps=2)[0, 0],
        system.generate(["blue"], seed=3, guidance=6.0)[0, 0],
    ]
    assert all(not near(other, two[0]) for other in others)


@pytest.mark.parametrize("prompt", ["", "\U0001f44b\U0001f3fd", "猫", "<|pad|>", "x" * 10_000])
def test_awkward_prompts_are_drawn(system: Unclip, prompt: str) -> None:
    assert system.generate([prompt]).shape == (1, 1, 8, 8, 3)


def test_embeddings_are_unit_vectors(system: Unclip) -> None:
    for vectors in (
        system.encode_texts(PROMPTS),
        system.encode_images(system.generate(PROMPTS)[:, 0]),
    ):
        assert vectors.shape == (3, E)
        assert np.allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)


def test_to_images_rounds_and_clamps() -> None:
    x = torch.tensor([-2.0, -1.0, 0.004, 1.0, 3.0]).view(1, 1, 1, 5).expand(1, 3, 1, 5)
    assert to_images(x)[0, 0, :, 0].tolist() == [0, 0, 128, 255, 255]
