"""A download process resizes pixel for pixel as img2dataset does with albumentations."""

import io

import cv2
import numpy as np
import pytest
from img2dataset import resizer as img2dataset_resizer

from flows.ingest import resize_transforms

SIDE_PX = 32
GREY = [(32, 32), (33, 32), (20, 31), (31, 64), (64, 31), (100, 3), (1, 90)]
SHAPES = [*GREY, (77, 200, 3), (90, 61, 3), (9, 13, 3), (45, 50, 4)]


@pytest.mark.parametrize("mode", ["border", "center_crop", "keep_ratio", "keep_ratio_largest"])
def test_every_mode_gives_the_pixels_of_albumentations(
    mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    resizer = img2dataset_resizer.Resizer(
        image_size=SIDE_PX,
        resize_mode=mode,
        resize_only_if_bigger=False,
        encode_format="png",
        encode_quality=1,
    )
    rng = np.random.default_rng(0)
    bodies = [
        cv2.imencode(".png", rng.integers(0, 256, shape, np.uint8))[1].tobytes() for shape in SHAPES
    ]
    expected = [resizer(io.BytesIO(body)) for body in bodies]
    assert all(image is not None for image, *_ in expected)
    monkeypatch.setattr(img2dataset_resizer, "A", resize_transforms)
    assert [resizer(io.BytesIO(body)) for body in bodies] == expected
