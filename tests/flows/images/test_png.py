"""Written images hold their prompt, seed and settings, and stand in the contact sheet."""

import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from flows.images.png import write_pictures
from indexing.data.contact_sheet import GAP_PX


def test_pictures_carry_their_prompt_seed_and_settings_and_stand_in_the_grid(
    tmp_path: Path,
) -> None:
    images = np.random.default_rng(0).integers(0, 256, (2, 3, 8, 10, 3), np.uint8)
    settings: dict[str, Any] = {"steps": 5, "guidance": None, "clip": "abc"}
    files, grid = write_pictures(
        images, ["a red heart", "Ünïcode / ../ path"], 7, settings, tmp_path / "out"
    )
    assert len(set(files)) == 6 and all(file.parent == tmp_path / "out" for file in files)
    with Image.open(files[4]) as picture:
        assert np.array_equal(np.asarray(picture), images[1, 1])
        assert (
            picture.info["prompt"] == "Ünïcode / ../ path"
            and picture.info["seed"] == "7"
            and picture.info["guidance"] == "null"
        )
    with Image.open(grid) as picture:
        last = np.asarray(picture)[
            -(8 * 10 + GAP_PX) : -GAP_PX, -(10 * 10 + GAP_PX) : -GAP_PX
        ]  # enlarged ten times
        assert np.array_equal(last[::10, ::10], images[1, 2]) and np.array_equal(
            last[9::10, 9::10], images[1, 2]
        )
        assert json.loads(str(picture.info["prompts"])) == ["a red heart", "Ünïcode / ../ path"]
