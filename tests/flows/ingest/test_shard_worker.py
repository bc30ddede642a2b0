"""A shard is made whole or not at all, and its pictures look as the originals do on white."""

import hashlib
import io
import json
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from img2dataset.resizer import Resizer
from PIL import Image

from flows.ingest import ingest, shard_worker
from flows.ingest.plain_image import MATTED_PIXELS, to_plain
from flows.ingest.shard_worker import COLUMNS, Watchdog, make_shard
from flows.sources.opt_out import OptOut
from flows.sources.static_server import StaticServer
from tests.helpers.hostile_server import thread

HERE = Path(__file__).parents[3]


def settings(base: str, **changes: Any) -> dict[str, Any]:
    rules = {
        "timeout_s": 5,
        "retries": 0,
        "max_bytes": 10**7,
        "max_pixels": 10**8,
        "allow_private": False,
        "loopback": base,
    }
    return {
        "rules": rules,
        "recorded": "http://127.0.0.1:80",
        "actual": base,
        "opt_out": OptOut(),
        "threads": 4,
        "image_size_px": 32,
        "resize": "border",
        "encode": "png",
        "images_per_shard": 100,
        "max_passing": 1.0,
        "crashed": [],
        **changes,
    }


def write_feed(path: Path, names: list[str]) -> Path:
    rows = [
        dict.fromkeys(COLUMNS, "")
        | {
            "captions": [name],
            "caption": name,
            "sample": f"key {name}",
            "url": f"http://127.0.0.1:80/m/{name}",
        }
        for name in names
    ]
    with pa.ipc.new_file(path, ingest.FEED) as writer:
        writer.write_table(pa.Table.from_pylist(rows, ingest.FEED))
    return path


def made(
    tmp_path: Path, images: dict[str, np.ndarray | bytes], **changes: Any
) -> dict[str, np.ndarray]:
    """Serve the images, make them a shard and return its pictures by caption, BGR."""
    (tmp_path / "pictures").mkdir()
    for name, image in images.items():
        data = (
            image
            if isinstance(image, bytes)
            else cv2.imencode(Path(name).suffix, image)[1].tobytes()
        )
        (tmp_path / "pictures" / name).write_bytes(data)
    feed = write_feed(tmp_path / "feed.arrow", list(images))
    (tmp_path / "shards").mkdir()
    with StaticServer({"m": tmp_path / "pictures"}) as server:
        make_shard(feed, 7, tmp_path / "shards", settings(server.base, **changes), Watchdog())
    assert feed.is_file()
    found: dict[str, dict[str, bytes]] = {}
    with tarfile.open(tmp_path / "shards" / "00007.tar") as tar:
        for member in tar:
            key, _, suffix = member.name.partition(".")
            stream = tar.extractfile(member)
            assert stream
            found.setdefault(key, {})[suffix] = stream.read()
    told = {
        row["caption"]: row
        for row in pq.read_table(tmp_path / "shards" / "00007.parquet").to_pylist()
    }
    assert set(told) == set(images)
    pictures = {}
    for parts in found.values():
        caption = parts["txt"].decode()
        facts = json.loads(parts["json"])
        assert facts["sample"] == told[caption]["sample"] == f"key {caption}"
        assert facts["captions"] == told[caption]["captions"] == [caption]
        pictures[caption] = cv2.imdecode(
            np.frombuffer(parts[changes.get("encode", "png")], np.uint8), cv2.IMREAD_COLOR
        )
    return pictures


def disc(side: int, dtype: type = np.uint8) -> np.ndarray:
    """Return an opaque red disc on transparent black."""
    image = np.zeros((side, side, 4), np.uint8)
    cv2.circle(image, (side // 2, side // 2), side // 3, (0, 0, 255, 255), -1)
    return image.astype(dtype) * 257 if dtype is np.uint16 else image


def test_transparency_becomes_white_at_eight_and_sixteen_bits(tmp_path: Path) -> None:
    pictures = made(
        tmp_path, {"8.png": disc(64), "16.png": disc(64, np.uint16), "w.webp": disc(256)}
    )
    for picture in pictures.values():
        assert picture.shape == (32, 32, 3)
        assert picture[0, 0].tolist() == [255, 255, 255]
        blue, green, red = picture[16, 16].tolist()
        assert red > 245 and blue < 10 and green < 10


def test_one_deep_or_turned_picture_among_others_is_stored_as_it_is_to_be_seen(
    tmp_path: Path,
) -> None:
    half = np.full((48, 96, 3), 255, np.uint8)
    half[:, :48] = (0, 0, 255)
    buffer, exif = io.BytesIO(), Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(half[..., ::-1].copy()).save(buffer, "JPEG", exif=exif)
    pictures = made(
        tmp_path,
        {
            "16.tif": np.full((64, 64, 3), 30000, np.uint16),
            "float.tif": np.full((64, 64, 3), 30000 / 65535, np.float32),
            "sideways.jpg": buffer.getvalue(),
            "8.png": disc(64),
            "wide.tif": np.full((64, 64), 30000, np.int32),
        },
        image_size_px=96,
    )
    assert (pictures["16.tif"] == 117).all() and (pictures["float.tif"] == 117).all()
    turned = pictures["sideways.jpg"].astype(int)
    assert np.abs(turned[10, 48] - (0, 0, 255)).max() < 20 < 200 < turned[80, 48].min()
    told = {
        row["caption"]: row
        for row in pq.read_table(tmp_path / "shards" / "00007.parquet").to_pylist()
    }
    sideways = told["sideways.jpg"]
    assert (sideways["original_width"], sideways["original_height"]) == (48, 96)
    assert sideways["sha256"] == hashlib.sha256(buffer.getvalue()).hexdigest()
    assert told["wide.tif"]["status"] == "failed_to_resize"
    assert "int32" in told["wide.tif"]["error_message"]


def test_a_flag_keeps_its_proportions_on_white(tmp_path: Path) -> None:
    picture = made(tmp_path, {"flag.png": np.full((100, 200, 3), (200, 30, 30), np.uint8)})[
        "flag.png"
    ]
    is_flag = (picture != 255).any(axis=2)
    rows, columns = np.flatnonzero(is_flag.any(axis=1)), np.flatnonzero(is_flag.any(axis=0))
    assert (rows[0], rows[-1], columns[0], columns[-1]) == (8, 23, 0, 31)
    assert is_flag[8:24].all()


def test_grey_and_palette_pictures_come_through(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    Image.fromarray(disc(64)[..., [2, 1, 0, 3]]).quantize(4).save(buffer, "PNG")
    pictures = made(
        tmp_path, {"grey.png": np.full((40, 40), 128, np.uint8), "palette.png": buffer.getvalue()}
    )
    assert abs(int(pictures["grey.png"][16, 16, 0]) - 128) < 3
    assert pictures["palette.png"][0, 0].tolist() == [255, 255, 255]
    assert pictures["palette.png"][16, 16, 2] > 240


def gradient(height: int, width: int) -> np.ndarray:
    """Return a picture whose colours and transparency vary."""
    down, across = np.mgrid[:height, :width]
    return np.stack(
        [down % 256, across % 256, (down + across) % 256, (down * 3 + across) % 256], axis=2
    ).astype(np.uint8)


def test_a_large_picture_is_put_on_white_as_img2dataset_does_it(tmp_path: Path) -> None:
    image = gradient(1100, 1000)
    assert image.shape[0] * image.shape[1] > MATTED_PIXELS
    body = cv2.imencode(".png", image)[1].tobytes()
    mine = to_plain(io.BytesIO(body))
    assert cv2.imdecode(np.frombuffer(mine.getbuffer(), np.uint8), cv2.IMREAD_UNCHANGED).shape == (
        1100,
        1000,
        3,
    )
    resizer = Resizer(
        image_size=64,
        resize_mode="border",
        resize_only_if_bigger=False,
        encode_format="png",
        encode_quality=1,
    )
    assert resizer(mine) == resizer(io.BytesIO(body))
    for body in (
        cv2.imencode(".jpg", image)[1].tobytes(),
        cv2.imencode(".png", image[..., :3])[1].tobytes(),
    ):
        stream = io.BytesIO(body)
        assert to_plain(stream) is stream


ONE = """
import json, sys
from pathlib import Path
from flows.ingest import shard_worker
from flows.sources.opt_out import OptOut
settings = json.loads(sys.argv[3]) | {"opt_out": OptOut()}
shard_worker.make_shard(Path(sys.argv[1]), 7, Path(sys.argv[2]), settings, shard_worker.Watchdog())
status = Path("/proc/self/status").read_text().splitlines()
print(next(line for line in status if line.startswith("VmHWM")).split()[1])
"""


def test_pictures_just_within_the_limits_take_bounded_memory(tmp_path: Path) -> None:
    """25 megapixels with transparency, a picture of sixteen bits and a thread: img2dataset alone
    takes 2 GB for the first.
    """
    (tmp_path / "pictures").mkdir()
    pixels = np.full((5000, 5000, 4), 200, np.uint8)
    cv2.imwrite(str(tmp_path / "pictures" / "large.png"), pixels, [cv2.IMWRITE_PNG_COMPRESSION, 1])
    cv2.imwrite(
        str(tmp_path / "pictures" / "deep.png"),
        pixels[:2000, :2000].astype(np.uint16) * 257,
        [cv2.IMWRITE_PNG_COMPRESSION, 1],
    )
    del pixels
    (tmp_path / "pictures" / "thread.png").write_bytes(thread(1_000_000))
    feed = write_feed(tmp_path / "feed.arrow", ["large.png", "deep.png", "thread.png"])
    with StaticServer({"m": tmp_path / "pictures"}) as server:
        told = settings(server.base)
        told["rules"] |= {"max_pixels": 25_000_000, "timeout_s": 30}
        del told["opt_out"]
        (tmp_path / "shards").mkdir()
        arguments = [str(feed), str(tmp_path / "shards"), json.dumps(told)]
        done = subprocess.run(
            [sys.executable, "-c", ONE, *arguments], capture_output=True, text=True
        )
    assert done.returncode == 0, done.stderr
    rows = {
        row["caption"]: row
        for row in pq.read_table(tmp_path / "shards" / "00007.parquet").to_pylist()
    }
    assert rows["large.png"]["status"] == rows["deep.png"]["status"] == "success"
    assert int(done.stdout) * 1024 < 1e9


def test_missing_files_are_told_and_the_rest_is_stored(tmp_path: Path) -> None:
    pictures = made(tmp_path, {"a.png": disc(64), "b.png": b"<html>", "c.png": disc(32)})
    assert set(pictures) == {"a.png", "c.png"}
    told = {
        row["caption"]: row
        for row in pq.read_table(tmp_path / "shards" / "00007.parquet").to_pylist()
    }
    assert (told["b.png"]["status"], told["b.png"]["error_message"][:12]) == (
        "failed_to_download",
        "not_an_image",
    )


def test_a_shard_that_lost_rows_is_refused(tmp_path: Path) -> None:
    made(tmp_path, {"a.png": disc(64), "b.png": disc(32)})
    stem = tmp_path / "shards" / "00007"
    shard_worker.check_shard(stem, tmp_path / "feed.arrow")
    longer = write_feed(tmp_path / "longer.arrow", ["a.png", "b.png", "c.png"])
    with pytest.raises(RuntimeError, match="3 rows requested, 2 recorded"):
        shard_worker.check_shard(stem, longer)
    shutil.copy(stem.with_suffix(".tar"), tmp_path / "whole.tar")
    with tarfile.open(stem.with_suffix(".tar"), "w"):
        pass
    with pytest.raises(RuntimeError, match="2 succeeded, 0 stored"):
        shard_worker.check_shard(stem, tmp_path / "feed.arrow")
    stem.with_suffix(".tar").write_bytes((tmp_path / "whole.tar").read_bytes()[:2000])
    with pytest.raises((tarfile.TarError, RuntimeError)):
        shard_worker.check_shard(stem, tmp_path / "feed.arrow")


def test_a_full_disk_is_told_as_such_where_img2dataset_swallows_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made(tmp_path, {"a.png": disc(64), "b.png": disc(32)})
    stem = tmp_path / "shards" / "00007"
    longer = write_feed(tmp_path / "longer.arrow", ["a.png", "b.png", "c.png"])
    full = shutil.disk_usage(tmp_path)._replace(free=2**20 - 1)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: full)
    with pytest.raises(OSError, match="no space left on the device"):
        shard_worker.check_shard(stem, longer)
    # A whole shard is one, however full the disk is.
    assert shard_worker.check_shard(stem, tmp_path / "feed.arrow") == {"success": 2}


@pytest.mark.parametrize("encode", ["jpg", "webp"])
def test_other_formats_are_stored_too(tmp_path: Path, encode: str) -> None:
    pictures = made(tmp_path, {"a.png": disc(64)}, encode=encode)
    assert pictures["a.png"][16, 16, 2] > 220


SILENT = """
import time
from flows.ingest.shard_worker import Watchdog
with Watchdog(limit_s=4) as watchdog:
    for row in range(12):  # longer than the limit in all
        with watchdog.on(row, is_last=True):
            time.sleep(0.5)
    print(watchdog.rows, flush=True)
    time.sleep(60)
"""


def test_a_process_in_which_nothing_moves_ends_itself() -> None:
    command = [sys.executable, "-c", SILENT]
    done = subprocess.run(command, capture_output=True, text=True, timeout=50, cwd=HERE)
    assert (done.returncode, done.stdout) == (1, "12\n") and "Timeout" in done.stderr


LIGHT = """
import sys
import flows.ingest.shard_worker
heavy = {"torch", "ray", "pandas", "wandb", "albumentations", "img2dataset", "webdataset"}
print(sorted(heavy & set(sys.modules)))
import torch, albumentations, webdataset, img2dataset
assert webdataset.pytorch.DataLoader is torch.utils.data.DataLoader
assert callable(img2dataset.download) and albumentations.Compose and torch.nn
"""


def test_what_a_task_imports_is_light_and_hides_nothing_from_a_later_import() -> None:
    command = [sys.executable, "-c", LIGHT]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100, cwd=HERE)
    assert (done.returncode, done.stdout) == (0, "[]\n"), done.stderr
