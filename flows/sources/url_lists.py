"""Read lists of URLs and captions: parquet, csv, tsv or jsonl, on any fsspec path, in batches.

Maps the column names of the recipe to ours. `flows/sources/url_table.py` checks the rows.
"""

import codecs
import csv
import io
import json
import zlib
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import fsspec
import pyarrow as pa
from fsspec.core import has_magic
from fsspec.implementations.http import HTTPFileSystem
from pydantic import Field

from flows.sources.caption_text import encoding_of
from infra.errors import CallerError, DataError
from infra.schemas import open_parquet
from infra.settings import Section

BATCH_ROWS = 10_000
PIECE_BYTES = 1 << 20
MAX_DETAIL = 200
"""Maximum characters of a malformed row that are recorded."""
QUOTES = {"csv": "double"}
FORMATS = {"parquet": "parquet", "csv": "csv", "tsv": "tsv", "jsonl": "jsonl", "ndjson": "jsonl"}

HIDDEN = ("_", ".")
"""File names with these first characters are not part of a list: `_SUCCESS`, `.part-0.crc`."""


@dataclass(frozen=True)
class Malformed:
    """A row without the columns of its file: where it is, and why it is malformed."""

    origin: str
    detail: str


Values = dict[str, Any]


class UrlsSource(Section):
    """A list of URLs and captions; all other columns are optional."""

    kind: Literal["urls"]
    path: str = Field(min_length=1)
    """File, folder or glob on any fsspec path: `list.parquet`, `s3://bucket/lists/*.jsonl`. In a
    folder, all files are read except those whose names start with `_` or `.`."""
    format: Literal["auto", "parquet", "csv", "tsv", "jsonl"] = "auto"
    """File format; `auto` chooses it by the suffix. Text formats may end in `.gz`."""
    quotes: Literal["auto", "none", "double"] = "auto"
    """Whether `"` encloses values in csv and tsv files: `double` (RFC 4180) or `none`. `auto` means
    `double` for csv and `none` for tsv."""
    url_column: str = "url"
    """Column with the pictures' URLs."""
    caption_column: str = "caption"
    """Column with the captions: a text, or a list of texts with several phrasings."""
    captions_column: str = ""
    """Column with a list of further phrasings; "" for no column, here and below."""
    licence_column: str = ""
    """Column with each picture's licence."""
    concept_column: str = ""
    """Column with the concept, by which splits are made; without it, each row is a concept."""
    style_column: str = ""
    """Column with the drawing style, for `[curate] held_out_styles`."""
    category_column: str = ""
    """Column with the class for the evaluation of zero-shot classification."""
    subcategory_column: str = ""
    """Column with a finer class."""
    licence: str = ""
    """Licence of rows that have none in their column."""


def list_files(source: UrlsSource) -> list[Any]:
    """Return the files of a list as fsspec's OpenFile, in name order.

    Raises CallerError if the path cannot be opened or matches no file.
    """
    try:
        fs, root = fsspec.core.url_to_fs(source.path)
        is_web = isinstance(
            fs, HTTPFileSystem
        )  # its isdir would download the list to search it for links
        if not is_web and not has_magic(source.path) and fs.isdir(root):
            paths = [fs.unstrip_protocol(path) for path in sorted(fs.find(root))]
            files = fsspec.open_files(paths, "rb", compression="infer") if paths else []
        else:
            files = fsspec.open_files(source.path, "rb", compression="infer")
    except (OSError, ValueError, ImportError) as error:
        raise CallerError(f"[data] URL list {source.path!r} cannot be opened: {error}") from error
    if len(files) > 1 and not Path(source.path).name.startswith(HIDDEN):
        files = [file for file in files if not Path(file.path).name.startswith(HIDDEN)]
    if not files:
        raise CallerError(f"[data] URL list {source.path!r} matches no file")
    return list(files)


def read_lists(source: UrlsSource) -> Iterator[Values | Malformed]:
    """Yield the rows of all files of a list, file by file.

    A row has url, caption and the other columns that the recipe names, under our names; a row
    without the columns of its file is Malformed. Raises CallerError for a missing path, an unknown
    format or a missing column, DataError for a file that cannot be parsed.
    """
    wanted = {
        "url": source.url_column, "caption": source.caption_column,
        "captions": source.captions_column, "licence": source.licence_column,
        "concept": source.concept_column, "style": source.style_column,
        "category": source.category_column,
        "subcategory": source.subcategory_column,
    }  # fmt: skip
    wanted = {ours: theirs for ours, theirs in wanted.items() if theirs}
    for file in list_files(source):
        kind = file_format(source, file.path)
        quotes = source.quotes if source.quotes != "auto" else QUOTES.get(kind, "none")
        try:
            with file as stream:
                for row in read_rows(stream, kind, quotes, list(wanted.values()), file.path):
                    yield (
                        row if isinstance(row, Malformed) else dict(zip(wanted, row, strict=True))
                    )
        except FileNotFoundError as error:
            raise CallerError(f"[data] URL list {file.path} does not exist") from error
        except (
            pa.ArrowException,
            OSError,
            EOFError,
            zlib.error,
            UnicodeDecodeError,
            json.JSONDecodeError,
        ) as error:
            raise DataError(
                f"URL list {file.path} cannot be parsed: {str(error).splitlines()[0]}"
            ) from error


def file_format(source: UrlsSource, path: str) -> str:
    """Return the format of one file of a list. Raises CallerError if the suffix is unknown."""
    if source.format != "auto":
        return source.format
    suffix = Path(path.removesuffix(".gz")).suffix.lower().lstrip(".")
    if suffix not in FORMATS:
        raise CallerError(
            f"[data] URL list {path}: the suffix is no known format; set format to parquet, csv, "
            "tsv or jsonl"
        )
    return FORMATS[suffix]


def check_columns(wanted: Sequence[str], names: Sequence[str], path: str) -> None:
    """Raise CallerError if a file does not have all wanted columns."""
    missing = [name for name in wanted if name not in names]
    if missing:
        raise CallerError(
            f"[data] URL list {path} has no column {missing[0]!r}: its columns are "
            f"{', '.join(names)}"
        )


def read_rows(
    stream: Any, kind: str, quotes: str, wanted: Sequence[str], path: str
) -> Iterator[Sequence[Any] | Malformed]:
    """Yield the values of a file's wanted columns, row by row."""
    if kind == "parquet":
        # Without buffer_size, whole column chunks of a row group are read at once.
        file = open_parquet(stream, buffer_size=PIECE_BYTES)
        check_columns(wanted, file.schema_arrow.names, path)
        for batch in file.iter_batches(BATCH_ROWS, columns=list(wanted)):
            columns = batch.to_pydict()
            yield from zip(*(columns[name] for name in wanted), strict=True)
        return
    lines = read_lines(stream)
    if kind == "jsonl":
        yield from read_json_lines(lines, wanted, path)
    else:
        yield from read_separated(lines, "\t" if kind == "tsv" else ",", quotes, wanted, path)


def read_lines(stream: Any) -> Iterator[bytes]:
    """Yield a file's lines as UTF-8 with line ends; the encoding is that of its byte order mark."""
    encoding = encoding_of(stream.read(4))
    stream.seek(0)
    if encoding not in ("utf-8", "utf-8-sig"):
        decoded = pa.transcoding_input_stream(pa.PythonFile(stream, "r"), encoding, "utf-8")
        stream = io.BufferedReader(decoded, PIECE_BYTES)
    for number, line in enumerate(stream):
        yield line.removeprefix(codecs.BOM_UTF8) if number == 0 else line


def read_separated(
    lines: Iterator[bytes], separator: str, quotes: str, wanted: Sequence[str], path: str
) -> Iterator[Sequence[Any] | Malformed]:
    """Yield the wanted values of the rows of a csv or tsv file; None for empty values.

    A value is text, or bytes if it is not UTF-8. A row with another number of columns than the
    header is Malformed. So is one with an unclosed quote, of which only the first line is skipped.
    """
    records = separated_records(lines, separator, quotes)
    header = next(records, None)
    if header is None or isinstance(header.values, str):
        raise pa.ArrowInvalid("it has no header line with the columns' names")
    check_columns(wanted, header.values, path)
    positions = [header.values.index(name) for name in wanted]
    for record in records:
        where = f"{Path(path).name} line {record.line}"
        if isinstance(record.values, str):
            yield Malformed(where, record.values[:MAX_DETAIL])
        elif len(record.values) != len(header.values):
            text = separator.join(record.values).encode("utf-8", "replace").decode()
            counts = f"{len(record.values)} columns for {len(header.values)}"
            yield Malformed(where, f"{counts}: {text[:MAX_DETAIL]}")
        else:
            yield [_cell(record.values[position]) for position in positions]


@dataclass(frozen=True)
class Record:
    """One row of a text file: its line number, and its values (list) or why it is malformed (str).

    Invalid UTF-8 bytes are surrogates.
    """

    line: int
    values: list[str] | str


def separated_records(lines: Iterator[bytes], separator: str, quotes: str) -> Iterator[Record]:
    """Yield the non-empty rows of a csv or tsv file."""
    texts = (line.decode("utf-8", "surrogateescape") for line in lines)
    if quotes == "none":
        for number, text in enumerate(texts, 1):
            if text.rstrip("\r\n"):
                yield Record(number, text.rstrip("\r\n").split(separator))
        return
    waiting: deque[str] = deque()
    taken: list[str] = []
    number = 1

    def next_lines() -> Iterator[str]:
        while True:
            text = waiting.popleft() if waiting else next(texts, None)
            if text is None:
                return
            taken.append(text)
            yield text

    is_over = False
    while not is_over:
        # A new reader after every error: the old one would continue inside the quotes.
        reader = csv.reader(next_lines(), delimiter=separator, strict=True)
        while True:
            taken.clear()
            try:
                values = next(reader)
            except StopIteration:
                is_over = True
                break
            except csv.Error as error:
                yield Record(number, f"{error}: {taken[0].encode('utf-8', 'replace').decode()}")
                waiting.extendleft(reversed(taken[1:]))
                number += 1
                break
            if values:
                yield Record(number, values)
            number += len(taken)


def _cell(text: str) -> str | bytes | None:
    if not text or text.isascii():
        return text or None
    data = text.encode("utf-8", "surrogateescape")
    try:
        return data.decode()
    except UnicodeDecodeError:
        return data


def read_json_lines(
    lines: Iterator[bytes], wanted: Sequence[str], path: str
) -> Iterator[Sequence[Any]]:
    """Yield the wanted values of JSON objects, one per line.

    The first line must have all wanted values; in later lines, missing ones are None.
    """
    is_first = True
    for line in lines:
        if not line.strip():
            continue
        item = json.loads(line)
        if not isinstance(item, dict):
            raise pa.ArrowInvalid(f"a line is not a JSON object: {line[:40]!r}")
        if is_first:
            check_columns(wanted, list(item), path)
            is_first = False
        yield [item.get(name) for name in wanted]
