"""Words land where they are asked for, and the section tells a CLIP that reads from one that does not."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from indexing.held_out import open_embedded, read_pairs
from indexing.typographic import PLACES, SIZES, TypographicConfig, choose, fonts, scrambled, typographic, ways, write_word
from tests.pictured import encode_images, encode_texts, usual_rows, write_run

CONFIG = TypographicConfig(labels=4, pictures=8, shown=2, variations=3)


def measure(folder: Path, images: Any, vary: Any) -> Any:
    write_run(folder, usual_rows())
    pairs = read_pairs(open_embedded(folder / "embed"), "held_out_concept", 100, 0)
    return typographic(CONFIG, pairs, ("{}",), folder / "shards", encode_texts, images, 10.0, vary, 200, 0, folder / "out")


def again(pictures: np.ndarray, count: int, seed: int) -> np.ndarray:
    """Give every picture back as its own variation."""
    return np.repeat(pictures[:, None], count, 1)


def value(table: Any, row: str, column: int) -> float:
    return next(each[column]["value"] for each in table["rows"] if each[0] == row)


@pytest.mark.parametrize(("place", "share"), PLACES.items())
def test_the_word_is_a_black_one_on_a_white_strip_at_its_place(place: str, share: float) -> None:
    grey = np.full((96, 96, 3), 128, np.uint8)
    for font in fonts("").values():
        for size in SIZES.values():
            written = write_word(grey, "house", font, size, share)
            rows = np.flatnonzero((written != 128).any((1, 2)))
            assert len(rows) == np.ptp(rows) + 1 == pytest.approx(1.25 * size * 96, abs=2)
            assert {"top": rows[0] == 0, "middle": abs(rows.mean() - 47.5) < 1.5, "bottom": rows[-1] == 95}[place]
            ink = (written < 64).all(2)
            assert 20 < ink.sum() < 2000 and not ink[:, :2].any() and not ink[:, -2:].any()
    assert (grey == 128).all()


def test_ways_differ_in_one_thing_from_the_first() -> None:
    first, *others = ways("").values()
    assert [sum(a != b for a, b in zip(first, each, strict=True)) for each in others] == [1] * 5


def test_a_long_word_is_made_to_fit() -> None:
    ink = (write_word(np.full((96, 96, 3), 128, np.uint8), "incomprehensibilities", "", 0.27, 0.5) < 64).all(2)
    assert ink.any() and not ink[:, 0].any() and not ink[:, -1].any()


def test_scrambling_keeps_the_letters() -> None:
    rng = np.random.default_rng(0)
    assert sorted(scrambled("house", rng)) == sorted("house") and scrambled("house", rng) != "house" and scrambled("oo", rng) == "oo"


def test_a_clip_that_only_looks_is_not_moved(tmp_path: Path) -> None:
    def looks(pictures: np.ndarray) -> np.ndarray:
        corner = pictures[:, :, :2].reshape(len(pictures), -1, 3)  # strips are white, and these pictures' colours are not
        seen = np.array([each[(each < 250).any(1)][len(each[(each < 250).any(1)]) // 2] for each in corner])
        return encode_images(np.broadcast_to(seen[:, None, None], (len(seen), 4, 4, 3)))

    found = measure(tmp_path, looks, again)
    whole, by_way, after = found["tables"]
    assert value(whole, "nothing", 2) == 1.0
    for kind in ("right word", "wrong word", "scrambled word"):
        assert value(whole, kind, 2) == 1.0 and value(whole, kind, 3) == 0.0 and value(whole, kind, 4) == 0.0
    assert value(after, "wrong word", 2) == 1.0
    assert [each[1] for each in whole["rows"]] == [8, 8 * 6, 8 * 6, 8 * 6] and len(by_way["rows"]) == 6
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

    import indexing.typographic as module

    plain = module.write_word

    def noted(picture: np.ndarray, word: str, *how: Any) -> np.ndarray:
        page = plain(picture, word, *how)
        written[page.tobytes()] = word
        return page

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "write_word", noted)
        found = measure(tmp_path, reads, again)
    whole, by_way, after = found["tables"]
    assert value(whole, "right word", 2) == 1.0 and value(whole, "wrong word", 3) == 1.0 and value(whole, "wrong word", 2) == 0.0
    assert value(whole, "scrambled word", 3) < 1.0
    assert value(after, "wrong word", 3) == 1.0 and value(after, "right word", 2) == 1.0
    assert all(each[3]["value"] == 1.0 for each in by_way["rows"])


def test_pictures_that_are_named_rightly_come_first(tmp_path: Path) -> None:
    write_run(tmp_path, usual_rows())
    pairs = read_pairs(open_embedded(tmp_path / "embed"), "held_out_concept", 100, 0)
    names = ["colour 12", "colour 13"]
    classes = encode_texts(names) * np.array([[1], [-1]], np.float32)  # 13 is never recognised
    picked, labels, share = choose(pairs, classes, names, 3, 0)
    assert [pairs.rows[place]["caption"] for place in picked] == [names[label] for label in labels]
    assert labels[:2].tolist() == [0, 0] and share == 0.5


def test_no_held_out_names_are_said(tmp_path: Path) -> None:
    write_run(tmp_path, [each for each in usual_rows() if each["split"] == "train"])
    pairs = read_pairs(open_embedded(tmp_path / "embed"), "held_out_concept", 100, 0)
    found = typographic(CONFIG, pairs, ("{}",), tmp_path, encode_texts, encode_images, 10.0, again, 200, 0, tmp_path)
    assert "Not measured" in found["text"][0] and not found["tables"]
