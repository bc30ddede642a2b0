"""Text from whatever a list or a caption file holds, and file names as text.

Says what is text and what is not. Knows neither sources nor rows.
"""

import codecs
import math
import os
from typing import Any

BYTE_ORDER_MARKS = (
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF32_LE, "utf-32"),  # before UTF-16, whose mark it starts with
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)


class NotTextError(ValueError):
    """A value or a file that is there, but holds no text."""


def encoding_of(start: bytes) -> str:
    """Return the encoding that a byte order mark at the start of a file names, else "utf-8"."""
    return next((name for mark, name in BYTE_ORDER_MARKS if start.startswith(mark)), "utf-8")


def decode_text(data: bytes) -> str:
    """Decode a text file by its byte order mark, else as UTF-8. Raises NotTextError."""
    encoding = encoding_of(data)
    try:
        return data.decode(encoding)
    except UnicodeDecodeError as error:
        raise NotTextError(f"the text is not {encoding}: {error}") from error


def text_of(value: Any) -> str:
    """Return a list's value as text; "" where it is missing (None, NaN).

    Bytes are text if they are UTF-8. Raises NotTextError for any other value.
    """
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ""
    if isinstance(value, str):
        return value
    if isinstance(value, bytes):
        return decode_text(value)
    raise NotTextError(f"{type(value).__name__} {str(value)[:80]!r}")


def phrasings_of(*values: Any) -> tuple[list[str], str]:
    """Return all text in a row's caption values, in order, and what was no text, else "".

    A value may be text or a list of texts.
    """
    texts: list[str] = []
    refused: list[str] = []
    for value in values:
        for one in value if isinstance(value, list | tuple) else [value]:
            try:
                texts.append(text_of(one))
            except NotTextError as error:
                refused.append(str(error))
    return texts, next(iter(refused), "")


def word_of(value: Any) -> str:
    """Return a class, a style or a licence as text; numbers are, "" for all that is none."""
    if isinstance(value, bool | int) or (isinstance(value, float) and math.isfinite(value)):
        return str(value)
    try:
        return text_of(value)
    except NotTextError:
        return ""


def printable(name: str | os.PathLike[str]) -> str:
    r"""Return a file's name as text: bytes that are not UTF-8 become `\xe9`."""
    return os.fsencode(name).decode("utf-8", "backslashreplace")
