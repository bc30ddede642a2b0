"""`unclip diffusion swiss-roll` draws its picture and prints its figures, for people and as
JSON.
"""

import json
from functools import partial
from pathlib import Path

import pytest

from tests.flows.cli.test_main import ran
from training.diffusion import swiss_roll as roll


def test_the_swiss_roll_command_prints_its_figures_and_draws(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(roll, "RATES", (0.9, 0.5))  # all of them take half a minute
    monkeypatch.setattr(roll, "swiss_roll", partial(roll.swiss_roll, count=200))
    arguments = (
        "diffusion",
        "swiss-roll",
        "--out",
        str(tmp_path / "out"),
        "--steps",
        "5",
        "--seed",
        "3",
    )
    code, out, _ = ran(capsys, *arguments, "--json")
    result = json.loads(out)
    assert code == 0 and result.keys() >= {
        "energy_distance",
        "data_to_data",
        "seconds",
        "steps",
        "by_rate",
        "by_steps",
        "picture",
    }
    assert result["steps"] == 5 and Path(result["picture"]).read_bytes().startswith(b"\x89PNG")
    monkeypatch.setattr(roll, "swiss_roll", lambda *_, **__: result)
    code, out, _ = ran(capsys, *arguments)
    assert code == 0 and out.splitlines()[0].split()[:3] == [
        "energy",
        "distance",
        f"{result['energy_distance']:.5f}",
    ]
    assert out.splitlines()[-1].split() == ["picture", result["picture"]]


def test_a_swiss_roll_of_no_steps_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, err = ran(
        capsys, "diffusion", "swiss-roll", "--steps", "0", "--out", str(tmp_path / "out")
    )
    assert (code, out) == (2, "") and err.count("\n") == 1 and not (tmp_path / "out").exists()
