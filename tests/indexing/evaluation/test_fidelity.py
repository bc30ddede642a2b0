"""The section on distances to real pictures: its figures, its conditions and too few pairs."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from indexing.data.held_out import open_embedded, read_pairs
from indexing.evaluation.fidelity import FidelityConfig, fidelity
from tests.helpers.evaluation_run import draw, row, subject, write_run


def test_the_section_prefers_the_guidance_that_draws_the_real_pictures(tmp_path: Path) -> None:
    rows = [
        row(number % 16, style, split)
        for number in range(10)
        for style in ("plain", "framed")
        for split in ("train", "held_out_concept")
    ]
    rows += [
        row(number, "plain", "train", key=f"more {number}", concept=f"more {number}")
        for number in range(10, 16)
    ]
    write_run(tmp_path, rows)
    embedded = open_embedded(tmp_path / "embed")

    def draw_prompts(prompts: list[str], seed: int, guidance: float) -> np.ndarray:
        numbers = [int(prompt.split()[-1]) if guidance > 1 else 3 for prompt in prompts]
        return np.stack([draw(number, "plain", 16) for number in numbers])

    def colours(pictures: np.ndarray) -> Any:
        return pictures.mean((1, 2))

    config = FidelityConfig(pictures=16, guidance=(1.0, 2.0))
    section = fidelity(config, subject(tmp_path), 16, draw_prompts, {"mean colour": colours})
    table = section["tables"][0]
    assert table["head"][5:] == ["Fréchet on mean colour", "kernel × 1000 on mean colour"]
    one, two, trained = table["rows"]
    assert (
        two[1]["value"] == pytest.approx(100, abs=0.2)
        and one[1]["value"] < 70
        and trained[1] is None
    )
    for column in (2, 5, 6):
        assert two[column]["value"] < one[column]["value"]
        assert all(
            figures[column]["low"] <= figures[column]["value"] <= figures[column]["high"]
            for figures in (one, trained)
        )
    assert two[4]["value"] > one[4]["value"] and two[3]["value"] == 1.0
    assert (
        tmp_path / "out" / section["pictures"][0]["picture"]
    ).is_file() and "16 captions" in section["text"][0]
    assert (
        "16 captions" in table["caption"]
        and "seed 0" in table["caption"]
        and "16 px" in table["caption"]
    )
    # The trained pictures that are drawn show more concepts than the held-out ones.
    groups = [read_pairs(embedded, split, 16, 0).groups for split in ("held_out_concept", "train")]
    assert (
        trained[3]["groups"]
        == len(set(groups[1]))
        != len(set(groups[0]))
        == trained[4]["groups"]
        == one[3]["groups"]
    )


def test_too_few_pairs_are_said(tmp_path: Path) -> None:
    write_run(tmp_path, [row(1, "plain", "train"), row(2, "plain", "held_out_concept")])
    nothing: Any = None
    section = fidelity(FidelityConfig(), subject(tmp_path), 16, nothing, {})
    assert "Not measured" in section["text"][0] and not section["tables"]
