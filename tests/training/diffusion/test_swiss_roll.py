"""The Swiss roll: its data, its measure, and that a network learns it."""

import math
from pathlib import Path

import pytest
import torch
from PIL import Image
from scipy import stats
from sklearn.datasets import make_swiss_roll

from flows.cli.main import main
from infra.errors import CallerError
from training.diffusion.noise import generators, noise
from training.diffusion.process import Schedule
from training.diffusion.samplers import ancestral, dpm_solver
from training.diffusion.swiss_roll import (
    denoise_with,
    energy_distance,
    roll_points,
    swiss_roll,
    train,
    velocity_loss,
)


def points(count: int, seed: int = 0) -> torch.Tensor:
    return roll_points(count, torch.Generator().manual_seed(seed))


def test_the_roll_is_that_of_scikit_learn() -> None:
    theirs = (
        torch.from_numpy(make_swiss_roll(4000, noise=0.14, random_state=0)[0][:, [0, 2]]).float()
        / 7
    )
    assert abs(energy_distance(points(4000), theirs)) < 2e-3
    assert energy_distance(points(4000), theirs + 0.1) > 5e-3


def test_energy_distance_is_that_of_scipy_in_one_dimension() -> None:
    """scipy gives the root of the estimate that counts a point's distance to itself."""
    x, y = torch.randn(300, 1, dtype=torch.float64), 0.5 + torch.randn(200, 1, dtype=torch.float64)
    biased = sum(torch.cdist(z, z).mean() / (len(z) - 1) for z in (x, y)) + energy_distance(x, y)
    assert math.sqrt(biased) == pytest.approx(
        stats.energy_distance(x[:, 0].numpy(), y[:, 0].numpy()), rel=1e-9
    )


def test_energy_distance_of_the_roll_to_itself_is_chance() -> None:
    distances = torch.tensor(
        [energy_distance(points(1000, seed), points(1000, 100 + seed)) for seed in range(20)]
    )
    assert abs(float(distances.mean())) < 4 * float(distances.std()) / math.sqrt(20)


@pytest.fixture(scope="module")
def trained() -> tuple[torch.nn.Module, Schedule]:
    network, steps = train(velocity_loss(Schedule.cosine()), steps=800, seed=0)
    assert steps == 800
    return network, Schedule.cosine()


def test_a_short_training_finds_the_roll(trained: tuple[torch.nn.Module, Schedule]) -> None:
    network, schedule = trained
    x_T = noise((2000, 2), generators(range(2000)))
    distance = energy_distance(
        dpm_solver(denoise_with(network, schedule), x_T, schedule, 20), points(2000)
    )
    assert distance < 0.01
    assert energy_distance(x_T, points(2000)) > 5 * distance


def test_a_high_diffusion_rate_costs_quality(trained: tuple[torch.nn.Module, Schedule]) -> None:
    network, _ = trained
    distances = []
    for rate in (0.9, 0.5, 0.1):
        constant = Schedule.constant(rate)
        samples = ancestral(
            denoise_with(network, constant), noise((1000, 2), generators(range(1000))), constant
        )
        distances.append(energy_distance(samples, points(1000)))
    assert distances[0] > 2 * distances[1] > 4 * distances[2]


def test_training_depends_on_the_seed_alone() -> None:
    torch.manual_seed(1)
    before = torch.random.get_rng_state()
    loss = velocity_loss(Schedule.cosine())
    first, again, other = (train(loss, steps=5, seed=seed)[0].leave.weight for seed in (3, 3, 4))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert torch.equal(before, torch.random.get_rng_state())


def test_training_stops_in_time() -> None:
    _, steps = train(velocity_loss(Schedule.cosine()), steps=1_000_000, seconds=0.3)
    assert 1 <= steps < 10_000


def test_swiss_roll_draws_its_picture_and_gives_its_figures(tmp_path: Path) -> None:
    result = swiss_roll(tmp_path / "roll", steps=60, count=300, seed=1, rates=(0.3, 0.7, 0.3))
    assert set(result) == {
        "energy_distance",
        "data_to_data",
        "seconds",
        "steps",
        "by_rate",
        "by_steps",
        "picture",
    }
    with Image.open(result["picture"]) as picture:
        assert picture.size[0] > 1000
        assert {name: picture.text[name] for name in ("seed", "steps", "points")} == {
            "seed": "1",
            "steps": "60",
            "points": "300",
        }
        assert len(picture.convert("RGB").getcolors(maxcolors=10_000_000) or []) > 1000  # not blank
    assert result["steps"] == 60
    assert result["energy_distance"] == result["by_steps"]["DPM-Solver++(2M)"][50]
    assert [(row["rate"], row["steps"]) for row in result["by_rate"]] == [
        (0.7, Schedule.constant(0.7).T),
        (0.3, Schedule.constant(0.3).T),
    ]


def test_the_command_passes_on_the_diffusion_rates(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: list[object] = []
    monkeypatch.setattr(
        "training.diffusion.swiss_roll.swiss_roll",
        lambda out, steps, seed, rates: (asked.append(rates), {"by_rate": []})[1],
    )
    for arguments, code in (
        ([], 0),
        (["--rate", "0.3", "--rate", "0.7"], 0),
        (["--rate", "1.5"], 2),
    ):
        with pytest.raises(SystemExit) as left:
            main(["diffusion", "swiss-roll", "--out", str(tmp_path), "--json", *arguments])
        assert (left.value.code or 0) == code
    assert (
        asked == [(), [0.3, 0.7]]
        and "'--rate': Input should be less than or equal to 0.9999" in capsys.readouterr().err
    )


def test_bad_settings_are_named(tmp_path: Path) -> None:
    with pytest.raises(CallerError, match="steps = 0"):
        swiss_roll(tmp_path, steps=0)
    with pytest.raises(ValueError, match="neither steps nor seconds is set"):
        train(velocity_loss(Schedule.cosine()))
