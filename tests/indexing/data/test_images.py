"""Pictures are read as the models saw them, and what a damaged shard holds is refused in one
line.
"""

import tarfile
from pathlib import Path

import cv2
import numpy as np
import pytest

from indexing.data.images import read_picture, write_png
from infra.errors import DataError
from infra.square_image import square
from tests.helpers.evaluation_run import draw, usual_rows, write_run
from tests.helpers.stage_folders import shards_in
from training.data.image_reader import decode


def test_pictures_are_read_from_their_place_in_a_shard(tmp_path: Path) -> None:
    from indexing.data.held_out import open_embedded

    rows = usual_rows()
    write_run(tmp_path, rows)
    for drawn, row in zip(rows, open_embedded(tmp_path / "embed").table.to_pylist(), strict=True):
        picture = read_picture(row, shards_in(tmp_path), 20)
        assert np.array_equal(picture[3:-3], draw(drawn["number"], drawn["style"])[3:-3])


@pytest.mark.parametrize(
    "shape", [(40, 40, 3), (24, 40, 3), (40, 25, 4), (33, 33, 4), (40, 40), (10, 10, 3)]
)
def test_a_picture_is_what_training_saw(shape: tuple[int, ...]) -> None:
    picture = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    trained_on = decode(cv2.imencode(".png", picture)[1].tobytes(), 16, "made")
    assert np.array_equal(square(picture, 16), trained_on)


def test_bytes_that_are_no_picture_are_refused(tmp_path: Path) -> None:
    (tmp_path / "shards").mkdir()
    (tmp_path / "shards" / "a.tar").write_bytes(b"no picture here" * 10)
    shards = shards_in(tmp_path)
    row = {"shard": "a.tar", "member": "x.png", "offset": 0, "size_bytes": 100}
    with pytest.raises(DataError, match=r"a\.tar/x\.png is not"):
        read_picture(row, shards, 16)
    with pytest.raises(DataError, match=r"a\.tar/x\.png is not"):
        read_picture(row | {"offset": 10**6}, shards, 16)
    with pytest.raises(DataError, match="cannot read"):
        read_picture(row | {"shard": "missing.tar"}, shards, 16)
    assert not tarfile.is_tarfile(tmp_path / "shards" / "a.tar")


def test_a_picture_is_written_as_png(tmp_path: Path) -> None:
    picture = np.random.default_rng(0).integers(0, 256, (8, 12, 3), dtype=np.uint8)
    write_png(picture, tmp_path / "picture.png")
    assert np.array_equal(cv2.imread(str(tmp_path / "picture.png"))[..., ::-1], picture)
