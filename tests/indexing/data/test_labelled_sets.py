"""A labelled set reads the same from folders, parquet and WebDataset shards, and what is broken or
hostile is named.
"""

import io
import os
import tarfile
from pathlib import Path

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


def content(found: ImageSet) -> set[tuple[str, bytes]]:
    return {
        (found.names[label], data) for label, data in zip(found.labels, found.encoded, strict=True)
    }


def test_all_layouts_hold_the_same(tmp_path: Path) -> None:
    paths = [
        write_folders(tmp_path / "a"),
        write_parquet(tmp_path / "b", True),
        write_parquet(tmp_path / "c", False),
        write_shards(tmp_path / "d"),
    ]
    read = [open_set(path) for path in paths]
    expected = {(name, png(name, place)) for name in COLOURS for place in range(2)}
    assert all(content(each) == expected and each.names == ["cat", "dog", "eel"] for each in read)
    assert read[3].templates == ("a photo of a {}", "a {}") and read[0].templates == ()
    pixels = read[0].pictures(16)
    assert (
        pixels.shape == (6, 16, 16, 3)
        and (pixels[:, 8, 8] == [COLOURS[read[0].names[label]] for label in read[0].labels]).all()
    )
    assert (pixels[:, 8, 0] == 255).all()  # white beside what is not square


def test_a_part_keeps_its_labels(tmp_path: Path) -> None:
    whole = open_set(write_folders(tmp_path / "a"))
    some = whole.only(np.array([4, 1]))
    assert (
        len(some) == 2
        and content(some) < content(whole)
        and some.labels.tolist() == whole.labels[[4, 1]].tolist()
    )


@pytest.mark.parametrize(
    ("names", "said"),
    [
        ("cat\ndog\n", "labels are 0 to 2, but there are 2 class names"),
        ("cat\ndog\neel\n", "must contain {} or {c} exactly once"),
    ],
)
def test_names_and_templates_that_do_not_fit_are_named(
    tmp_path: Path, names: str, said: str
) -> None:
    write_shards(tmp_path / "d")
    (tmp_path / "d" / "classnames.txt").write_text(names)
    (tmp_path / "d" / "zeroshot_classification_templates.txt").write_text("a photo\n")
    with pytest.raises(DataError, match=said.replace("{", r"\{").replace("}", r"\}")):
        open_set(tmp_path / "d")


def test_what_is_no_set_is_a_callers_mistake(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    pq.write_table(pa.table({"picture": [b"x"]}), tmp_path / "odd.parquet")
    for path, said in (
        ("none", "does not exist"),
        ("empty", "holds no pictures"),
        ("odd.parquet", "no column 'image'"),
    ):
        with pytest.raises(CallerError, match=said):
            open_set(tmp_path / path)


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


def test_fifos_and_links_out_of_a_set_are_refused_at_once(tmp_path: Path) -> None:
    folders = write_folders(tmp_path / "pets")
    shards = write_shards(tmp_path / "shards")
    os.mkfifo(shards / "test" / "2.tar")
    with pytest.raises(DataError, match=r"2\.tar cannot be read .*no regular file"):
        open_set(shards)
    os.mkfifo(folders / "cat" / "9.png")
    with pytest.raises(DataError, match=r"cat/9\.png is no regular file"):
        open_set(folders)
    (folders / "cat" / "9.png").unlink()
    (folders / "cat" / "9.png").symlink_to("/dev/zero")
    with pytest.raises(DataError, match=r"a link that leaves the folder: remove it"):
        open_set(folders)
