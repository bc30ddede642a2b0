"""Make one shard of a URL table into a WebDataset tar with img2dataset.

`make_shard` uses img2dataset's Downloader, Resizer and tar and parquet writers, and
`flows.ingest.http_fetch` instead of its unbounded download function. It writes into the caller's
folder. Images are decoded one at a time, so that a process needs memory for only one.
"""

import contextlib
import errno
import faulthandler
import io
import shutil
import tarfile
import threading
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import pyarrow.ipc
import pyarrow.parquet as pq
from PIL import Image

import flows.ingest.img2dataset_parts as img2dataset_parts
from flows.ingest.http_fetch import FetchError, Rules, fetch_image, hosts
from flows.ingest.img2dataset_parts import Resizer, WebDatasetSampleWriter
from flows.ingest.plain_image import to_plain
from flows.ingest.row_outcomes import count_outcomes, temporary_share
from flows.ingest.shard_order import sort_shard

EXTRA_COLUMNS = [
    "sample",
    "origin",
    "captions",
    "licence",
    "concept",
    "style",
    "category",
    "subcategory",
]
COLUMNS = [*EXTRA_COLUMNS, "caption", "url"]
DIGITS = 5
STDERR = 2
"""The file number of the stream that a process writes errors to."""
BEAT_S = 0.5


class NetworkAwayError(Exception):
    """Too many rows of a shard failed for temporary reasons: the shard is not recorded."""


class Watchdog:
    """Counts finished rows, and ends this process if no row or request finishes for `limit_s`.

    The timer runs in C, so it also ends a process that hangs outside of Python; 0 sets no limit.
    With `on_row`, rows are processed one at a time, and `on_row` gets each row's number first.
    """

    def __init__(self, limit_s: float = 0, on_row: Callable[[int], None] | None = None) -> None:
        self.limit_s, self.on_row = limit_s, on_row
        self.rows = self.moves = 0
        self.guard, self.row_lock = threading.Lock(), threading.Lock()
        self.stopped = threading.Event()
        self.thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> Self:
        self._postpone()
        self.thread.start()
        return self

    def _postpone(self) -> None:
        if self.limit_s:
            faulthandler.dump_traceback_later(self.limit_s, exit=True, file=STDERR)

    def _watch(self) -> None:
        last = (0, hosts.finished)
        while not self.stopped.wait(BEAT_S):
            now = (self.rows, self.moves + hosts.finished)
            if now != last:
                last = now
                self._postpone()

    @contextlib.contextmanager
    def on(self, row: int, is_last: bool) -> Iterator[None]:
        """Mark a row as in progress while the block runs; `is_last`: it is finished afterwards."""
        with self.row_lock if self.on_row else contextlib.nullcontext():
            if self.on_row:
                self.on_row(row)
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
        self.stopped.set()
        self.thread.join()
        if self.limit_s:
            faulthandler.cancel_dump_traceback_later()


class Body(io.BytesIO):
    """An image's bytes and the number of its row."""

    row = -1


def shard_name(number: int) -> str:
    return f"{number:0{DIGITS}d}"


_turn = 0


def start_turn(turn: int) -> None:
    """Forget which hosts failed if `turn` has changed: a new pass, or the end of a pause."""
    global _turn
    if turn != _turn:
        _turn = turn
        hosts.forget_failures()


def make_shard(
    feed: Path, number: int, folder: Path, settings: Mapping[str, Any], watchdog: Watchdog
) -> Counter[str]:
    """Download the rows of `feed` (an Arrow file with COLUMNS) into FOLDER/<number>.parquet,
    _stats.json and .tar.

    Returns the number of rows by outcome: "success" or the reason of the failure. `settings`:
    rules (of flows.ingest.http_fetch), recorded and actual (bases of loopback URLs), opt_out,
    threads, image_size_px, resize, encode, images_per_shard, max_passing, crashed (rows to skip).
    Raises OSError if the disk is full, RuntimeError if img2dataset lost rows, NetworkAwayError if
    more than the share `max_passing` of the rows failed for temporary reasons.
    """
    name = shard_name(number)
    feed_copy = folder / f"{name}.copy.arrow"
    shutil.copyfile(feed, feed_copy)  # img2dataset deletes its input
    with watchdog, warnings.catch_warnings():
        warnings.simplefilter(
            "ignore", Image.DecompressionBombWarning
        )  # http_fetch has its own limit
        fetch = make_fetch_function(settings, watchdog)
        img2dataset_parts.downloader.download_image_with_retry = fetch
        make_downloader(folder, settings, watchdog).download_shard((number, str(feed_copy)))
    outcomes = check_shard(folder / name, feed)
    share = temporary_share(outcomes)
    if share > settings["max_passing"]:
        raise NetworkAwayError(f"{share:.0%} of the rows failed for temporary reasons")
    sort_shard(folder / name)
    return outcomes


def make_downloader(folder: Path, settings: Mapping[str, Any], watchdog: Watchdog) -> Any:
    """Return an img2dataset Downloader that writes into `folder`."""
    resizer = Resizer(
        image_size=settings["image_size_px"],
        resize_mode=settings["resize"],
        resize_only_if_bigger=False,
        encode_format=settings["encode"],
        # For png this is the compression level; 9 is ten times slower and saves little.
        encode_quality=1 if settings["encode"] == "png" else 95,
    )

    def resize(body: Body, _: object = None) -> Any:
        with watchdog.on(body.row, is_last=True):
            try:
                return resizer(to_plain(body))
            except Exception as error:  # decoders raise many types on hostile bytes
                return None, None, None, None, None, str(error) or type(error).__name__

    return img2dataset_parts.downloader.Downloader(
        sample_writer_class=WebDatasetSampleWriter,
        resizer=resize,
        thread_count=1 if watchdog.on_row else settings["threads"],
        save_caption=True,
        extract_exif=False,
        output_folder=str(folder),
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


def make_fetch_function(
    settings: Mapping[str, Any], watchdog: Watchdog
) -> Callable[..., tuple[int, io.BytesIO | None, str | None]]:
    """Return a replacement for img2dataset's `download_image_with_retry` that obeys our rules."""
    rules = Rules(**settings["rules"], opt_out=settings["opt_out"])
    recorded, actual = settings["recorded"], settings["actual"]
    crashed = frozenset(settings["crashed"])

    def download_image_with_retry(
        row: tuple[int, str], **_: object
    ) -> tuple[int, io.BytesIO | None, str | None]:
        key, url = row
        is_whole = False
        try:
            if key in crashed:
                raise FetchError("worker_crash", "every process that downloaded it died or hung")
            with watchdog.on(key, is_last=False):
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
                with watchdog.guard:
                    watchdog.rows += 1

    return download_image_with_retry


def check_shard(stem: Path, feed: Path) -> Counter[str]:
    """Check that a shard has all rows of its feed; return the number of rows by outcome.

    img2dataset ignores write errors of a sample, even those of a full disk. Raises OSError if the
    disk is full, RuntimeError if rows are missing for another reason.
    """
    with pyarrow.ipc.open_file(feed) as reader:
        requested = sum(reader.get_batch(i).num_rows for i in range(reader.num_record_batches))
    rows = pq.read_table(stem.with_suffix(".parquet"), columns=["status", "error_message"])
    outcomes = count_outcomes(rows)
    members = 0
    with tarfile.open(stem.with_suffix(".tar"), "r:") as tar:
        for member in tar:
            members += member.name.endswith(".txt")
    if rows.num_rows != requested or members != outcomes["success"]:
        if shutil.disk_usage(stem.parent).free < 2**20:
            raise OSError(errno.ENOSPC, "no space left on the device", str(stem.parent))
        raise RuntimeError(
            f"{requested} rows requested, {rows.num_rows} recorded, {outcomes['success']} "
            f"succeeded, {members} stored"
        )
    return outcomes
