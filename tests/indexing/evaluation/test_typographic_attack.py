"""Words land where they are asked for, and the section tells a CLIP that reads from one that does
not.
"""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from indexing.data.held_out import Pairs, open_embedded, read_pairs
from indexing.evaluation.attack_judges import Witnesses, judge, look_alikes, probabilities
from indexing.evaluation.typographic_attack import (
    HEIGHTS,
    SIZES,
    TypographicConfig,
    choose,
    figure_6,
    fonts,
    frequent_names,
    scrambled,
    typographic,
    ways,
    write_word,
)
from infra.errors import CallerError
from tests.helpers.evaluation_run import (
    colour,
    direction,
    encode_images,
    encode_texts,
    row,
    subject,
    usual_rows,
    write_run,
)
from tests.helpers.stage_folders import shards_in

CONFIG = TypographicConfig(labels=4, pictures=8, varied=6, shown=2, variations=3)
NOBODY = Witnesses()


def measure(folder: Path, images: Any, vary: Any, witnesses: Witnesses = NOBODY) -> Any:
    write_run(folder, usual_rows())
    attacked = subject(folder, images=images)
    pairs = read_pairs(attacked.embedded, "held_out_concept", 100, 0)
    return typographic(CONFIG, attacked, pairs, ("{}",), 10.0, vary, witnesses)


def again(pictures: np.ndarray, count: int, seed: int) -> np.ndarray:
    """Give every picture back as its own variation."""
    return np.repeat(pictures[:, None], count, 1)


def value(table: Any, row: str, column: int) -> float:
    return next(each[column]["value"] for each in table["rows"] if each[0] == row)


@pytest.mark.parametrize(("place", "share"), HEIGHTS.items())
def test_the_word_is_a_black_one_on_a_white_strip_at_its_place(place: str, share: float) -> None:
    grey = np.full((96, 96, 3), 128, np.uint8)
    for font in fonts("").values():
        for size in SIZES.values():
            written = write_word(grey, "house", font, size, share)
            rows = np.flatnonzero((written != 128).any((1, 2)))
            assert len(rows) == np.ptp(rows) + 1 == pytest.approx(1.25 * size * 96, abs=2)
            assert {
                "top": rows[0] == 0,
                "middle": abs(rows.mean() - 47.5) < 1.5,
                "bottom": rows[-1] == 95,
            }[place]
            ink = (written < 64).all(2)
            assert 20 < ink.sum() < 2000 and not ink[:, :2].any() and not ink[:, -2:].any()
    assert (grey == 128).all()


def test_a_font_that_is_none_is_named(tmp_path: Path) -> None:
    with pytest.raises(
        CallerError, match=rf"\[evaluate.typographic\] font = '{tmp_path}/no.ttf' cannot be read"
    ):
        write_word(np.full((32, 32, 3), 128, np.uint8), "house", str(tmp_path / "no.ttf"), 0.2, 0.0)


def test_ways_differ_in_one_thing_from_the_first() -> None:
    first, *others = ways("").values()
    assert [sum(a != b for a, b in zip(first, each, strict=True)) for each in others] == [1] * 5


def test_a_long_word_is_made_to_fit() -> None:
    ink = (
        write_word(np.full((96, 96, 3), 128, np.uint8), "incomprehensibilities", "", 0.27, 0.5) < 64
    ).all(2)
    assert ink.any() and not ink[:, 0].any() and not ink[:, -1].any()


def test_scrambling_keeps_the_letters() -> None:
    rng = np.random.default_rng(0)
    assert (
        sorted(scrambled("house", rng)) == sorted("house")
        and scrambled("house", rng) != "house"
        and scrambled("oo", rng) == "oo"
    )


def test_a_clip_that_only_looks_is_not_moved(tmp_path: Path) -> None:
    def looks(pictures: np.ndarray) -> np.ndarray:
        corner = pictures[:, :, :2].reshape(
            len(pictures), -1, 3
        )  # strips are white, and these pictures' colours are not
        seen = np.array(
            [each[(each < 250).any(1)][len(each[(each < 250).any(1)]) // 2] for each in corner]
        )
        return encode_images(np.broadcast_to(seen[:, None, None], (len(seen), 4, 4, 3)))

    found = measure(tmp_path, looks, again)
    whole, by_way, after = found["tables"]
    assert value(whole, "nothing", 2) == 1.0
    for kind in ("right word", "wrong word", "scrambled word"):
        assert (
            value(whole, kind, 2) == 1.0
            and value(whole, kind, 3) == 0.0
            and value(whole, kind, 4) == 0.0
        )
    assert value(after, "variations, wrong word", 2) == 1.0
    assert [each[1] for each in whole["rows"]] == [8, 8 * 6, 8 * 6, 8 * 6] and len(
        by_way["rows"]
    ) == 6
    assert (tmp_path / "out" / found["pictures"][0]["picture"]).is_file()


def test_a_clip_that_reads_follows_the_word(tmp_path: Path) -> None:
    written: dict[bytes, str] = {}

    def reads(pictures: np.ndarray) -> np.ndarray:
        looked = encode_images(pictures)
        return np.stack(
            [
                encode_texts([written[each.tobytes()]])[0] if each.tobytes() in written else own
                for each, own in zip(pictures, looked, strict=True)
            ]
        )

    import indexing.evaluation.typographic_attack as module

    plain = module.write_word

    def noted(picture: np.ndarray, word: str, *how: Any) -> np.ndarray:
        page = plain(picture, word, *how)
        written[page.tobytes()] = word
        return page

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "write_word", noted)
        found = measure(tmp_path, reads, again)
    whole, by_way, after = found["tables"]
    assert (
        value(whole, "right word", 2) == 1.0
        and value(whole, "wrong word", 3) == 1.0
        and value(whole, "wrong word", 2) == 0.0
    )
    assert value(whole, "scrambled word", 3) < 1.0
    assert (
        value(after, "variations, wrong word", 3) == 1.0
        and value(after, "variations, right word", 2) == 1.0
    )
    assert (
        value(after, "the picture, untouched", 2) == 1.0 == value(after, "variations, untouched", 2)
    )
    assert all(
        each[4:] == [None, None, None] for each in after["rows"]
    ) and "no look-alike" in " ".join(found["text"])
    assert all(each[3]["value"] == 1.0 for each in by_way["rows"])


def test_labels_are_short_names_that_clip_finds(tmp_path: Path) -> None:
    eye = np.eye(4, dtype=np.float32)
    rows = [
        row(number, "plain", "held_out_style", caption=name)
        for number, name in enumerate(("owl", "elephant", "cat", "elephant"))
    ]
    pairs = Pairs(
        rows, eye[[0, 1, 0, 3]], eye[[0, 1, 2, 1]]
    )  # the cat's picture looks like an owl, the second elephant like nothing
    assert frequent_names(pairs, 2) == (["owl", "elephant"], 2, 3)
    assert frequent_names(pairs, 9)[0] == ["owl", "elephant", "cat"]


def test_pictures_that_are_named_rightly_come_first(tmp_path: Path) -> None:
    write_run(tmp_path, usual_rows())
    pairs = read_pairs(open_embedded(tmp_path / "embed"), "held_out_concept", 100, 0)
    names = ["colour 12", "colour 13"]
    classes = encode_texts(names) * np.array([[1], [-1]], np.float32)  # 13 is never recognised
    picked, labels, share = choose(pairs, classes, names, 3, 0)
    assert [pairs.rows[place]["caption"] for place in picked] == [names[label] for label in labels]
    assert labels[:2].tolist() == [0, 0] and share == 0.5


def mean_colour(pictures: np.ndarray) -> np.ndarray:
    """Features of a network that was told nothing: what colour most of the picture has."""
    return np.median(pictures.reshape(len(pictures), -1, 3), axis=1)


def test_variations_are_judged_by_others_than_the_clip_that_was_attacked(tmp_path: Path) -> None:
    """A CLIP that sees one thing everywhere says nothing; the look-alike and the reader tell
    objects from words.
    """
    blind = lambda pictures: np.tile(direction(12), (len(pictures), 1))  # noqa: E731

    def objects(pictures: np.ndarray, count: int, seed: int) -> np.ndarray:
        """Draw the picture's colour, from below the strip, alone."""
        flat = np.median(pictures[:, 60:80].reshape(len(pictures), -1, 3), axis=1).astype(np.uint8)
        return np.broadcast_to(flat[:, None, None, None], (len(pictures), count, 16, 16, 3)).copy()

    found = measure(
        tmp_path, blind, objects, Witnesses("mean colour", mean_colour, lambda picture: "")
    )
    after = {each[0]: each for each in found["tables"][2]["rows"]}
    assert list(after) == [
        f"{what}, {kind}"
        for kind in ("untouched", "right word", "wrong word")
        for what in ("the picture", "variations")
    ]
    assert [each[1] for each in after.values()] == [6, 18] * 3
    for each in after.values():
        assert (
            each[4]["value"] == 1.0 and each[5]["value"] == 0.0 and each[6]["value"] == 0.0
        )  # the object it is; nothing is read
        assert each[2]["value"] < 1.0
    assert "mean colour" in " ".join(found["text"])

    embedded = open_embedded(tmp_path / "embed")
    names = [f"colour {number}" for number in range(12, 16)]
    looks, count = look_alikes(
        Witnesses("", mean_colour), embedded, names, set(), shards_in(tmp_path), 20, 0
    )
    pictures = [np.full((20, 20, 3), colour(number), np.uint8) for number in (13, 15, 12)]
    assert looks is not None and looks(pictures).tolist() == [1, 3, 0]
    assert count == sum(each["number"] >= 12 for each in usual_rows())
    read = judge(
        np.stack(pictures),
        ["colour 13"] * 3,
        np.zeros(3, np.int64),
        None,
        lambda picture: "Colour-13" if picture[0, 0, 0] == colour(13)[0] else "x",
    ).read
    assert read is not None and read.tolist() == [1.0, 0.0, 0.0]


def test_an_attacked_picture_is_not_its_own_look_alike(tmp_path: Path) -> None:
    rows = [
        row(12, "plain", "held_out_concept"),
        row(13, "plain", "held_out_concept"),
        row(12, "framed", "train", caption="colour 13"),
    ]
    write_run(tmp_path, [*rows, row(14, "plain", "train", caption="colour 12")])
    embedded = open_embedded(tmp_path / "embed")
    attacked = {rows[0]["key"], rows[1]["key"]}
    looks, count = look_alikes(
        Witnesses("", mean_colour),
        embedded,
        ["colour 12", "colour 13"],
        attacked,
        shards_in(tmp_path),
        20,
        0,
    )
    assert looks is not None and count == 2
    assert looks([np.full((20, 20, 3), colour(12), np.uint8)]).tolist() == [
        1
    ]  # the one that is left looks so, and has another name
    assert look_alikes(
        Witnesses("", mean_colour),
        embedded,
        ["colour 12", "none"],
        attacked,
        shards_in(tmp_path),
        20,
        0,
    ) == (None, 1)


def test_every_variation_shows_its_probabilities() -> None:
    found = probabilities(np.array([[0.9, 0.1], [0.2, 0.2]], np.float32), 10.0)
    assert found == pytest.approx(
        np.array([[1 / (1 + np.exp(-8)), 1 / (1 + np.exp(8))], [0.5, 0.5]])
    )
    grey = np.full((2, 96, 96, 3), 128, np.uint8)
    varied, ones = np.full((2, 3, 16, 16, 3), 128, np.uint8), np.ones((2, 3, 2), np.float32)
    page = figure_6(grey, found, ["house", "cat"], varied, ones * [0.75, 0.25])
    other = figure_6(grey, found, ["house", "cat"], varied, ones * [0.25, 0.75])
    differs = (page != other).any(2)
    left = 8 + 136 + 16  # gap, a column, the space between attacked pictures and their variations
    assert not differs[:, :left].any() and all(
        differs[:, left + 136 * place : left + 136 * (place + 1)].any() for place in range(3)
    )


def test_no_held_out_names_are_said(tmp_path: Path) -> None:
    write_run(tmp_path, [each for each in usual_rows() if each["split"] == "train"])
    pairs = read_pairs(subject(tmp_path).embedded, "held_out_concept", 100, 0)
    found = typographic(CONFIG, subject(tmp_path), pairs, ("{}",), 10.0, again, NOBODY)
    assert "Not measured" in found["text"][0] and not found["tables"]
