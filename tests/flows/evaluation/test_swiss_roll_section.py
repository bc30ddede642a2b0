"""The report's Swiss roll: its tables hold what was measured, and its picture is where the page
looks for it.
"""

from pathlib import Path

import pytest
from PIL import Image

from flows.evaluation import swiss_roll_section
from indexing.evaluation.evaluate import EvaluateConfig
from training.diffusion import swiss_roll as roll


def test_the_section_holds_the_figures_and_the_picture(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(roll, "RATES", (0.9, 0.5))
    monkeypatch.setattr(roll, "STEP_COUNTS", (2, 5, 50))
    made = roll.swiss_roll
    seen = []

    def small(out: Path, steps: int, seed: int) -> dict[str, object]:
        seen.append(made(out, steps, seed=seed, count=200))
        return seen[-1]

    monkeypatch.setattr(roll, "swiss_roll", small)
    found = swiss_roll_section.section(EvaluateConfig(swiss_roll_steps=20, seed=3), tmp_path)
    (result,) = seen
    by_rate, by_steps = found["tables"]
    assert [row[0] for row in by_rate["rows"]] == ["0.9", "0.5"]
    assert [row[2] for row in by_rate["rows"]] == [
        row["energy_distance"] for row in result["by_rate"]
    ]
    assert by_steps["head"] == ["Sampler", "2", "5", "50"]
    assert {row[0]: row[1:] for row in by_steps["rows"]} == {
        name: list(each.values()) for name, each in result["by_steps"].items()
    }
    assert (
        "20 training steps" in found["pictures"][0]["caption"]
        and "seed 3" in found["pictures"][0]["caption"]
    )
    with Image.open(tmp_path / found["pictures"][0]["picture"]) as picture:
        assert min(picture.size) > 200
