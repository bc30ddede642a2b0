"""A picture that is not square becomes what open_clip would show its network: its transforms, step
by step, by hand.
"""

import json
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from PIL import Image

from flows.ingest import curate
from indexing.data.labelled_sets import ImageSet
from indexing.service.image_upload import PictureDecoders
from infra.storage.stage_files import FolderFiles
from tests.flows.ingest.test_curate import NO_HELD_OUT, item, write_shard
from tests.helpers.stage_folders import embed_folders
from tests.training.models.test_open_clip_format import small, written
from training.data.image_reader import as_square, read_file, read_table
from training.jobs import embed
from training.models import clip as clip_model
from training.models.pixels import to_pixels
from training.sections.preprocessing import WHOLE, Interpolation, Look

SHAPES = [(40, 60), (61, 33), (16, 50), (9, 13), (24, 24), (100, 101), (100, 7)]
SIDE = 16
CROPPED = Look("shortest", "bicubic")


def drawn(height: int, width: int) -> np.ndarray:
    """Return a picture with edges and colour, uint8 BGR (H, W, 3), of which no part is like
    another.
    """
    noise = np.random.default_rng(height * width).integers(
        0, 256, (height // 4 + 1, width // 4 + 1, 3), np.uint8
    )
    return cv2.resize(noise, (width, height), interpolation=cv2.INTER_NEAREST)


def expected(picture: np.ndarray, look: Look) -> np.ndarray:
    """Do what open_clip's transform does, step by step, RGB: resize all of it, then cut or
    paste.
    """
    image = Image.fromarray(picture[..., ::-1].copy())
    kernel = {
        "bicubic": Image.Resampling.BICUBIC,
        "bilinear": Image.Resampling.BILINEAR,
        "area": Image.Resampling.BOX,
    }[look.interpolation]
    width, height = image.size
    if look.resize == "squash":
        return np.asarray(image.resize((SIDE, SIDE), kernel))
    if look.resize == "shortest":
        size = (
            (SIDE, int(SIDE * height / width))
            if width <= height
            else (int(SIDE * width / height), SIDE)
        )
        left, top = (round((side - SIDE) / 2.0) for side in size)
        return np.asarray(image.resize(size, kernel).crop((left, top, left + SIDE, top + SIDE)))
    width, height = (max(1, round(side / (max(image.size) / SIDE))) for side in image.size)
    made = np.full((SIDE, SIDE, 3), look.fill, np.uint8)
    left, top = (SIDE - width) // 2, (SIDE - height) // 2
    made[top : top + height, left : left + width] = np.asarray(
        image.resize((width, height), kernel)
    )
    return made


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(
    "look",
    [
        CROPPED,
        Look("shortest", "bilinear"),
        Look("squash", "bicubic"),
        Look("longest", "bicubic", 0),
        Look("longest", "area", 9),
    ],
)
def test_a_square_is_what_open_clip_makes_of_the_picture(
    look: Look, shape: tuple[int, int]
) -> None:
    picture = drawn(*shape)
    found = as_square(picture, SIDE, look)
    assert found.shape == (SIDE, SIDE, 3) and found.dtype == np.uint8
    assert np.array_equal(found, expected(picture, look))


def test_a_long_picture_costs_no_more_than_its_square() -> None:
    picture = np.zeros((1, 200_000, 3), np.uint8)  # whole, at this side, it would have 150 GB
    assert as_square(picture, 512, CROPPED).shape == (512, 512, 3)


def test_what_is_transparent_is_white_however_it_is_made_square() -> None:
    picture = np.zeros((20, 30, 4), np.uint8)
    assert (as_square(picture, SIDE, CROPPED) == 255).all() and (
        as_square(picture, SIDE, WHOLE) == 255
    ).all()


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
@pytest.mark.parametrize("side", [8, 40])
def test_squares_of_another_side_are_resized_as_pillow_does(
    side: int, interpolation: Interpolation
) -> None:
    pictures = (
        np.stack([drawn(24, 24)[..., ::-1], drawn(24, 25)[:, :24, ::-1]]) // 2 + 64
    )  # Pillow cuts off between its two passes
    found = (to_pixels(torch.from_numpy(pictures), side, interpolation) + 1) * 127.5
    kernel = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}[
        interpolation
    ]
    for made, picture in zip(found, pictures, strict=True):
        theirs = np.asarray(Image.fromarray(picture).resize((side, side), kernel), np.float32)
        assert np.abs(made.permute(1, 2, 0).numpy() - theirs).max() < 1.6  # and rounds twice


def test_every_way_to_a_clips_embedding_takes_its_look(tmp_path: Path) -> None:
    model, _ = written(tmp_path / "clip", small(resize_mode="shortest", interpolation="bicubic"))
    assert (
        json.loads((tmp_path / "clip" / "config.json").read_text())["clip"]["resize_mode"]
        == "shortest"
    )
    assert embed.read_look(tmp_path / "clip") == model.config.look == CROPPED
    picture = drawn(30, 48)
    png = cv2.imencode(".png", picture)[1].tobytes()
    (tmp_path / "one.png").write_bytes(png)
    vector = clip_model.embed_images(
        model, torch.from_numpy(expected(picture, CROPPED)[None].copy())
    )
    whole = clip_model.embed_images(model, torch.from_numpy(as_square(picture, SIDE)[None]))
    assert float((vector - whole).norm()) > 0.01, "a look that changes nothing proves nothing"
    write_shard(tmp_path / "ingest", 0, [item(0, image=png), item(1)])
    curate.run(NO_HELD_OUT, FolderFiles(tmp_path / "ingest"), tmp_path / "curate")
    table = read_table(tmp_path / "curate" / "keep.parquet")
    row = table["key"].to_pylist().index(item(0)["sample"])
    rows = embed._embed_rows(
        embed.EmbedConfig(), table, False, embed_folders(tmp_path, tmp_path / "work")
    )["img_emb"]
    by_file = embed.embed_images(tmp_path / "clip", [tmp_path / "one.png"])
    torch.testing.assert_close(
        torch.from_numpy(rows[row : row + 1].astype(np.float32)), vector, atol=2e-3, rtol=0
    )
    torch.testing.assert_close(torch.from_numpy(by_file), vector, atol=1e-3, rtol=0)

    def square(given: np.ndarray, side_px: int) -> np.ndarray:
        return as_square(given, side_px, CROPPED)

    judged = ImageSet("one", [png], np.zeros(1, np.int64), ["thing"], (), square)
    decoders = PictureDecoders(limit_s=60)
    uploaded = decoders.decode(png, SIDE, square)
    decoders.close()
    for found in (
        uploaded,
        judged.only(np.array([0])).pictures(SIDE)[0],
        read_file(tmp_path / "one.png", SIDE, CROPPED),
    ):
        assert np.array_equal(found, as_square(picture, SIDE, CROPPED))
