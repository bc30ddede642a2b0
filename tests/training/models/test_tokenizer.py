"""Texts survive the way to ids and back, cut ones still end, and no caption can smuggle a special
token in.
"""

from pathlib import Path

import pytest

from training.models.tokenizer import END, PAD, SPECIAL, START, Tokenizer
from training.sections.tokenizer_section import TokenizerConfig

CAPTIONS = [
    "a red heart",
    "a red apple",
    "flag: France",
    "waving hand & friends",
    "a blue disc on white",
    "a red disc",
] * 4
AWKWARD = [
    "",
    " \n\t ",
    "\U0001f44b\U0001f3fb\u200d\U0001f525",
    "fish &amp;amp; chips &lt;3",
    "x" * 10_000,
    "猫 と 犬、鳥",
    "\0\x7f",
    "e\u0301t\u00e9",
]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.fit(CAPTIONS, TokenizerConfig(vocab_size=300, context=16))


def test_a_text_comes_back_lower_cased(tokenizer: Tokenizer) -> None:
    for text in [*CAPTIONS, "Zebra!", "猫 犬"]:
        row = tokenizer([text])[0].tolist()
        assert row[0] == START and row[-1] == END
        assert tokenizer.engine.decode(row).strip() == text.lower()


def test_merges_are_learnt_and_the_vocabulary_keeps_its_bound(tokenizer: Tokenizer) -> None:
    assert 259 < tokenizer.vocab_size <= 300
    assert tokenizer(["a red heart"]).shape[1] < len("a red heart") + 2


@pytest.mark.parametrize("text", AWKWARD, ids=range(len(AWKWARD)))
def test_an_awkward_text_starts_and_ends_once_within_the_context(
    tokenizer: Tokenizer, text: str
) -> None:
    row = tokenizer([text])[0].tolist()
    assert row[0] == START and row[-1] == END and len(row) <= 16
    assert all(3 <= token < tokenizer.vocab_size for token in row[1:-1])


def test_a_cut_text_fills_the_context_and_still_ends(tokenizer: Tokenizer) -> None:
    row = tokenizer(["q" * 10_000])[0].tolist()
    assert len(row) == 16 and row[-1] == END and row.count(END) == 1


@pytest.mark.parametrize("special", SPECIAL)
def test_a_caption_cannot_smuggle_in_a_special_token(
    tokenizer: Tokenizer, tmp_path: Path, special: str
) -> None:
    tokenizer.save(tmp_path / "tokenizer.json")
    for each in (tokenizer, Tokenizer.load(tmp_path / "tokenizer.json")):
        row = each([f"a {special} b"])[0].tolist()
        assert row[0] == START and row[-1] == END
        assert all(token >= 3 for token in row[1:-1])


def test_html_entities_and_white_space_do_not_matter(tokenizer: Tokenizer) -> None:
    assert tokenizer(["fish &amp;amp;  chips\n"]).tolist() == tokenizer(["fish & chips"]).tolist()


def test_shorter_rows_end_in_padding(tokenizer: Tokenizer) -> None:
    ids = tokenizer(["", "a red heart"])
    assert ids[0].tolist() == [START, END] + [PAD] * (ids.shape[1] - 2)
    assert PAD not in ids[1]
    assert tokenizer([]).shape == (0, 2)


def test_two_fits_and_two_loads_give_the_same_ids(tokenizer: Tokenizer, tmp_path: Path) -> None:
    again = Tokenizer.fit(CAPTIONS, TokenizerConfig(vocab_size=300, context=16))
    tokenizer.save(tmp_path / "tokenizer.json")
    loads = [Tokenizer.load(tmp_path / "tokenizer.json") for _ in range(2)]
    texts = [*CAPTIONS, *AWKWARD]
    for other in (again, *loads):
        assert other.context == 16
        assert other(texts).equal(tokenizer(texts))


@pytest.mark.parametrize("capacity", [0, 1 << 18])
def test_words_looked_up_one_by_one_are_the_engines_own_ids(
    tokenizer: Tokenizer, capacity: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("training.models.tokenizer.REMEMBERED_WORDS", capacity)
    texts = [
        *AWKWARD,
        *CAPTIONS,
        "Σίσυφος ΟΔΟΣ İ ß",
        "a\u0301 \u0301a",
        "\x1c\x1d x",
        "don't 12,5 !?...",
        "y" * 70 + " z",
        *AWKWARD,
    ]
    expected = [
        tokenizer.engine.encode(" ".join(tokenizer.clean(text).split())).ids for text in texts
    ]
    for _ in range(2):  # the second time from memory
        ids = tokenizer(texts)
        assert [row[row != PAD].tolist() for row in ids] == expected
        for text, row in zip(texts, expected, strict=True):
            assert tokenizer([text])[0].tolist() == row
