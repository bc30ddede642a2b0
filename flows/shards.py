"""One shard of a URL table made into a WebDataset tar by img2dataset, in a process of its own.

`make_shard` takes img2dataset's own parts (Downloader, Resizer, tar and parquet writers) and puts `flows.fetch` in the place of its
unbounded download function. It writes aside and renames the tar last: a tar under its final name is whole. Run as
`python -m flows.shards PARENT`, it takes one JSON line per shard on stdin and answers on stdout; it ends when
the process PARENT does.
"""

import contextlib
import io
import json
import os
import shutil
import sys
import tarfile
import threading
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, TextIO

import cv2
import numpy as np
import pyarrow.ipc
import pyarrow.parquet as pq
from img2dataset import downloader as img2dataset_downloader
from img2dataset.downloader import Downloader
from img2dataset.resizer import Resizer
from img2dataset.writer import WebDatasetSampleWriter
from PIL import Image

from flows.fetch import FetchError, Rules, fetch_image

CARRIED = ["sample", "origin", "captions", "licence", "concept", "style", "category", "subcategory"]
COLUMNS = [*CARRIED, "caption", "url"]
DIGITS = 5
TICK_ROWS = 20


def shard_name(number: int) -> str:
    return f"{number:0{DIGITS}d}"


def make_shard(feed: Path, number: int, folder: Path, settings: dict[str, Any], tick: Callable[[int], None]) -> None:
    """Download the rows of `feed` (an Arrow file with COLUMNS) into FOLDER/<number>.parquet, _stats.json and .tar, in this order.

    `settings`: rules (of flows.fetch), recorded and actual (bases of loopback URLs), threads, image_size_px, resize, encode and
    images_per_shard. `tick` is told the rows finished since the last call. Raises OSError when the disk is full, RuntimeError when
    img2dataset lost rows.
    """
    name = shard_name(number)
    aside = folder / f".{name}.{os.getpid()}"
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    try:
        (aside / "feed.arrow").hardlink_to(feed)  # img2dataset deletes its input
        img2dataset_downloader.download_image_with_retry = fetcher(settings, tick)
        maker(aside, settings).download_shard((number, str(aside / "feed.arrow")))
        check_shard(aside / name, feed)
        for suffix in (".parquet", "_stats.json", ".tar"):
            (aside / f"{name}{suffix}").replace(folder / f"{name}{suffix}")
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def maker(aside: Path, settings: dict[str, Any]) -> Downloader:
    """Return img2dataset's shard maker, writing into `aside`."""
    resizer = Resizer(
        image_size=settings["image_size_px"],
        resize_mode=settings["resize"],
        resize_only_if_bigger=False,
        encode_format=settings["encode"],
        encode_quality=1 if settings["encode"] == "png" else 95,  # for png: compression; 9 is ten times slower and saves little
    )
    return Downloader(
        sample_writer_class=WebDatasetSampleWriter,
        resizer=resizer,
        thread_count=settings["threads"],
        save_caption=True,
        extract_exif=False,
        output_folder=str(aside),
        column_list=COLUMNS,
        timeout=None,
        number_sample_per_shard=settings["images_per_shard"],
        oom_shard_count=DIGITS,
        compute_hash="sha256",
        verify_hash_type=None,
        encode_format=settings["encode"],
        retries=0,
        user_agent_token=None,
        disallowed_header_directives=None,
    )


def fetcher(settings: dict[str, Any], tick: Callable[[int], None]) -> Callable[..., tuple[int, io.BytesIO | None, str | None]]:
    """Return a function of img2dataset's `download_image_with_retry` shape that fetches by our rules."""
    rules = Rules(**settings["rules"])
    recorded, actual = settings["recorded"], settings["actual"]
    done = 0

    def download_image_with_retry(row: tuple[int, str], **_: object) -> tuple[int, io.BytesIO | None, str | None]:
        nonlocal done
        key, url = row
        try:
            body, problem = (
                eight_bit(fetch_image(actual + url.removeprefix(recorded) if url.startswith(recorded + "/") else url, rules)),
                None,
            )
        except FetchError as error:
            body, problem = None, str(error)
        done += 1
        if done % TICK_ROWS == 0:
            tick(TICK_ROWS)
        return key, io.BytesIO(body) if body is not None else None, problem

    return download_image_with_retry


def eight_bit(body: bytes) -> bytes:
    """Return a 16-bit PNG as an 8-bit one: img2dataset's alpha matting takes 255 for white."""
    if not body.startswith(b"\x89PNG") or body[24] != 16:
        return body
    image = cv2.imdecode(np.frombuffer(body, np.uint8), cv2.IMREAD_UNCHANGED)
    return body if image is None else cv2.imencode(".png", (image // 257).astype(np.uint8))[1].tobytes()


def check_shard(stem: Path, feed: Path) -> None:
    """Compare what was written with what was asked: img2dataset swallows a sample's write error, a full disk included."""
    with pyarrow.ipc.open_file(feed) as reader:
        asked = sum(reader.get_batch(i).num_rows for i in range(reader.num_record_batches))
    status = pq.read_table(stem.with_suffix(".parquet"), columns=["status"]).column("status").to_pylist()
    members = 0
    with tarfile.open(stem.with_suffix(".tar"), "r:") as tar:
        for member in tar:
            members += member.name.endswith(".txt")
    if len(status) != asked or members != status.count("success"):
        if shutil.disk_usage(stem.parent).free < 2**20:
            raise OSError("no space left on the device")
        raise RuntimeError(f"{asked} rows asked, {len(status)} recorded, {status.count('success')} succeeded, {members} stored")


def end_with(parent: int) -> None:
    """End this process when its parent is gone, so that a killed run leaves no downloader behind."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        os._exit(1)

    if os.getppid() != parent:  # it died while this process was still starting
        os._exit(1)
    threading.Thread(target=watch, daemon=True).start()


def main() -> None:
    """Serve shards: `{"feed", "number", "folder", "settings"}` a line in; `ready`, `rows N`, `done N` or `failed N why` a line out."""
    end_with(parent=int(sys.argv[1]))
    warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # judged by our own limit
    answers: TextIO = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # img2dataset prints; its words go to the log that stderr is
    lock = threading.Lock()

    def say(line: str) -> None:
        with lock:
            answers.write(line + "\n")

    say("ready")
    for line in sys.stdin:
        job = json.loads(line)
        try:
            make_shard(Path(job["feed"]), job["number"], Path(job["folder"]), job["settings"], lambda rows: say(f"rows {rows}"))
        except Exception as error:
            say(f"failed {job['number']} {type(error).__name__}: {' '.join(str(error).split())}")
        else:
            say(f"done {job['number']}")


if __name__ == "__main__":
    with contextlib.suppress(BrokenPipeError, KeyboardInterrupt):
        main()
