"""Convert values of URL lists, caption files and file names to text.

Raises NotTextError for values that are not text. Works on single values only.
"""

import codecs
import math
import os
from typing import Any

BYTE_ORDER_MARKS = (
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF32_LE, "utf-32"),  # before UTF-16, whose mark is a prefix of this one
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)


class NotTextError(ValueError):
    """A value or a file exists but is not text."""


def encoding_of(start: bytes) -> str:
    """Return the encoding of the byte order mark at the start of a file; without one, "utf-8"."""
    return next((name for mark, name in BYTE_ORDER_MARKS if start.startswith(mark)), "utf-8")


def decode_text(data: bytes) -> str:
    """Decode a text file by its byte order mark; without one, as UTF-8. Raises NotTextError."""
    encoding = encoding_of(data)
    try:
        return data.decode(encoding)
    except UnicodeDecodeError as error:
        raise NotTextError(f"the text is not {encoding}: {error}") from error


def text_of(value: Any) -> str:
    """Return a value of a URL list as text; "" if it is missing (None, NaN).

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
    """Return all texts in a row's caption values, in order, and the first value that is not text
    (as an error message), or "".

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
    """Return a class, a style or a licence as text; numbers are converted, other values give ""."""
    if isinstance(value, bool | int) or (isinstance(value, float) and math.isfinite(value)):
        return str(value)
    try:
        return text_of(value)
    except NotTextError:
        return ""


def printable(name: str | os.PathLike[str]) -> str:
    r"""Return a file's name as text: bytes that are not UTF-8 become `\xe9`."""
    return os.fsencode(name).decode("utf-8", "backslashreplace")
