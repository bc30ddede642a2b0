"""A drawing has a main colour only if that colour fills most of it."""

from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image

from flows.demo.main_colour import main_colour


@pytest.mark.parametrize(
    ("bgr", "name"),
    [
        ((30, 30, 220), "red"),
        ((0, 120, 255), "orange"),
        ((40, 210, 250), "yellow"),
        ((60, 170, 60), "green"),
        ((220, 120, 30), "blue"),
        ((200, 60, 140), "purple"),
        ((180, 80, 250), "pink"),
        ((40, 70, 120), "brown"),
        ((20, 20, 20), "black"),
        ((140, 140, 140), "grey"),
        ((250, 250, 250), "white"),
    ],
)
def test_a_colour_is_named_where_it_fills_the_drawing(
    tmp_path: Path, bgr: tuple[int, int, int], name: str
) -> None:
    image = np.zeros((64, 64, 4), np.uint8)
    image[8:56, 8:56] = (*bgr, 255)
    cv2.imwrite(str(tmp_path / "a.png"), image)
    assert main_colour(tmp_path / "a.png") == name


def test_a_file_of_too_many_pixels_is_not_decoded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Image.new("RGB", (80, 80)).save(tmp_path / "bomb.png")
    monkeypatch.setattr("flows.demo.main_colour.MAX_PIXELS", 80 * 79)
    monkeypatch.setattr(cv2, "imread", None)
    assert main_colour(tmp_path / "bomb.png") == main_colour(tmp_path / "none.png") == ""


def test_no_colour_is_named_where_two_share_the_drawing(tmp_path: Path) -> None:
    image = np.zeros((64, 64, 4), np.uint8)
    image[8:32, 8:56], image[32:56, 8:56] = (30, 30, 220, 255), (220, 120, 30, 255)
    cv2.imwrite(str(tmp_path / "a.png"), image)
    assert main_colour(tmp_path / "a.png") == ""
    assert main_colour(tmp_path / "missing.png") == ""
