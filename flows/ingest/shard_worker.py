"""Make one shard of a URL table into a WebDataset tar with img2dataset, in a process of its own.

`make_shard` uses img2dataset's parts (Downloader, Resizer, tar and parquet writers) with
`flows.ingest.http_fetch` in place of its unbounded download function. It writes to a temporary
folder and renames the tar last: a tar under its final name is whole. Run as `python -m
flows.ingest.shard_worker PARENT [FOLDER]`, it reads one JSON line per shard from stdin and reports
on stdout; it ends when the process PARENT ends, and removes FOLDER then. Images are decoded one at
a time, so that a process needs the memory of one.
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
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace, TracebackType
from typing import Any, Self, TextIO, cast

import pyarrow.ipc
import pyarrow.parquet as pq
from PIL import Image

if __name__ == "__main__":
    # Nothing here uses img2dataset's command (with Ray and pandas), wandb, or webdataset's wish for
    # torch, and of albumentations four transforms: five sixths of a process's start.
    import flows.ingest.resize_transforms as resize_transforms

    replaced = {
        "img2dataset.main": SimpleNamespace(main=None, download=None),
        "wandb": SimpleNamespace(),
        "torch": None,
        "albumentations": resize_transforms,
    }
    sys.modules |= cast(dict[str, ModuleType], replaced)

from img2dataset import downloader as img2dataset_downloader
from img2dataset.downloader import Downloader
from img2dataset.resizer import Resizer
from img2dataset.writer import WebDatasetSampleWriter

import flows.sources.opt_out as opt_out
from flows.ingest.http_fetch import PASSING, FetchError, Rules, fetch_image, hosts
from flows.ingest.plain_image import plain
from flows.ingest.row_outcomes import split_problem
from infra.storage.atomic_files import put

CARRIED = ["sample", "origin", "captions", "licence", "concept", "style", "category", "subcategory"]
COLUMNS = [*CARRIED, "caption", "url"]
SUFFIXES = (".parquet", "_stats.json", ".tar")
"""A shard's files in the order in which they get their names."""
DIGITS = 5
BEAT_S = 0.5


class NetworkAwayError(Exception):
    """More of a shard failed for what may pass than is allowed: it is not done."""


class Pulse:
    """Tells the parent how many rows are finished, in a thread, and only while something moves:
    rows, or single requests.

    `say` gets `rows N`; where `is_single`, one row is worked on at a time and named before as `row
    K`.
    """

    def __init__(self, say: Callable[[str], None], is_single: bool) -> None:
        self.say, self.is_single = say, is_single
        self.rows = self.moves = 0
        self.last = (0, hosts.finished)
        self.guard, self.one, self.over = threading.Lock(), threading.Lock(), threading.Event()
        self.thread = threading.Thread(target=self.watch, daemon=True)

    def beat(self) -> None:
        """Tell what has moved since the last call."""
        rows, moves = self.rows, self.moves + hosts.finished
        if (rows, moves) != self.last:
            self.say(f"rows {rows - self.last[0]}")
            self.last = (rows, moves)

    def __enter__(self) -> Self:
        self.thread.start()
        return self

    def watch(self) -> None:
        while not self.over.wait(BEAT_S):
            self.beat()

    @contextlib.contextmanager
    def on(self, row: int, is_last: bool) -> Iterator[None]:
        """Work on a row while the block runs."""
        with self.one if self.is_single else contextlib.nullcontext():
            if self.is_single:
                self.say(f"row {row}")
            try:
                yield
            finally:
                with self.guard:
                    self.moves += 1
                    self.rows += is_last

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.over.set()
        self.thread.join()


class Body(io.BytesIO):
    """An image's bytes and the number of its row."""

    row = -1


def shard_name(number: int) -> str:
    return f"{number:0{DIGITS}d}"


def make_shard(
    feed: Path, number: int, folder: Path, settings: dict[str, Any], say: Callable[[str], None]
) -> float:
    """Download the rows of `feed` (an Arrow file with COLUMNS) into FOLDER/<number>.parquet,
    _stats.json and .tar, in this order.

    Returns the share of rows that failed for what may pass. `settings`: rules (of
    flows.ingest.http_fetch), recorded and actual (bases of loopback URLs), opt_out (a file),
    threads, image_size_px, resize, encode, images_per_shard, max_passing, is_single and crashed
    (rows that are not to be touched). `say` is told what moves (`Pulse`). Raises OSError when the
    disk is full, RuntimeError when img2dataset lost rows, NetworkAwayError when more than
    `max_passing` failed for what may pass.
    """
    name = shard_name(number)
    staging = folder / f".{name}.{os.getpid()}"
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir(parents=True)
    try:
        with Pulse(say, settings["is_single"]) as pulse:
            try:
                (staging / "feed.arrow").hardlink_to(feed)  # img2dataset deletes its input
            except OSError:
                shutil.copyfile(feed, staging / "feed.arrow")
            img2dataset_downloader.download_image_with_retry = fetcher(settings, pulse)
            maker(staging, settings, pulse).download_shard((number, str(staging / "feed.arrow")))
        passing = check_shard(staging / name, feed)
        if passing > settings["max_passing"]:
            raise NetworkAwayError(f"{passing:.0%} of the rows failed for what may pass")
        put(staging, [f"{name}{suffix}" for suffix in SUFFIXES], folder)
        return passing
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def maker(staging: Path, settings: dict[str, Any], pulse: Pulse) -> Downloader:
    """Return img2dataset's shard maker, writing into `aside`."""
    resizer = Resizer(
        image_size=settings["image_size_px"],
        resize_mode=settings["resize"],
        resize_only_if_bigger=False,
        encode_format=settings["encode"],
        encode_quality=1
        if settings["encode"] == "png"
        else 95,  # for png: compression; 9 is ten times slower and saves little
    )

    def resize(body: Body, _: object = None) -> Any:
        with pulse.on(body.row, is_last=True):
            try:
                return resizer(plain(body))
            except Exception as error:  # decoders raise many types on hostile bytes
                return None, None, None, None, None, str(error) or type(error).__name__

    return Downloader(
        sample_writer_class=WebDatasetSampleWriter,
        resizer=resize,
        thread_count=1 if settings["is_single"] else settings["threads"],
        save_caption=True,
        extract_exif=False,
        output_folder=str(staging),
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


def fetcher(
    settings: dict[str, Any], pulse: Pulse
) -> Callable[..., tuple[int, io.BytesIO | None, str | None]]:
    """Return a function of img2dataset's `download_image_with_retry` shape that fetches by our
    rules.
    """
    rules = Rules(**settings["rules"], opt_out=opt_out.load(Path(settings["opt_out"])))
    recorded, actual = settings["recorded"], settings["actual"]
    crashed = frozenset(settings["crashed"])

    def download_image_with_retry(
        row: tuple[int, str], **_: object
    ) -> tuple[int, io.BytesIO | None, str | None]:
        key, url = row
        is_whole = False
        try:
            if key in crashed:
                raise FetchError(
                    "worker_crash", "each download process that took it died or fell silent"
                )
            with pulse.on(key, is_last=False):
                body = Body(
                    fetch_image(
                        actual + url.removeprefix(recorded)
                        if url.startswith(recorded + "/")
                        else url,
                        rules,
                    )
                )
            body.row, is_whole = key, True
            return key, body, None
        except FetchError as error:
            return key, None, str(error)
        finally:
            if not is_whole:
                with pulse.guard:
                    pulse.rows += 1

    return download_image_with_retry


def check_shard(stem: Path, feed: Path) -> float:
    """Compare what was written with what was asked: img2dataset swallows a sample's write error, a
    full disk included.

    Returns the share of rows that failed for what may pass.
    """
    with pyarrow.ipc.open_file(feed) as reader:
        requested = sum(reader.get_batch(i).num_rows for i in range(reader.num_record_batches))
    outcomes = pq.read_table(stem.with_suffix(".parquet"), columns=["status", "error_message"])
    status, words = (
        outcomes.column("status").to_pylist(),
        outcomes.column("error_message").to_pylist(),
    )
    members = 0
    with tarfile.open(stem.with_suffix(".tar"), "r:") as tar:
        for member in tar:
            members += member.name.endswith(".txt")
    if len(status) != requested or members != status.count("success"):
        if shutil.disk_usage(stem.parent).free < 2**20:
            raise OSError("no space left on the device")
        raise RuntimeError(
            f"{requested} rows asked, {len(status)} recorded, {status.count('success')} "
            f"succeeded, {members} stored"
        )
    problems = (
        split_problem(*problem)[0]
        for problem in zip(status, words, strict=True)
        if problem[0] != "success"
    )
    return sum(problem in PASSING for problem in problems) / requested


def end_with(parent: int, folder: str | None) -> None:
    """End this process when its parent is gone, and its folder with it, so that a killed run leaves
    no downloader behind.
    """

    def end() -> None:
        if folder:
            shutil.rmtree(folder, ignore_errors=True)
        os._exit(1)

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        end()

    if os.getppid() != parent:  # it died while this process was still starting
        end()
    threading.Thread(target=watch, daemon=True).start()


def main() -> None:
    """Serve shards: `{"feed", "number", "folder", "settings"}` a line in; a line out is one of

    `ready`, `rows N`, `row K`, `done N share`, `outage N share` or `failed N why`.
    """
    end_with(int(sys.argv[1]), sys.argv[2] if len(sys.argv) > 2 else None)
    warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # judged by our own limit
    answers: TextIO = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # img2dataset prints; its words go to the log that stderr is
    lock = threading.Lock()

    def say(line: str) -> None:
        with lock:
            answers.write(line + "\n")

    say("ready")
    turn = 0
    for line in sys.stdin:
        job = json.loads(line)
        if job["settings"]["turn"] != turn:  # another pass, or one that has waited for the network
            turn = job["settings"]["turn"]
            hosts.forgive()
        try:
            passing = make_shard(
                Path(job["feed"]), job["number"], Path(job["folder"]), job["settings"], say
            )
        except NetworkAwayError as error:
            say(f"outage {job['number']} {error}")
        except Exception as error:
            say(f"failed {job['number']} {type(error).__name__}: {' '.join(str(error).split())}")
        else:
            say(f"done {job['number']} {passing:.3f}")


if __name__ == "__main__":
    try:
        with contextlib.suppress(BrokenPipeError, KeyboardInterrupt):
            main()
    finally:  # its parent's end is mostly heard first as the end of what it says
        if len(sys.argv) > 2:
            shutil.rmtree(sys.argv[2], ignore_errors=True)
