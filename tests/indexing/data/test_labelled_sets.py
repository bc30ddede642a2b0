"""A labelled set reads the same from folders, parquet and WebDataset shards, and what is broken or
hostile is named.
"""

import io
import pickle
import re
import tarfile
from pathlib import Path

import cv2
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from flows.demo import packaged_sets
from indexing.data.labelled_sets import ImageSet, open_set
from infra.errors import CallerError, DataError

COLOURS = {"cat": (200, 10, 10), "dog": (10, 200, 10), "eel": (10, 10, 200)}


def png(name: str, place: int = 0) -> bytes:
    picture = np.full((12, 10, 3), COLOURS[name], np.uint8)
    picture[0, 0] = place
    return packaged_sets.png(picture)


def write_folders(folder: Path) -> Path:
    for name in COLOURS:
        (folder / name).mkdir(parents=True)
        for place in range(2):
            (folder / name / f"{place}.png").write_bytes(png(name, place))
    return folder


def write_parquet(folder: Path, is_hugging_face: bool) -> Path:
    folder.mkdir()
    rows = [(png(name, place), number) for number, name in enumerate(COLOURS) for place in range(2)]
    images = [{"bytes": data, "path": "x.png"} if is_hugging_face else data for data, _ in rows]
    pq.write_table(
        pa.table({"image": images, "label": [label for _, label in rows]}), folder / "pets.parquet"
    )
    (folder / "classnames.txt").write_text("cat\ndog\neel\n")
    return folder / "pets.parquet"


def write_shards(folder: Path) -> Path:
    (folder / "test").mkdir(parents=True)
    for shard, place in enumerate(range(2)):
        with tarfile.open(folder / "test" / f"{shard}.tar", "w") as tar:
            for number, name in enumerate(COLOURS):
                for suffix, data in (("png", png(name, place)), ("cls", str(number).encode())):
                    member = tarfile.TarInfo(f"s{shard}{number}.{suffix}")
                    member.size = len(data)
                    tar.addfile(member, io.BytesIO(data))
    (folder / "classnames.txt").write_text("cat\ndog\neel\n")
    (folder / "zeroshot_classification_templates.txt").write_text("a photo of a {c}\na {c}\n")
    return folder


def content(image_set: ImageSet) -> set[tuple[str, bytes]]:
    return {
        (image_set.names[label], data)
        for label, data in zip(image_set.labels, image_set.encoded, strict=True)
    }


def test_all_layouts_hold_the_same(tmp_path: Path) -> None:
    paths = [
        write_folders(tmp_path / "a"),
        write_parquet(tmp_path / "b", True),
        write_parquet(tmp_path / "c", False),
        write_shards(tmp_path / "d"),
    ]
    image_sets = [open_set(path) for path in paths]
    expected = {(name, png(name, place)) for name in COLOURS for place in range(2)}
    for image_set in image_sets:
        assert content(image_set) == expected and image_set.names == ["cat", "dog", "eel"]
    from_folders, *_, from_shards = image_sets
    assert from_shards.templates == ("a photo of a {}", "a {}") and from_folders.templates == ()
    pixels = from_folders.pictures(16)
    colours = [COLOURS[from_folders.names[label]] for label in from_folders.labels]
    assert pixels.shape == (6, 16, 16, 3) and (pixels[:, 8, 8] == colours).all()
    assert (pixels[:, 8, 0] == 255).all()  # white beside a picture that is not square


def test_a_part_keeps_its_labels(tmp_path: Path) -> None:
    whole = open_set(write_folders(tmp_path / "a"))
    subset = whole.only(np.array([4, 1]))
    assert len(subset) == 2 and content(subset) < content(whole)
    assert subset.labels.tolist() == whole.labels[[4, 1]].tolist()


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ("cat\ndog\n", "labels are 0 to 2, but there are 2 class names"),
        ("cat\ndog\neel\n", "must contain {} or {c} exactly once"),
    ],
)
def test_wrong_class_names_and_templates_are_named(
    tmp_path: Path, names: str, message: str
) -> None:
    write_shards(tmp_path / "d")
    (tmp_path / "d" / "classnames.txt").write_text(names)
    (tmp_path / "d" / "zeroshot_classification_templates.txt").write_text("a photo\n")
    with pytest.raises(DataError, match=re.escape(message)):
        open_set(tmp_path / "d")


def test_a_path_without_a_set_is_a_caller_error(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    pq.write_table(pa.table({"picture": [b"x"]}), tmp_path / "odd.parquet")
    for path, message in (
        ("none", "does not exist"),
        ("empty", "holds no pictures"),
        ("odd.parquet", "no column 'image'"),
    ):
        with pytest.raises(CallerError, match=message):
            open_set(tmp_path / path)
    with pytest.raises(CallerError, match="neither a path nor a packaged set"):
        packaged_sets.set_path("imaginary", tmp_path)


def test_a_sample_without_its_class_and_a_broken_picture_are_named(tmp_path: Path) -> None:
    write_shards(tmp_path / "d")
    with tarfile.open(tmp_path / "d" / "test" / "9.tar", "w") as tar:
        member = tarfile.TarInfo("lonely.png")
        member.size = 3
        tar.addfile(member, io.BytesIO(b"abc"))
    with pytest.raises(DataError, match="lonely has only image"):
        open_set(tmp_path / "d")
    folders = write_folders(tmp_path / "a")
    (folders / "cat" / "0.png").write_bytes(b"no picture")
    with pytest.raises(DataError, match="picture 0 cannot be read as an 8-bit picture"):
        open_set(folders).pictures(8)


def test_a_packaged_set_is_made_once_and_agrees_with_its_package(tmp_path: Path) -> None:
    from sklearn.datasets import load_digits

    path = packaged_sets.set_path("digits", tmp_path)
    digits, sklearn_digits = open_set(path), load_digits()
    assert len(digits) == 1797 and (digits.labels == sklearn_digits.target).all()
    assert digits.names[3] == "three" and len(digits.templates) == 3
    first = cv2.imdecode(np.frombuffer(digits.encoded[0], np.uint8), cv2.IMREAD_GRAYSCALE)
    assert np.allclose(255 - first, sklearn_digits.images[0] * 255 / 16, atol=1)
    stamp = path.stat().st_mtime_ns
    assert packaged_sets.set_path("digits", tmp_path).stat().st_mtime_ns == stamp


def test_a_pickle_that_would_run_code_is_refused() -> None:
    class Evil:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return (print, ("ran",))

    arrays = packaged_sets._ArraysOnly(io.BytesIO(pickle.dumps(np.arange(3)))).load()
    assert arrays.tolist() == [0, 1, 2]
    with pytest.raises(DataError, match="only numpy arrays are read"):
        packaged_sets._ArraysOnly(io.BytesIO(pickle.dumps(Evil()))).load()
