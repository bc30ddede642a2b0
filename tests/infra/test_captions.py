"""Captions, queries and prompts are cleaned alike."""

import pytest

from flows.cli.generate import spoken
from infra.captions import clean_caption
from infra.errors import CallerError


@pytest.mark.parametrize(
    ("caption", "max_chars", "cleaned"),
    [
        ("  a  red\theart \n", 20, "a red heart"),
        ("a red heart", 11, "a red heart"),
        ("cafe\u0301", 20, "café"),
        ("a\x00b\x1b[31mc", 20, "a b [31mc"),
        ("left\u202eright\u200bjoined\ufeff", 20, "leftrightjoined"),
        ("می\u200cخواهم", 20, "می\u200cخواهم"),
        ("one two three four", 10, "one two"),
        ("abcdefghijklmnop", 10, "abcdefghij"),
        ("\u2028 \u00a0", 20, ""),
    ],
)
def test_captions_are_cleaned_and_cut_at_a_word(caption: str, max_chars: int, cleaned: str) -> None:
    assert clean_caption(caption, max_chars) == cleaned


@pytest.mark.parametrize("invisible", ["\u200b", "\u00ad", "\u200e", "\ufeff", "\ud800", "\x07"])
def test_prompts_are_cleaned_as_captions_are(invisible: str) -> None:
    assert spoken("generate", f"{invisible}a red{invisible}  heart") == clean_caption(
        f"a red{invisible} heart"
    )
    with pytest.raises(CallerError, match="generate: the text is empty"):
        spoken("generate", f" {invisible} ")
