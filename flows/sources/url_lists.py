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
from flows.sources.parquet_process import ParquetProcess
from flows.sources.parquet_reader import MAX_ROW_BYTES
from infra.canonical_url import without_user
from infra.errors import CallerError, DataError, UnclipError
from infra.settings import Section

PIECE_BYTES = 1 << 20
MAX_LINE_BYTES = 1 << 20
"""Maximum bytes of a row of a text list, the columns that are not read included."""
MAX_DETAIL = 200
"""Maximum characters of a refused row that are recorded."""
MALFORMED, TOO_LARGE = "malformed_row", "row_too_large"
QUOTES = {"csv": "double"}
FORMATS = {"parquet": "parquet", "csv": "csv", "tsv": "tsv", "jsonl": "jsonl", "ndjson": "jsonl"}

HIDDEN = ("_", ".")
"""File names with these first characters are not part of a list: `_SUCCESS`, `.part-0.crc`."""


@dataclass(frozen=True)
class Refused:
    """A row that is dropped: where it is, and why."""

    origin: str
    reason: str
    detail: str


Values = dict[str, Any]
UNPARSED = (pa.ArrowException, OSError, EOFError, zlib.error, ValueError, RecursionError)
"""What parsers raise for files that are not of their format."""


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
        message = without_user(f"URL list {source.path!r} cannot be opened: {error}")
        raise CallerError(f"[data] {message}") from error
    if len(files) > 1 and not Path(source.path).name.startswith(HIDDEN):
        files = [file for file in files if not Path(file.path).name.startswith(HIDDEN)]
    if not files:
        raise CallerError(f"[data] URL list {without_user(source.path)!r} matches no file")
    return list(files)


def read_lists(source: UrlsSource) -> Iterator[Values | Refused]:
    """Yield the rows of all files of a list, file by file.

    A row has url, caption and the other columns that the recipe names, under our names. A row
    without the columns of its file, or with more than MAX_ROW_BYTES in them, is Refused. Raises
    CallerError for a missing path, an unknown format or a missing column, DataError for a file that
    cannot be parsed.
    """
    wanted = {
        "url": source.url_column, "caption": source.caption_column,
        "captions": source.captions_column, "licence": source.licence_column,
        "concept": source.concept_column, "style": source.style_column,
        "category": source.category_column,
        "subcategory": source.subcategory_column,
    }  # fmt: skip
    wanted = {ours: theirs for ours, theirs in wanted.items() if theirs}
    with ParquetProcess() as parquet:
        for file in list_files(source):
            path = without_user(file.path)
            kind = file_format(source, path)
            quotes = source.quotes if source.quotes != "auto" else QUOTES.get(kind, "none")
            columns = list(wanted.values())
            try:
                rows = (
                    read_parquet(parquet, file, columns, path)
                    if kind == "parquet"
                    else read_text(file, kind, quotes, columns, path)
                )
                for row in rows:
                    yield row if isinstance(row, Refused) else dict(zip(wanted, row, strict=True))
            except UnclipError:
                raise
            except FileNotFoundError as error:
                raise CallerError(f"[data] URL list {path} does not exist") from error
            except UNPARSED as error:
                message = str(error) or type(error).__name__
                raise DataError(
                    f"URL list {path} cannot be parsed: {without_user(message.splitlines()[0])}"
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


def read_parquet(
    parquet: ParquetProcess, file: Any, wanted: Sequence[str], path: str
) -> Iterator[Sequence[Any] | Refused]:
    """Yield the values of a parquet file's wanted columns, row by row."""
    number = 0
    for batch in parquet.read(file, list(dict.fromkeys(wanted))):
        if isinstance(batch, list):
            check_columns(wanted, batch, path)
            continue
        columns = batch.to_pydict()
        rows = zip(*(columns[name] for name in wanted), strict=True)
        for size_bytes, row in zip(columns["row_bytes"], rows, strict=True):
            number += 1
            yield row if size_bytes <= MAX_ROW_BYTES else too_large(path, "row", number, size_bytes)


def too_large(path: str, unit: str, number: int, size_bytes: int) -> Refused:
    """Return what a row with too many bytes in the columns that are read becomes."""
    detail = f"{size_bytes:,} bytes, {MAX_ROW_BYTES:,} allowed"
    return Refused(f"{Path(path).name} {unit} {number}", TOO_LARGE, detail)


def read_text(
    file: Any, kind: str, quotes: str, wanted: Sequence[str], path: str
) -> Iterator[Sequence[Any] | Refused]:
    """Yield the values of a text file's wanted columns, row by row."""
    with file as stream:
        lines = read_lines(stream)
        records = (
            json_records(lines, wanted, path)
            if kind == "jsonl"
            else separated_rows(lines, "\t" if kind == "tsv" else ",", quotes, wanted, path)
        )
        for record in records:
            values = record.values
            if isinstance(values, str):
                where = f"{Path(path).name} line {record.line}"
                yield Refused(where, record.reason, without_user(values)[:MAX_DETAIL])
            elif (size_bytes := sum(map(size_of, values))) > MAX_ROW_BYTES:
                yield too_large(path, "line", record.line, size_bytes)
            else:
                yield values


def size_of(value: Any) -> int:
    """Return the bytes of a text or of a list's texts; about 8 for every other value."""
    texts = value if isinstance(value, list) else [value]
    return sum(
        8 + len(text.encode("utf-8", "replace") if isinstance(text, str) else text)
        for text in texts
        if isinstance(text, str | bytes)
    ) + 8 * len(texts)


class LongLine(bytes):
    """The start of a line of more than MAX_LINE_BYTES, without a line end."""


def read_lines(stream: Any) -> Iterator[bytes]:
    """Yield a file's lines as UTF-8 with line ends; the encoding is that of its byte order mark.

    Of a line with more than MAX_LINE_BYTES, yield the start as LongLine.
    """
    encoding = encoding_of(stream.read(4))
    stream.seek(0)
    if encoding not in ("utf-8", "utf-8-sig"):
        decoded = pa.transcoding_input_stream(pa.PythonFile(stream, "r"), encoding, "utf-8")
        stream = io.BufferedReader(decoded, PIECE_BYTES)
    for number, line in enumerate(_bounded_lines(stream)):
        is_marked = number == 0 and not isinstance(line, LongLine)
        yield line.removeprefix(codecs.BOM_UTF8) if is_marked else line


def _bounded_lines(stream: Any) -> Iterator[bytes]:
    rest, is_long = b"", False
    while piece := stream.read(PIECE_BYTES):
        *lines, rest = (rest + piece).split(b"\n")
        for line in lines:
            is_long = is_long or len(line) > MAX_LINE_BYTES
            yield LongLine(line[:MAX_DETAIL]) if is_long else line + b"\n"
            is_long = False
        if len(rest) > MAX_LINE_BYTES:
            rest, is_long = rest[:MAX_DETAIL], True
    if rest:
        yield LongLine(rest[:MAX_DETAIL]) if is_long else rest


@dataclass(frozen=True)
class Record:
    """One row of a text file: its line number, and its values (list) or why it is refused (str)."""

    line: int
    values: list[Any] | str
    reason: str = MALFORMED


def separated_rows(
    lines: Iterator[bytes], separator: str, quotes: str, wanted: Sequence[str], path: str
) -> Iterator[Record]:
    """Yield the wanted values of the rows of a csv or tsv file; None for empty values.

    A value is text, or bytes if it is not UTF-8. A row with another number of columns than the
    header is malformed. So is one with an unclosed quote, of which only the first line is skipped.
    """
    records = separated_records(lines, separator, quotes)
    header = next(records, None)
    if header is None or isinstance(header.values, str):
        raise pa.ArrowInvalid("it has no header line with the columns' names")
    check_columns(wanted, header.values, path)
    positions = [header.values.index(name) for name in wanted]
    for record in records:
        if isinstance(record.values, str):
            yield record
        elif len(record.values) != len(header.values):
            text = separator.join(record.values).encode("utf-8", "replace").decode()
            counts = f"{len(record.values)} columns for {len(header.values)}"
            yield Record(record.line, f"{counts}: {text}")
        else:
            yield Record(record.line, [_cell(record.values[position]) for position in positions])


class LongRowError(Exception):
    """A row has more than MAX_LINE_BYTES."""


def long_record(number: int, start: str) -> Record:
    """Return the record of a row with more than MAX_LINE_BYTES."""
    text = start.encode("utf-8", "replace").decode()
    return Record(number, f"more than {MAX_LINE_BYTES:,} bytes: {text}", TOO_LARGE)


def separated_records(lines: Iterator[bytes], separator: str, quotes: str) -> Iterator[Record]:
    """Yield the non-empty rows of a csv or tsv file; invalid UTF-8 bytes are surrogates."""
    if quotes == "none":
        for number, line in enumerate(lines, 1):
            text = line.decode("utf-8", "surrogateescape").rstrip("\r\n")
            if isinstance(line, LongLine):
                yield long_record(number, text)
            elif text:
                yield Record(number, text.split(separator))
        return
    waiting: deque[str] = deque()
    taken: list[str] = []
    number = 1

    def next_lines() -> Iterator[str]:
        size = 0
        while True:
            line = b"" if waiting else next(lines, None)
            if line is None:
                return
            text = waiting.popleft() if waiting else line.decode("utf-8", "surrogateescape")
            size = size + len(text) if taken else len(text)
            taken.append(text)
            if isinstance(line, LongLine) or size > MAX_LINE_BYTES:
                raise LongRowError
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
            except LongRowError:
                yield long_record(number, taken[0][:MAX_DETAIL])
                number += len(taken)
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


def json_records(lines: Iterator[bytes], wanted: Sequence[str], path: str) -> Iterator[Record]:
    """Yield the wanted values of JSON objects, one per line.

    The first line must have all wanted values; in later lines, missing ones are None.
    """
    is_first = True
    for number, line in enumerate(lines, 1):
        if isinstance(line, LongLine):
            yield long_record(number, line.decode("utf-8", "surrogateescape"))
            continue
        if not line.strip():
            continue
        item = json.loads(line)
        if not isinstance(item, dict):
            raise pa.ArrowInvalid(f"a line is not a JSON object: {line[:40]!r}")
        if is_first:
            check_columns(wanted, list(item), path)
            is_first = False
        yield Record(number, [item.get(name) for name in wanted])
