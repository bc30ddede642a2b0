"""Each family of packages yields its drawings with the right concept, name, licence and pixels."""

from pathlib import Path

import cv2
import pytest

from flows.demo.emoji_labels import Labels
from flows.demo.emoji_packages import FAMILIES, Picture, read_package
from infra.errors import CallerError
from tests.helpers.npm_packages import PACKAGES, WORDS


def read(spec: str, tmp_path: Path) -> dict[str, Picture]:
    """Return a package's pictures by origin."""
    for each in (WORDS, spec):
        PACKAGES[each](tmp_path / each)
    pictures = read_package(
        spec, tmp_path / spec, Labels(tmp_path / WORDS), tmp_path / "rendered", 96
    )
    assert len({picture.origin for picture in pictures}) == len(pictures)
    return {picture.origin: picture for picture in pictures}


def test_google(tmp_path: Path) -> None:
    found = read("emoji-datasource-google@16.0.0", tmp_path)
    assert len(found) == 5
    heart = found["img/google/64/2764-fe0f.png"]
    assert (heart.concept, heart.style, heart.licence) == ("2764", "google", "Apache-2.0")
    assert (heart.captions[0], heart.category, heart.subcategory) == (
        "red heart",
        "Smileys & Emotion",
        "heart",
    )
    assert heart.file.is_file()


def test_fluent_3d_without_skin_tones(tmp_path: Path) -> None:
    found = read("@lobehub/fluent-emoji-3d@1.1.0", tmp_path)
    assert set(found) == {"assets/2764-fe0f.webp", "assets/1f34e.webp", "assets/1f44b.webp"}
    assert found["assets/1f34e.webp"].captions[0] == "red apple"


def test_fluent_flat_is_rendered_and_what_does_not_render_stays_missing(tmp_path: Path) -> None:
    found = read("@iconify-json/fluent-emoji-flat@1.2.6", tmp_path)
    assert set(found) == {
        f"icons.json#{name}" for name in ("red-heart", "red-apple", "waving-hand", "broken")
    }
    apple = found["icons.json#red-apple"]
    assert cv2.imread(str(apple.file), cv2.IMREAD_UNCHANGED).shape == (96, 96, 4)
    broken = found["icons.json#broken"]
    assert not broken.file.exists() and broken.problem and broken.problem[0] == "svg_invalid"


def test_sets_without_code_points_are_found_by_name_and_unknown_ones_left_out(
    tmp_path: Path,
) -> None:
    found = read("@iconify-json/emojione@1.2.3", tmp_path)
    assert {picture.origin: picture.concept for picture in found.values()} == {
        "icons.json#red-heart": "2764",
        "icons.json#apple": "1f34e",
    }


def test_other_icons_are_named_by_themselves_and_share_an_emojis_concept(tmp_path: Path) -> None:
    found = read("@iconify-json/game-icons@1.2.4", tmp_path)
    assert found["icons.json#heart"].concept == "2764"
    assert (found["icons.json#battle-axe"].concept, found["icons.json#battle-axe"].captions[0]) == (
        "battle-axe",
        "battle axe",
    )
    assert found["icons.json#castle-2"].captions[0] == "castle"


def test_openmoji_with_its_extras_but_no_brands_and_skin_tones(tmp_path: Path) -> None:
    found = read("openmoji@17.0.0", tmp_path)
    assert set(found) == {"color/svg/2764.svg", "color/svg/E000.svg"}
    goldfish = found["color/svg/E000.svg"]
    assert goldfish.captions[0] == "goldfish"
    assert goldfish.licence == "CC-BY-SA-4.0"


def test_flags_share_the_concept_of_the_flag_emoji(tmp_path: Path) -> None:
    found = read("svg-country-flags@1.2.10", tmp_path)
    assert set(found) == {"png250px/fr.png", "png250px/an.png"}
    assert found["png250px/fr.png"].concept == "1f1eb-1f1f7"
    assert found["png250px/an.png"].captions[0] == "flag of Netherlands Antilles"
    assert {picture.category for picture in found.values()} == {"Flags"}


def test_lucide(tmp_path: Path) -> None:
    found = read("lucide-static@1.62.0", tmp_path)
    assert found["icons/axe.svg"].captions[0] == "axe"
    assert "axe, hatchet, weapon" in found["icons/axe.svg"].captions
    assert found["icons/apple.svg"].concept == "1f34e"


def test_a_second_reading_renders_nothing_and_says_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = "openmoji@17.0.0"
    first = read(spec, tmp_path)
    monkeypatch.setattr("flows.demo.emoji_packages.BoundedProcesses.call", None)
    again = read_package(spec, tmp_path / spec, Labels(tmp_path / WORDS), tmp_path / "rendered", 96)
    assert again == list(first.values())


def test_a_package_without_a_reader_is_named_with_the_known_ones(tmp_path: Path) -> None:
    PACKAGES[WORDS](tmp_path / "words")
    with pytest.raises(CallerError, match=r"left-pad.*openmoji"):
        read_package("left-pad@1.0.0", tmp_path, Labels(tmp_path / "words"), tmp_path, 96)


def test_every_family_names_a_licence() -> None:
    assert all(family.licence and family.style for family in FAMILIES.values())
    assert len({family.style for family in FAMILIES.values()}) == len(FAMILIES)
