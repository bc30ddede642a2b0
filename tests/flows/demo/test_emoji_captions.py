"""Captions are what a person would type, true of the picture, and always the same."""

import pytest

from flows.demo.emoji_captions import (
    MAX_PHRASINGS,
    MIN_PHRASINGS,
    build_phrasings,
    clean_name,
    with_article,
)


@pytest.mark.parametrize(
    ("label", "subcategory", "name"),
    [
        ("red heart", "heart", "red heart"),
        ("flag: Côte d’Ivoire", "country-flag", "flag of Côte d'Ivoire"),
        ("flag: Bosnia & Herzegovina", "country-flag", "flag of Bosnia and Herzegovina"),
        ("flag: Myanmar (Burma)", "country-flag", "flag of Myanmar"),
        ("keycap: 5", "keycap", "keycap 5"),
        ("man: beard", "person", "man with a beard"),
        ("woman: curly hair", "person", "woman with curly hair"),
        ("person: bald", "person", "bald person"),
        ("man running: facing right", "person-activity", "man running facing right"),
        ("family: man, woman, girl, girl", "family", "family of a man, a woman and two girls"),
        ("kiss: man, man", "family", "kiss between two men"),
        ("Japanese “secret” button", "alphanum", "Japanese secret button"),
        ("A button (blood type)", "alphanum", "A button"),
        ("warning", "warning", "warning sign"),
        ("no smoking", "warning", "no smoking sign"),
        ("locked", "lock", "closed padlock"),
        ("plus", "math", "plus sign"),
    ],
)
def test_a_label_becomes_a_name_that_people_say(label: str, subcategory: str, name: str) -> None:
    assert clean_name(label, subcategory) == name


@pytest.mark.parametrize(
    "phrase",
    [
        "a red heart",
        "an apple",
        "an hourglass done",
        "a unicorn",
        "a ewe",
        "an x-ray",
        "an SOS button",
        "an NG button",
        "a VS button",
        "a UFO",
        "a one-piece swimsuit",
        "an eye",
        "a bus",
        "a compass",
        "a rhinoceros",
        "an octopus",
        "a cross mark",
        "a glass of milk",
        "a cloud with snow",
        "a person lifting weights",
        "a face holding back tears",
        "an ear of corn",
        "a heart on fire",
        "a mobile phone",
        "the flag of France",
        "the Statue of Liberty",
        "a map of Japan",
        "a Christmas tree",
        "a T-Rex",
    ],
)
def test_a_name_gets_its_article(phrase: str) -> None:
    assert with_article(phrase.partition(" ")[2]) == phrase


@pytest.mark.parametrize(
    "name",
    [
        "grapes",
        "two hearts",
        "bread",
        "people hugging",
        "Santa Claus",
        "Mount Fuji",
        "no bicycles",
        "skis",
        "five o'clock",
    ],
)
def test_a_name_without_article_gets_none(name: str) -> None:
    assert with_article(name) == name


def test_the_clean_name_stands_first_and_there_are_six_to_ten_different_ones() -> None:
    many = build_phrasings(
        "red heart",
        "google",
        ("love", "emotion", "feelings", "romance"),
        "Smileys & Emotion",
        "heart",
        "red",
    )
    bare = build_phrasings("spade")
    for captions in (many, bare):
        assert MIN_PHRASINGS <= len(captions) <= MAX_PHRASINGS
        assert len(set(captions)) == len(captions)
    assert many[:2] == ["red heart", "a red heart"]
    assert {
        "a red heart emoji",
        "an icon of a red heart",
        "a Google style red heart",
        "red heart, smileys and emotion",
    } <= set(many)
    assert "red red" not in " ".join(many)


def test_a_flag_is_asked_for_in_many_ways() -> None:
    captions = build_phrasings(
        "flag of France", "flags", ("FR", "flag"), "Flags", "country-flag", "blue"
    )
    assert {
        "flag of France",
        "the flag of France",
        "the France flag",
        "the national flag of France",
        "a flag",
        "France",
    } <= set(captions)
    assert not any("blue" in caption for caption in captions)
    assert "the national flag of England" not in build_phrasings(
        "flag of England", "flags", (), "Flags", "subdivision-flag"
    )


def test_a_measured_colour_is_said_once_and_of_things_only() -> None:
    assert "a green apple" in build_phrasings(
        "apple", "google", (), "Food & Drink", "food-fruit", "green"
    )
    assert not any(
        "yellow" in caption
        for caption in build_phrasings(
            "man farmer", "google", (), "People & Body", "person-role", "yellow"
        )
    )
    assert not any(
        "blue green" in caption
        for caption in build_phrasings("green book", "google", (), "Objects", "book-paper", "blue")
    )


def test_plain_faces_are_yellow_and_the_others_are_not() -> None:
    assert "a yellow grinning face" in build_phrasings(
        "grinning face", "google", (), "Smileys & Emotion", "face-smiling"
    )
    assert "a yellow smiling face" in build_phrasings(
        "smiling face with halo", "google", (), "Smileys & Emotion", "face-smiling"
    )
    assert not any(
        "yellow" in c
        for c in build_phrasings("nauseated face", "google", (), "Smileys & Emotion", "face-unwell")
    )
    assert "a green nauseated face" in build_phrasings(
        "nauseated face", "google", (), "Smileys & Emotion", "face-unwell", "green"
    )


def test_codes_are_no_keywords() -> None:
    captions = build_phrasings(
        "grinning face",
        "google",
        (":D", "4", "CN", "what", "face", "cheerful"),
        "Smileys & Emotion",
        "face-smiling",
    )
    assert "grinning face, cheerful" in captions
    assert not any(":D" in caption or "what" in caption or "CN" in caption for caption in captions)


def test_a_clock_shows_its_time() -> None:
    assert "a clock showing half past five" in build_phrasings(
        "five-thirty", "google", (), "Travel & Places", "time"
    )
    assert "a clock showing five o'clock" in build_phrasings(
        "five o'clock", "google", (), "Travel & Places", "time"
    )
