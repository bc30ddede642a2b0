"""Make one shard of a URL table into a WebDataset tar with img2dataset.

`make_shard` uses img2dataset's parts (Downloader, Resizer, tar and parquet writers) with
`flows.ingest.http_fetch` in place of its unbounded download function. It writes into a folder of
its caller's. Images are decoded one at a time, so that a process needs the memory of one.
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
from flows.ingest.plain_image import plain
from flows.ingest.row_outcomes import count_outcomes, passing_share

CARRIED = ["sample", "origin", "captions", "licence", "concept", "style", "category", "subcategory"]
COLUMNS = [*CARRIED, "caption", "url"]
DIGITS = 5
STDERR = 2
"""The file number of the stream that a process writes errors to."""
BEAT_S = 0.5


class NetworkAwayError(Exception):
    """More of a shard failed for what may pass than is allowed: it is not done."""


class Pulse:
    """Counts the rows that are finished, and ends this process when nothing moves for `limit_s`.

    What moves is a row or a single request. The end comes from a timer in C, so that it also ends
    a process that hangs outside of Python; 0 sets no limit. With `on_row`, one row is worked on at
    a time, and its number is passed to `on_row` before.
    """

    def __init__(self, limit_s: float = 0, on_row: Callable[[int], None] | None = None) -> None:
        self.limit_s, self.on_row = limit_s, on_row
        self.rows = self.moves = 0
        self.guard, self.one, self.over = threading.Lock(), threading.Lock(), threading.Event()
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
        while not self.over.wait(BEAT_S):
            now = (self.rows, self.moves + hosts.finished)
            if now != last:
                last = now
                self._postpone()

    @contextlib.contextmanager
    def on(self, row: int, is_last: bool) -> Iterator[None]:
        """Work on a row while the block runs."""
        with self.one if self.on_row else contextlib.nullcontext():
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
        self.over.set()
        self.thread.join()
        if self.limit_s:
            faulthandler.cancel_dump_traceback_later()


class Body(io.BytesIO):
    """An image's bytes and the number of its row."""

    row = -1


def shard_name(number: int) -> str:
    return f"{number:0{DIGITS}d}"


_turn = 0


def new_turn(turn: int) -> None:
    """Forget which hosts failed, if the turn is another than before: a pass, or a wait, is over."""
    global _turn
    if turn != _turn:
        _turn = turn
        hosts.forgive()


def make_shard(
    feed: Path, number: int, folder: Path, settings: Mapping[str, Any], pulse: Pulse
) -> Counter[str]:
    """Download the rows of `feed` (an Arrow file with COLUMNS) into FOLDER/<number>.parquet,
    _stats.json and .tar.

    Returns how many rows had which outcome: "success" or the reason of their failure. `settings`:
    rules (of flows.ingest.http_fetch), recorded and actual (bases of loopback URLs), opt_out,
    threads, image_size_px, resize, encode, images_per_shard, max_passing and crashed (rows that are
    not to be touched). Raises OSError when the disk is full, RuntimeError when img2dataset lost
    rows, NetworkAwayError when more than `max_passing` failed for what may pass.
    """
    name = shard_name(number)
    feed_copy = folder / f"{name}.copy.arrow"
    shutil.copyfile(feed, feed_copy)  # img2dataset deletes its input
    with pulse, warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # our own limit decides
        img2dataset_parts.downloader.download_image_with_retry = fetcher(settings, pulse)
        maker(folder, settings, pulse).download_shard((number, str(feed_copy)))
    outcomes = check_shard(folder / name, feed)
    passing = passing_share(outcomes)
    if passing > settings["max_passing"]:
        raise NetworkAwayError(f"{passing:.0%} of the rows failed for what may pass")
    return outcomes


def maker(folder: Path, settings: Mapping[str, Any], pulse: Pulse) -> Any:
    """Return img2dataset's Downloader, writing into `folder`."""
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

    return img2dataset_parts.downloader.Downloader(
        sample_writer_class=WebDatasetSampleWriter,
        resizer=resize,
        thread_count=1 if pulse.on_row else settings["threads"],
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


def fetcher(
    settings: Mapping[str, Any], pulse: Pulse
) -> Callable[..., tuple[int, io.BytesIO | None, str | None]]:
    """Return a function of img2dataset's `download_image_with_retry` shape that fetches by our
    rules.
    """
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
                raise FetchError("worker_crash", "each process that downloaded it died or hung")
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


def check_shard(stem: Path, feed: Path) -> Counter[str]:
    """Compare what was written with what was asked: img2dataset swallows a sample's write error, a
    full disk included.

    Returns how many rows had which outcome. Raises OSError for a full disk, RuntimeError.
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
            f"{requested} rows asked, {rows.num_rows} recorded, {outcomes['success']} "
            f"succeeded, {members} stored"
        )
    return outcomes
