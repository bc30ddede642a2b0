"""Read lists of URLs and captions: parquet, csv, tsv or jsonl, on any fsspec path, in batches.

Maps the recipe's column names to ours. `flows/sources/url_table.py` decides which rows are valid.
"""

import csv
import json
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import fsspec
import pyarrow as pa
import pyarrow.csv
from pydantic import Field

from infra.errors import CallerError, DataError
from infra.schemas import open_parquet
from infra.settings import Section

BATCH_ROWS = 10_000
PIECE_BYTES = 1 << 20
FORMATS = {"parquet": "parquet", "csv": "csv", "tsv": "tsv", "jsonl": "jsonl", "ndjson": "jsonl"}

Columns = dict[str, Sequence[Any]]


class UrlsSource(Section):
    """A list of URLs and captions; every column but these two may be absent."""

    kind: Literal["urls"]
    path: str = Field(min_length=1)
    """File or glob on any fsspec path: `list.parquet`, `s3://bucket/lists/*.jsonl`."""
    format: Literal["auto", "parquet", "csv", "tsv", "jsonl"] = "auto"
    """File format; `auto` goes by the suffix, `.gz` allowed on the text formats."""
    url_column: str = "url"
    """Column with the pictures' URLs."""
    caption_column: str = "caption"
    """Column with the captions."""
    captions_column: str = ""
    """Column with a list of further phrasings; "" for none, as for the columns below."""
    licence_column: str = ""
    """Column with each picture's licence."""
    concept_column: str = ""
    """Splits go by the concept; without the column every row is a concept of its own."""
    style_column: str = ""
    """Column with the drawing style, for `[curate] held_out_styles`."""
    category_column: str = ""
    """Column with the class that zero-shot classification is judged by."""
    subcategory_column: str = ""
    """Column with a finer class."""
    licence: str = ""
    """Licence of all rows that name none."""


def read_lists(source: UrlsSource) -> Iterator[dict[str, Any]]:
    """Yield the rows of all files of a list, file after file: url, caption and those of the other
    columns that the recipe names.

    Raises CallerError for a path, a format or a column that is not there, DataError for a file that
    does not parse.
    """
    try:
        files = fsspec.open_files(source.path, "rb", compression="infer")
    except (OSError, ValueError, ImportError) as error:
        raise CallerError(f"[data] URL list {source.path!r} cannot be opened: {error}") from error
    if not files:
        raise CallerError(f"[data] URL list {source.path!r} matches no file")
    wanted = {
        "url": source.url_column, "caption": source.caption_column,
        "captions": source.captions_column, "licence": source.licence_column,
        "concept": source.concept_column, "style": source.style_column,
        "category": source.category_column,
        "subcategory": source.subcategory_column,
    }  # fmt: skip
    wanted = {ours: theirs for ours, theirs in wanted.items() if theirs}
    for file in files:
        kind = file_format(source, file.path)
        try:
            with file as stream:
                for columns in read_columns(stream, kind, list(wanted.values()), file.path):
                    for values in zip(
                        *(columns[theirs] for theirs in wanted.values()), strict=True
                    ):
                        yield dict(zip(wanted, values, strict=True))
        except FileNotFoundError as error:
            raise CallerError(f"[data] URL list {file.path} is not there") from error
        except (
            pa.ArrowException,
            OSError,
            EOFError,
            zlib.error,
            UnicodeDecodeError,
            json.JSONDecodeError,
        ) as error:
            raise DataError(
                f"URL list {file.path} does not parse: {str(error).splitlines()[0]}"
            ) from error


def file_format(source: UrlsSource, path: str) -> str:
    """Return the format of one file of a list."""
    if source.format != "auto":
        return source.format
    suffix = Path(path.removesuffix(".gz")).suffix.lower().lstrip(".")
    if suffix not in FORMATS:
        raise CallerError(
            f"[data] URL list {path}: set format = parquet, csv, tsv or jsonl, the suffix does "
            "not tell"
        )
    return FORMATS[suffix]


def check_columns(wanted: Sequence[str], names: Sequence[str], path: str) -> None:
    """Raise CallerError when a wanted column is not among a file's."""
    missing = [name for name in wanted if name not in names]
    if missing:
        raise CallerError(
            f"[data] URL list {path} has no column {missing[0]!r}: it has {', '.join(names)}"
        )


def read_columns(stream: Any, kind: str, wanted: Sequence[str], path: str) -> Iterator[Columns]:
    """Yield a file's wanted columns, `BATCH_ROWS` or fewer rows at a time."""
    if kind == "parquet":
        file = open_parquet(
            stream, buffer_size=PIECE_BYTES
        )  # else whole column chunks of a row group, however large, are read at once
        check_columns(wanted, file.schema_arrow.names, path)
        for batch in file.iter_batches(BATCH_ROWS, columns=list(wanted)):
            yield batch.to_pydict()
    elif kind == "jsonl":
        yield from read_json_lines(stream, wanted, path)
    else:
        # Text throughout: a caption "007" must not become the number 7, nor "null" nothing.
        delimiter = "\t" if kind == "tsv" else ","
        names = next(csv.reader([stream.readline().decode("utf-8-sig")], delimiter=delimiter), [])
        stream.seek(0)
        check_columns(wanted if names else (), names, path)
        convert = pyarrow.csv.ConvertOptions(
            column_types=dict.fromkeys(names, pa.string()),
            strings_can_be_null=True,
            null_values=[""],
            include_columns=list(wanted),
        )
        parse = pyarrow.csv.ParseOptions(delimiter=delimiter, newlines_in_values=True)
        for batch in pyarrow.csv.open_csv(stream, parse_options=parse, convert_options=convert):
            yield batch.to_pydict()


def read_json_lines(stream: Any, wanted: Sequence[str], path: str) -> Iterator[Columns]:
    """Yield the wanted columns of JSON objects, one a line; the first line must have them all,
    later ones may leave some out.
    """
    lines: list[dict[str, Any]] = []
    is_first = True
    for line in stream:
        if not line.strip():
            continue
        item = json.loads(line)
        if not isinstance(item, dict):
            raise pa.ArrowInvalid(f"a line is no object: {line[:40]!r}")
        if is_first:
            check_columns(wanted, list(item), path)
            is_first = False
        lines.append(item)
        if len(lines) == BATCH_ROWS:
            yield {name: [item.get(name) for item in lines] for name in wanted}
            lines = []
    if lines:
        yield {name: [item.get(name) for item in lines] for name in wanted}
