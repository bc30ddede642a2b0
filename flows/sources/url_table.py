"""The recipe's section [data], and the table of URLs and captions made from its sources.

Four kinds of source yield rows of the schema URLS: npm packages of images, URL lists (parquet, csv,
tsv, jsonl on any fsspec path), folders of images beside `.txt` captions, and drawn scenes. All but
the lists are served on loopback, so that every image is downloaded in the same way. Knows nothing
of downloading or shards.
"""

import hashlib
import json
import random
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import Field

from flows.demo.emoji_labels import Labels
from flows.demo.emoji_packages import read_package
from flows.demo.npm_packages import package_folder, split_spec
from flows.sources.caption_text import phrasings_of, printable, word_of
from flows.sources.drawn_scenes import DRAWING, ScenesSource, draw_all
from flows.sources.image_folder import Problem, captions_beside, image_files
from flows.sources.opt_out import OptOut, content_of_lists, read_opt_out, save
from flows.sources.static_server import url_path
from flows.sources.url_lists import Malformed, UrlsSource, list_files, read_lists
from infra.console.progress import Progress
from infra.errors import CallerError
from infra.row_hash import row_hashes
from infra.schemas import DROPPED, URLS, sample_key
from infra.settings import Section

BLOCK_ROWS = 100_000
SERVED = "http://127.0.0.1:80"
"""Stands in the table for our own server, whose port and secret no one knows yet; a list's row that
says the same loses its `:80`."""
NOT_TEXT = "caption_not_text"


class PackagesSource(Section):
    """Pictures that npm packages ship, captioned with Unicode's names."""

    kind: Literal["packages"]
    packages: tuple[str, ...] = Field(min_length=1)
    """Packages as name@version; `flows/demo/emoji_packages.py` lists the ones that have a
    reader."""
    words: str = "emojibase-data@17.0.0"
    """The package of names and keywords."""
    svg_px: int = Field(96, ge=16, le=2048)
    """Longer side in pixels at which SVGs are rendered."""


class FolderSource(Section):
    """Images in a local folder, each beside a `.txt` of the same name: its first line is the
    caption, further lines are phrasings.
    """

    kind: Literal["folder"]
    path: str = Field(min_length=1)
    """The folder; pictures in folders below it count."""
    licence: str = ""
    """Licence of all its pictures."""
    style: str = ""
    """Drawing style of all its pictures, for `[curate] held_out_styles`."""


def content_of(source: PackagesSource | UrlsSource | FolderSource | ScenesSource) -> str:
    """Return what tells one state of a source's files from another, without reading them; "" for
    packages, whose version does.
    """
    if isinstance(source, PackagesSource):
        return ""
    if isinstance(source, ScenesSource):
        return f"drawing {DRAWING}"
    digest = hashlib.sha256()
    try:
        if isinstance(source, UrlsSource):
            marks = [f"{file.path} {file.fs.ukey(file.path)}" for file in list_files(source)]
        else:
            root = Path(source.path).expanduser()
            stats = ((file, file.stat()) for file in sorted(root.rglob("*")) if file.is_file())
            marks = [
                f"{file.relative_to(root)} {stat.st_size} {stat.st_mtime_ns}"
                for file, stat in stats
            ]
    except (OSError, ValueError, ImportError, CallerError):
        return "unreadable"  # reading it says why
    for mark in marks:
        digest.update(mark.encode("utf-8", "surrogateescape") + b"\n")
    return digest.hexdigest()[:16]


Source = Annotated[
    PackagesSource | UrlsSource | FolderSource | ScenesSource, Field(discriminator="kind")
]


class DataConfig(Section):
    """Section [data]: which pairs, and how they are downloaded."""

    outside_key = frozenset(
        (
            "cache",
            "processes",
            "threads",
            "timeout_s",
            "retries",
            "retry_passes",
            "max_passing",
            "min_success",
            "per_host",
            "proxy",
        )
    )

    sources: tuple[Source, ...] = Field(min_length=1)
    """The sources, read in this order; a URL that two of them name is taken once, from the
    first."""
    cache: str = "~/.cache/unclip"
    """Local folder for fetched packages and rendered pictures; safe to delete."""
    image_size_px: int = Field(64, ge=8, le=2048)
    """Side of the stored images in pixels."""
    resize: Literal["border", "center_crop", "keep_ratio", "keep_ratio_largest"] = "border"
    """img2dataset's resize mode; `border` keeps the whole picture and pads it to a square with
    white."""
    encode: Literal["png", "jpg", "webp"] = "png"
    """Format of the stored images; png is lossless and, at 64 px, no larger."""
    images_per_shard: int = Field(1000, ge=1, le=100_000)
    """Rows of the URL table per shard."""
    processes: int = Field(2, ge=1, le=256)
    """Shards that are downloaded at the same time, as far as Ray has a CPU core for each; a
    cluster's `ingest_workers` goes before it."""
    threads: int = Field(16, ge=1, le=1024)
    """Simultaneous requests of each process."""
    timeout_s: float = Field(10, gt=0, le=600)
    """Limit for one request from connecting to the last byte, in seconds."""
    retries: int = Field(2, ge=0, le=10)
    """Tries after the first for what may pass (time-outs, 429, 5xx, a broken connection), with
    growing pauses; and for npm."""
    retry_passes: int = Field(1, ge=0, le=10)
    """Further passes over the rows that failed for what may pass, once all others are done."""
    max_passing: float = Field(0.5, ge=0, le=1)
    """Largest share of a shard's rows that may fail for what may pass; above it the shard is made
    again up to three times, with pauses."""
    max_image_bytes: int = Field(20 * 2**20, ge=1)
    """A response above this many bytes is dropped as too_large, unread."""
    max_image_pixels: int = Field(50_000_000, ge=1)
    """An image that declares more pixels is dropped as too_large, undecoded: a decompression
    bomb."""
    min_success: float = Field(0.2, ge=0, le=1)
    """Smallest share of the URLs that must become images; below it the stage fails."""
    allow_private: bool = False
    """Whether URLs may lead to private, loopback and link-local addresses; the sources served on
    loopback need it not."""
    proxy: str = Field("", pattern=r"^(http://[^/@\s]+:\d+)?$")
    """`http://host:port` of a proxy that all downloads go through; the environment's proxy is never
    used. A proxy resolves names itself and must refuse private addresses itself: here only those
    that stand in a URL, and `localhost`, are refused."""
    robots: bool = True
    """Honour each host's robots.txt (RFC 9309, as `unclip`); what it forbids is counted as
    `robots`, as is what X-Robots-Tag forbids."""
    per_host: int = Field(16, ge=0, le=1024)
    """Simultaneous requests to one host, divided among the shards that are downloaded at the same
    time (at least one each); 0 sets no
    limit. Loopback sources have none."""
    opt_out: tuple[str, ...] = ()
    """Lists of hosts and URLs that do not want to be used, one a line, on any fsspec path; they are
    never asked (`opted_out`)."""
    seed: int = 0
    """Order of the rows: shuffled in blocks of 100,000, so that neighbours do not all ask one
    host."""

    def keyed(self) -> dict[str, Any]:
        """Return the fields that the stage's key depends on, and what state the sources' files are
        in: a longer list is another input.
        """
        content = [content_of(source) for source in self.sources] + (
            [content_of_lists(self.opt_out)] if self.opt_out else []
        )
        return super().keyed() | {"content": content}


@dataclass
class Mounts:
    """The local folders behind a table's loopback URLs, by mount name; a JSON file keeps them for a
    resumed run.
    """

    folders: dict[str, Path] = field(default_factory=dict)

    def save(self, path: Path) -> None:
        """Write the JSON file."""
        path.write_text(json.dumps({name: str(folder) for name, folder in self.folders.items()}))

    @classmethod
    def load(cls, path: Path) -> "Mounts":
        """Return what `save` wrote."""
        return cls({name: Path(folder) for name, folder in json.loads(path.read_text()).items()})


Row = dict[str, Any]


def row(url: str, origin: str, captions: list[str], **columns: str) -> Row:
    """Make a row of the schema URLS; a missing concept is the row's own key. Lone surrogates, which
    no file can hold, become `?`.
    """
    texts = {
        name: encodable(text)
        for name, text in {
            "licence": "",
            "style": "",
            "category": "",
            "subcategory": "",
            **columns,
        }.items()
    }
    phrasings = [
        text for text in dict.fromkeys(encodable(caption).strip() for caption in captions) if text
    ]
    caption = phrasings[0] if phrasings else ""
    url, origin = encodable(url), encodable(origin)
    key = sample_key(origin, caption)
    concept = texts.pop("concept", "") or key
    return {
        "key": key,
        "url": url,
        "origin": origin,
        "caption": caption,
        "captions": phrasings,
        "concept": concept,
        **texts,
    }


def encodable(text: str) -> str:
    """Return a text with `?` for the halves of characters that no file can hold."""
    return text if text.isascii() else text.encode("utf-8", "replace").decode()


def package_rows(
    source: PackagesSource, config: DataConfig, cache: Path, base: str, mounts: Mounts
) -> Iterator[Row]:
    """Yield the pictures of all packages of a source; mounts their folders."""
    labels = Labels(package_folder(source.words, cache / "packages", config.retries))
    for spec in source.packages:
        name, _ = split_spec(spec)
        folder = package_folder(spec, cache / "packages", config.retries)
        rendered = cache / "rendered" / f"{folder.name}@{source.svg_px}px"
        pictures = read_package(spec, folder, labels, rendered, source.svg_px)
        mounts.folders |= {name: folder, f"rendered/{name}": rendered}
        for picture in pictures:
            mount, root = (
                (name, folder)
                if picture.file.is_relative_to(folder)
                else (f"rendered/{name}", rendered)
            )
            yield row(
                base + url_path(mount, picture.file.relative_to(root).as_posix()),
                f"npm:{spec}/{picture.origin}",
                list(picture.captions),
                licence=picture.licence,
                concept=picture.concept,
                style=picture.style,
                category=picture.category,
                subcategory=picture.subcategory,
            )


def folder_rows(source: FolderSource, base: str, mounts: Mounts) -> Iterator[Row]:
    """Yield the images of a folder, sub-folders included; an image without its `.txt` has an empty
    caption.
    """
    root = Path(source.path).expanduser()
    if not root.is_dir():
        raise CallerError(
            f"[data] folder {source.path!r} is not there: give a folder of images beside .txt "
            "captions"
        )
    mount = root.resolve().name
    while mount in mounts.folders:
        mount += "-again"
    mounts.folders[mount] = root
    for file, problem in image_files(root):
        captions, no_text = captions_beside(file)
        relative = file.relative_to(root).as_posix()
        item = row(
            base + url_path(mount, relative),
            f"folder:{printable(mount)}/{printable(relative)}",
            captions,
            licence=source.licence,
            style=source.style,
        )
        problem = problem or no_text
        yield item | ({"problem": problem} if problem else {})


def scene_rows(
    source: ScenesSource, config: DataConfig, cache: Path, base: str, mounts: Mounts
) -> Iterator[Row]:
    """Yield the drawn pictures of a source; its concept, by which splits go, is what the scene
    shows.
    """
    for drawn in draw_all(source, config.image_size_px, cache):
        mount = f"scenes/{drawn.file.parent.name}"
        mounts.folders[mount] = drawn.file.parent
        yield row(
            base + url_path(mount, drawn.file.name),
            f"{mount}/{drawn.number}",
            list(drawn.captions),
            licence="CC0-1.0",
            style="scenes",
            concept=drawn.concept,
            category=drawn.row,
        )


def listed_rows(source: UrlsSource, base: str) -> Iterator[Row]:
    """Yield the rows of a URL list; one that names `base`, by which the download knows what we
    serve, is written so that it does not.
    """
    for values in read_lists(source):
        if isinstance(values, Malformed):
            yield row("", values.origin, []) | {"problem": ("malformed_row", values.detail)}
            continue
        url = next(iter(phrasings_of(values.pop("url"))[0]), "").strip()
        captions, refused = phrasings_of(values.pop("caption"), values.pop("captions", None))
        words = {name: word for name, value in values.items() if (word := word_of(value))}
        requested = (
            url.replace(f"{base}/", f"{base.removesuffix(':80')}/", 1)
            if url.startswith(f"{base}/")
            else url
        )
        item = row(requested, url, captions, **{"licence": source.licence, **words})
        has_none = refused and not item["caption"]
        yield item | ({"problem": (NOT_TEXT, refused)} if has_none else {})


def write_url_table(config: DataConfig, out: Path, cache: Path, base: str = SERVED) -> int:
    """Write OUT/urls.parquet (schema URLS), dropped.parquet (DROPPED), mounts.json, opt_out.json;
    return the number of rows in the first.

    `base` is the prefix of URLs that are served on loopback. Rows without a URL or a caption, and
    rows whose URL stood before, are dropped and counted. Memory: one block of rows, and 8 bytes for
    each URL.
    """
    mounts = Mounts()
    opt_out = read_opt_out(config.opt_out)
    seen = np.empty(0, np.uint64)
    row_count = 0
    with (
        pq.ParquetWriter(out / "urls.parquet", URLS) as urls,
        pq.ParquetWriter(out / "dropped.parquet", DROPPED) as dropped,
        Progress("sources", None, "rows") as progress,
    ):
        for number, block in enumerate(
            blocks(with_progress(all_rows(config, cache, base, mounts), progress))
        ):
            is_new, seen = new_urls([item["url"] for item in block], seen)
            good: list[Row] = []
            bad: list[Row] = []
            for item, new in zip(block, is_new, strict=True):
                reason, detail = refusal(item, new, opt_out)
                if reason:
                    bad.append(
                        {
                            "key": item["key"],
                            "origin": item["origin"],
                            "reason": reason,
                            "detail": detail,
                        }
                    )
                else:
                    good.append(item)
            random.Random(f"{config.seed} {number}").shuffle(good)
            urls.write_table(pa.Table.from_pylist(good, URLS))
            dropped.write_table(pa.Table.from_pylist(bad, DROPPED))
            row_count += len(good)
    mounts.save(out / "mounts.json")
    save(opt_out, out / "opt_out.json")
    return row_count


def refusal(item: Row, is_new: bool, opt_out: OptOut) -> Problem:
    """Return why a row is dropped before it is downloaded, ("", "") if it is not, with details."""
    problem: Problem | None = item.get("problem")
    if problem:
        return problem
    if not item["url"]:
        return "empty_url", ""
    if not item["caption"]:
        return "empty_caption", item["url"]
    if not is_new:
        return "duplicate_url", item["url"]
    if opt_out.covers(item["origin"]) or opt_out.covers(item["url"]):
        return "opted_out", item["url"]
    return "", ""


def new_urls(urls: list[str], seen: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return which URLs of a block stand for the first time, and the sorted 64-bit hashes seen so
    far, this block's included.
    """
    hashes = row_hashes(url.encode() for url in urls)
    first, position = np.unique(hashes, return_index=True)
    positions = np.searchsorted(seen, first)
    is_seen = np.zeros(len(first), bool)
    is_seen[positions < len(seen)] = (
        seen[positions[positions < len(seen)]] == first[positions < len(seen)]
    )
    is_new = np.zeros(len(urls), bool)
    is_new[position[~is_seen]] = True
    return is_new, np.insert(
        seen, positions[~is_seen], first[~is_seen]
    )  # one copy; sorting all again would grow with every block


def all_rows(config: DataConfig, cache: Path, base: str, mounts: Mounts) -> Iterator[Row]:
    """Yield the rows of all sources in their order."""
    for source in config.sources:
        if isinstance(source, PackagesSource):
            yield from package_rows(source, config, cache, base, mounts)
        elif isinstance(source, FolderSource):
            yield from folder_rows(source, base, mounts)
        elif isinstance(source, ScenesSource):
            yield from scene_rows(source, config, cache, base, mounts)
        else:
            yield from listed_rows(source, base)


def with_progress(rows: Iterator[Row], progress: Progress) -> Iterator[Row]:
    """Pass rows on and show how many there are."""
    for number, item in enumerate(rows, 1):
        progress.update(number)
        yield item


def blocks(rows: Iterator[Row]) -> Iterator[list[Row]]:
    """Yield the rows BLOCK_ROWS at a time."""
    block: list[Row] = []
    for item in rows:
        block.append(item)
        if len(block) == BLOCK_ROWS:
            yield block
            block = []
    if block:
        yield block
