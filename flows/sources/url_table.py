"""The recipe's section [data], and the table of URLs and captions made from its sources.

Four kinds of source yield rows of the schema URLS: npm packages of images, URL lists (parquet, csv,
tsv, jsonl on any fsspec path), folders of images beside `.txt` captions, and drawn scenes. All
except the lists are served on loopback, so that every image is downloaded in the same way.
"""

import hashlib
import json
import random
from collections.abc import Iterator, Set
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
from flows.sources.opt_out import OptOut, hash_of_lists, read_opt_out, save
from flows.sources.static_server import url_path
from flows.sources.url_lists import Refused, UrlsSource, list_files, read_lists
from infra.canonical_url import canonical_origin
from infra.console.progress import Progress
from infra.errors import CallerError
from infra.row_hash import row_hashes
from infra.schemas import DROPPED, URLS, former_sample_key, sample_key
from infra.settings import Section

BLOCK_ROWS = 100_000
BLOCK_BYTES = 256 << 20
"""Maximum bytes of texts of a block; usual lists reach BLOCK_ROWS first."""
SERVED = "http://127.0.0.1:80"
"""Placeholder in the table for the base URL of our own server, whose port and secret are not known
yet. No URL of a list begins so, because the canonical form of a URL has no `:80`."""
NOT_TEXT = "caption_not_text"


class PackagesSource(Section):
    """Pictures of npm packages, with captions from Unicode's names."""

    kind: Literal["packages"]
    packages: tuple[str, ...] = Field(min_length=1)
    """Packages as name@version; `flows/demo/emoji_packages.py` lists the supported ones."""
    words: str = "emojibase-data@17.0.0"
    """Package with the names and keywords."""
    svg_px: int = Field(96, ge=16, le=2048)
    """Longer side in pixels at which SVGs are rendered."""


class FolderSource(Section):
    """Images in a local folder, each beside a `.txt` file of the same name.

    The first line of that file is the caption, further lines are other phrasings.
    """

    kind: Literal["folder"]
    path: str = Field(min_length=1)
    """The folder; pictures in its subfolders are included."""
    licence: str = ""
    """Licence of all pictures in the folder."""
    style: str = ""
    """Drawing style of all pictures in the folder, for `[curate] held_out_styles`."""


def content_of(source: PackagesSource | UrlsSource | FolderSource | ScenesSource) -> str:
    """Return a hash of the names, sizes and times of a source's files, without reading them.

    It is "" for packages, which have a version, and "unreadable" if the files cannot be listed.
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
        return "unreadable"  # the error is raised when the source is read
    for mark in marks:
        digest.update(mark.encode("utf-8", "surrogateescape") + b"\n")
    return digest.hexdigest()[:16]


Source = Annotated[
    PackagesSource | UrlsSource | FolderSource | ScenesSource, Field(discriminator="kind")
]


class DataConfig(Section):
    """Section [data]: the sources of pairs, and how they are downloaded."""

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
    """The sources, read in this order; if two of them have the same URL, the first is used."""
    cache: str = "~/.cache/unclip"
    """Local folder for downloaded packages and rendered pictures; safe to delete."""
    image_size_px: int = Field(64, ge=8, le=2048)
    """Side of the stored images in pixels."""
    resize: Literal["border", "center_crop", "keep_ratio", "keep_ratio_largest"] = "border"
    """img2dataset's resize mode; `border` keeps the whole picture and pads it with white to a
    square."""
    encode: Literal["png", "jpg", "webp"] = "png"
    """Format of the stored images; png is lossless and not larger at 64 px."""
    images_per_shard: int = Field(1000, ge=1, le=100_000)
    """Rows of the URL table per shard."""
    processes: int = Field(2, ge=1, le=256)
    """Maximum number of shards that are downloaded at the same time; each needs a CPU core in Ray.
    `[cluster] ingest_workers` overrides it."""
    threads: int = Field(16, ge=1, le=1024)
    """Simultaneous requests of each process."""
    timeout_s: float = Field(10, gt=0, le=600)
    """Limit for one request, from connecting to the last byte, in seconds."""
    retries: int = Field(2, ge=0, le=10)
    """Retries of a request that failed for temporary reasons (time-out, 429, 5xx, broken
    connection), with growing pauses; also for npm packages."""
    retry_passes: int = Field(1, ge=0, le=10)
    """Further passes over the rows that failed for temporary reasons, after all other rows."""
    max_passing: float = Field(0.5, ge=0, le=1)
    """Maximum share of a shard's rows that may fail for temporary reasons; above it, the shard is
    made again up to three times, with pauses."""
    max_image_bytes: int = Field(20 * 2**20, ge=1)
    """Maximum bytes of a response; a larger one is dropped as too_large without reading it."""
    max_image_pixels: int = Field(50_000_000, ge=1)
    """Maximum pixels that an image may declare; a larger one (a decompression bomb) is dropped as
    too_large without decoding it."""
    min_success: float = Field(0.2, ge=0, le=1)
    """Minimum share of the URLs that must become images; below it, the stage fails."""
    allow_private: bool = False
    """Whether URLs may lead to private, loopback and link-local addresses. Sources that are served
    on loopback do not need it."""
    proxy: str = Field("", pattern=r"^(http://[^/@\s]+:\d+)?$")
    """`http://host:port` of a proxy for all downloads; a proxy in the environment is never used. A
    proxy resolves names itself, so it must refuse private addresses itself: only IP addresses in
    URLs and `localhost` are refused here."""
    robots: bool = True
    """Whether to obey each host's robots.txt (RFC 9309, user agent `unclip`). Rows that robots.txt
    or X-Robots-Tag forbids are dropped as `robots`."""
    per_host: int = Field(16, ge=0, le=1024)
    """Simultaneous requests to one host, divided among the shards that are downloaded at the same
    time (at least one each). 0 sets no limit. Sources on loopback have no limit."""
    opt_out: tuple[str, ...] = ()
    """Opt-out lists on any fsspec path: hosts and URLs, one per line, that are never requested;
    their rows are dropped as `opted_out`."""
    seed: int = 0
    """Seed of the order of the rows, which are shuffled in blocks of 100,000, so that consecutive
    requests go to different hosts."""

    def keyed(self) -> dict[str, Any]:
        """Return the fields that the stage's key depends on, and hashes of the sources' files.

        A list that has changed is another input, so its hash changes the key.
        """
        content = [content_of(source) for source in self.sources] + (
            [hash_of_lists(self.opt_out)] if self.opt_out else []
        )
        return super().keyed() | {"content": content}


@dataclass
class Mounts:
    """The local folders of a table's loopback URLs, by mount name; saved for a resumed run."""

    folders: dict[str, Path] = field(default_factory=dict)

    def save(self, path: Path) -> None:
        """Write the JSON file."""
        path.write_text(json.dumps({name: str(folder) for name, folder in self.folders.items()}))

    @classmethod
    def load(cls, path: Path) -> "Mounts":
        """Read the mounts that `save` wrote."""
        return cls({name: Path(folder) for name, folder in json.loads(path.read_text()).items()})


Row = dict[str, Any]


def row(url: str, origin: str, captions: list[str], **columns: str) -> Row:
    """Return a row of the schema URLS; a missing concept is replaced by the row's key.

    Lone surrogates, which cannot be written as UTF-8, become `?`.
    """
    texts = {
        name: replace_surrogates(text)
        for name, text in {
            "licence": "",
            "style": "",
            "category": "",
            "subcategory": "",
            **columns,
        }.items()
    }
    phrasings = [
        text
        for text in dict.fromkeys(replace_surrogates(caption).strip() for caption in captions)
        if text
    ]
    caption = phrasings[0] if phrasings else ""
    url, origin = replace_surrogates(url), replace_surrogates(origin)
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


def replace_surrogates(text: str) -> str:
    """Return a text with `?` for lone surrogates, which cannot be written as UTF-8."""
    return text if text.isascii() else text.encode("utf-8", "replace").decode()


def package_rows(
    source: PackagesSource, config: DataConfig, cache: Path, base: str, mounts: Mounts
) -> Iterator[Row]:
    """Yield the pictures of all packages of a source; add their folders to `mounts`."""
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
            item = row(
                base + url_path(mount, picture.file.relative_to(root).as_posix()),
                f"npm:{spec}/{picture.origin}",
                list(picture.captions),
                licence=picture.licence,
                concept=picture.concept,
                style=picture.style,
                category=picture.category,
                subcategory=picture.subcategory,
            )
            yield item | ({"problem": picture.problem} if picture.problem else {})


def folder_rows(source: FolderSource, base: str, mounts: Mounts) -> Iterator[Row]:
    """Yield the images of a folder and its subfolders; add the folder to `mounts`.

    An image without a `.txt` file has an empty caption. Raises CallerError if there is no folder.
    """
    root = Path(source.path).expanduser()
    if not root.is_dir():
        raise CallerError(
            f"[data] folder {source.path!r} does not exist: give a folder of images with .txt "
            "captions beside them"
        )
    mount = root.resolve().name
    while mount in mounts.folders:
        mount += "-again"
    mounts.folders[mount] = root
    for file, problem in image_files(root):
        captions, no_text = captions_beside(file, root)
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
    """Yield the drawn pictures of a source; add their folder to `mounts`.

    The concept of a picture, by which splits are made, is the scene.
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
    """Yield the rows of a URL list, with URLs in canonical form.

    `base` marks URLs of our own server for the download tasks.
    """
    for values in read_lists(source):
        if isinstance(values, Refused):
            yield row("", values.origin, []) | {"problem": (values.reason, values.detail)}
            continue
        written = next(iter(phrasings_of(values.pop("url"))[0]), "").strip()
        url = canonical_origin(written)
        captions, refused = phrasings_of(values.pop("caption"), values.pop("captions", None))
        words = {name: word for name, value in values.items() if (word := word_of(value))}
        assert not url.startswith(f"{base}/"), "only our own rows name our own server"
        item = row(url, url, captions, **{"licence": source.licence, **words})
        item["written"] = replace_surrogates(written)
        has_none = refused and not item["caption"]
        yield item | ({"problem": (NOT_TEXT, refused)} if has_none else {})


def write_url_table(
    config: DataConfig,
    out: Path,
    cache: Path,
    base: str = SERVED,
    removed_keys: Set[str] = frozenset(),
) -> int:
    """Write OUT/urls.parquet (schema URLS), dropped.parquet (DROPPED), mounts.json, opt_out.json;
    return the number of rows in urls.parquet.

    `base` is the prefix of URLs that are served on loopback, `removed_keys` are those of the
    removal log. Rows without a URL or a caption, and rows with a repeated URL, are dropped and
    counted. Memory: one block of rows and 8 bytes per URL.
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
                reason, detail = drop_reason(item, new, opt_out, removed_keys)
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


def drop_reason(
    item: Row, is_new: bool, opt_out: OptOut, removed_keys: Set[str] = frozenset()
) -> Problem:
    """Return (reason, detail) if a row is dropped before its download, else ("", "").

    The removal log may name the key that an earlier release made of the row.
    """
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
    written = str(item.get("written", item["origin"]))
    if removed_keys and former_sample_key(written, item["caption"]) in removed_keys:
        return "removed", "the removal log"
    return "", ""


def new_urls(urls: list[str], seen: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return a mask of the URLs of a block that appear for the first time, and the sorted 64-bit
    hashes of all URLs so far, including this block.
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
    # insert copies once; sorting all hashes again would take longer with every block
    return is_new, np.insert(seen, positions[~is_seen], first[~is_seen])


def all_rows(config: DataConfig, cache: Path, base: str, mounts: Mounts) -> Iterator[Row]:
    """Yield the rows of all sources, in the order of the sources."""
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
    """Yield the rows and show their number as progress."""
    for number, item in enumerate(rows, 1):
        progress.update(number)
        yield item


def blocks(rows: Iterator[Row]) -> Iterator[list[Row]]:
    """Yield the rows in blocks of at most BLOCK_ROWS and about BLOCK_BYTES."""
    block: list[Row] = []
    size_bytes = 0
    for item in rows:
        block.append(item)
        size_bytes += len(item["url"]) + sum(map(len, item["captions"]))
        if len(block) == BLOCK_ROWS or size_bytes >= BLOCK_BYTES:
            yield block
            block, size_bytes = [], 0
    if block:
        yield block
