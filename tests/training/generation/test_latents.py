"""Pictures of a decoder's latents: their shapes and places, what the decoder is told, and that
splits of the work change nothing.
"""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from tests.helpers.small_systems import PROMPTS, write_system
from training.diffusion.process import Denoise
from training.diffusion.trajectories import slerp
from training.generation import latents
from training.generation.latents import across_time, interpolation, sharing, times_at
from training.generation.unclip import Unclip
from training.models.decoder import Condition, Decoder
from training.models.pixels import to_images

SIDE = 8


@pytest.fixture(scope="module")
def system(tmp_path_factory: pytest.TempPathFactory) -> Unclip:
    folder = write_system(tmp_path_factory.mktemp("run"))
    return Unclip.load(folder / "clip", folder / "prior", folder / "decoder")


def near(a: np.ndarray, b: np.ndarray) -> bool:
    """Say whether pictures are equal but for float rounding, which depends on how a batch is
    cut.
    """
    return int(np.abs(a.astype(int) - b.astype(int)).max()) <= 1


def pictures(count: int, seed: int = 0) -> torch.Tensor:
    return (
        torch.randint(0, 256, (count, 3, SIDE, SIDE), generator=torch.Generator().manual_seed(seed))
        / 127.5
        - 1
    )


def embeddings(model: Unclip, count: int) -> torch.Tensor:
    return F.normalize(
        torch.randn(count, len(model.decoder.null_z), generator=torch.Generator().manual_seed(1)),
        dim=-1,
    )


@pytest.fixture
def told(system: Unclip, monkeypatch: pytest.MonkeyPatch) -> list[tuple[torch.Tensor, float]]:
    """What every call told the decoder: its z_i and the weight w."""
    seen: list[tuple[torch.Tensor, float]] = []
    true = Decoder.guided_denoise

    def spy(self: Decoder, z_i: torch.Tensor, ids: torch.Tensor, w: float) -> object:
        seen.append((z_i, w))
        return true(self, z_i, ids, w)

    monkeypatch.setattr(Decoder, "guided_denoise", spy)
    return seen


def test_across_time_ends_at_the_picture_that_ddim_draws(system: Unclip) -> None:
    found = across_time(system, PROMPTS, columns=5, steps=20, seed=3)
    assert (
        found.x_t.shape == found.x_0.shape == (3, 5, SIDE, SIDE, 3) and found.x_t.dtype == np.uint8
    )
    assert (
        found.times[0] == 50
        and found.times[-1] == 0
        and found.times == sorted(found.times, reverse=True)
    )
    assert np.array_equal(found.x_t[:, -1], found.x_0[:, -1])
    config = system.decoder.config
    system.decoder.config = config.model_copy(
        update={"sampler": "ddim"}
    )  # the same z_i and noise, the same sampler
    try:
        assert near(system.generate(PROMPTS, 1, 3, steps=20)[:, 0], found.x_t[:, -1])
    finally:
        system.decoder.config = config


def test_samples_share_their_x_t_and_are_told_nothing_else(
    system: Unclip, told: list[tuple[torch.Tensor, float]]
) -> None:
    x_0 = pictures(3)
    found = sharing(system.decoder, x_0, [5, 45], samples=4, steps=50, seed=0)
    assert found.x_t.shape == (3, 2, SIDE, SIDE, 3) and found.samples.shape == (
        3,
        2,
        4,
        SIDE,
        SIDE,
        3,
    )
    assert (
        found.between_samples_rms[0] < found.between_samples_rms[1]
        and found.to_image_rms[0] < found.to_image_rms[1]
    )
    by_hand = found.samples[:, 1].astype(float)
    squares = [(by_hand[:, i] - by_hand[:, j]) ** 2 for i in range(4) for j in range(i)]
    assert found.between_samples_rms[1] == pytest.approx(
        np.mean(squares) ** 0.5, rel=0.02
    )  # pixels are rounded there
    own = (by_hand - to_images(x_0)[:, None].astype(float)) ** 2
    assert found.to_image_rms[1] == pytest.approx(own.mean() ** 0.5, rel=0.02)
    assert [w for _, w in told] == [0.0]
    sharing(system.decoder, x_0, [5], samples=2, steps=50, seed=0, z_i=embeddings(system, 3))
    assert told[-1][1] == 1.0 and torch.equal(
        told[-1][0], embeddings(system, 3).repeat_interleave(2, 0)
    )


def test_being_told_nothing_leaves_nothing_of_the_embedding(
    system: Unclip, monkeypatch: pytest.MonkeyPatch
) -> None:
    conditions: list[Condition] = []
    true = Decoder.forward
    monkeypatch.setattr(
        Decoder, "forward", lambda self, x_t, t, c: conditions.append(c) or true(self, x_t, t, c)
    )
    sharing(system.decoder, pictures(1), [5], samples=1, steps=50, seed=0)
    nothing = torch.ones(1, dtype=torch.bool)
    expected = system.decoder.condition(
        embeddings(system, 1), system.tokenizer(["blue"]), nothing, nothing
    )
    torch.testing.assert_close(conditions[0].added, expected.added)


def test_a_row_of_blends_is_told_the_great_circle(
    system: Unclip, told: list[tuple[torch.Tensor, float]]
) -> None:
    a, b = pictures(2), pictures(2, seed=1)
    rows = interpolation(system.decoder, (a, b), [10, 40], columns=3, steps=20, seed=0)
    assert rows.shape == (2, 2, 3, SIDE, SIDE, 3) and told[-1][1] == 0.0
    z_i = embeddings(system, 4)
    informed = interpolation(
        system.decoder, (a, b), [10, 40], columns=3, steps=20, seed=0, z_i=(z_i[:2], z_i[2:])
    )
    assert told[-1][1] == 1.0 and not near(rows, informed)
    expected = torch.stack([z_i[:2], slerp(z_i[:2], z_i[2:], 0.5), z_i[2:]], 1).flatten(0, 1)
    torch.testing.assert_close(told[-1][0], expected, atol=1e-6, rtol=0)


def test_blends_go_from_each_picture_to_its_partner(
    system: Unclip, monkeypatch: pytest.MonkeyPatch
) -> None:
    a, b = pictures(3), pictures(3, seed=1)
    schedule, gallery = system.decoder.schedule, torch.cat([a, b])

    def one_of_them(self: Decoder, z_i: torch.Tensor, ids: torch.Tensor, w: float) -> Denoise:
        """The exact denoiser of data that are one of the six pictures."""

        def denoise(x_t: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
            alpha_bar = schedule.alpha_bar.float()[t].view(-1, 1, 1, 1, 1)
            away = (x_t[:, None] - alpha_bar.sqrt() * gallery).flatten(2).square().sum(-1)  # (B, 6)
            return torch.einsum(
                "bk,kchw->bchw", (-away / (2 * (1 - alpha_bar).view(-1, 1))).softmax(-1), gallery
            )

        return denoise

    monkeypatch.setattr(Decoder, "guided_denoise", one_of_them)
    rows = interpolation(system.decoder, (a, b), [5, 20], columns=5, steps=50, seed=0)
    for place in (0, 1):
        assert near(rows[:, place, 0], to_images(a)) and near(rows[:, place, -1], to_images(b))
        assert near(rows[:, place, 1], to_images(a)) and near(rows[:, place, -2], to_images(b)), (
            "a quarter of the way is nearer to its end"
        )


def test_the_work_is_split_without_a_trace(system: Unclip, monkeypatch: pytest.MonkeyPatch) -> None:
    x_0 = pictures(5)

    def both() -> tuple[latents.Shared, np.ndarray]:
        return (
            sharing(system.decoder, x_0, [25, 40], samples=2, steps=20, seed=7),
            interpolation(system.decoder, (x_0, x_0.flip(0)), [25], columns=3, steps=20, seed=7),
        )

    whole, row = both()
    monkeypatch.setattr(latents, "BATCH", 4)
    parts, row_of_parts = both()
    assert (
        near(parts.samples, whole.samples)
        and near(parts.x_t, whole.x_t)
        and near(row_of_parts, row)
    )
    assert parts.between_samples_rms == pytest.approx(whole.between_samples_rms, rel=1e-3)


def test_times_are_shares_of_the_whole_way(system: Unclip) -> None:
    schedule = system.decoder.schedule
    assert times_at(schedule, (0.5, 0.25, 1.0, 0.251, 0.0001)) == [1, 12, 13, 25, 50]
