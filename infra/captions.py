"""Cleaning of captions and of the texts that are compared with them: queries and prompts.

A query that is cleaned otherwise than the captions were finds unrelated pictures.
"""

import re
import unicodedata

JOINERS = "\u200c\u200d"
"""Zero-width (non-)joiners, which Persian, Indic scripts and emoji sequences need."""


def clean_caption(caption: str, max_chars: int | None = None) -> str:
    """Return a caption in Unicode's NFC, single-spaced, without control characters, invisible
    format characters and lone surrogates.

    A caption longer than `max_chars` is cut at a word. JOINERS stay.
    """
    text = "".join(printable(character) for character in unicodedata.normalize("NFC", caption))
    text = " ".join(text.split())
    if max_chars is not None and len(text) > max_chars:
        text = re.sub(r"\s+\S*$", "", text[: max_chars + 1])[:max_chars]
    return text


def printable(character: str) -> str:
    """Return a character as captions keep it: a space for white space and controls, nothing for
    invisible characters.
    """
    kind = unicodedata.category(character)
    if kind in ("Cc", "Zl", "Zp", "Zs"):
        return " "
    return "" if kind in ("Cf", "Cs") and character not in JOINERS else character
