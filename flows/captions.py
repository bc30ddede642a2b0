"""Captions for pictures that come with a name: several phrasings that a person would type, the clean name first.

Names and keywords of emoji are Unicode's own (CLDR, by way of the package emojibase-data), keyed by *concept*: the code points in
lower-case hex without the variation selector, so that every vendor's drawing of one emoji shares one concept and one name.
"""

import json
import re
import unicodedata
from dataclasses import dataclass
from pathlib import Path

MAX_PHRASINGS = 10

CATEGORIES = {
    "smileys-emotion": "Smileys & Emotion",
    "people-body": "People & Body",
    "animals-nature": "Animals & Nature",
    "food-drink": "Food & Drink",
    "travel-places": "Travel & Places",
    "activities": "Activities",
    "objects": "Objects",
    "symbols": "Symbols",
    "flags": "Flags",
}

STYLE_PHRASES = {
    "google": "a Google style {}",
    "twitter": "a Twitter style {}",
    "fluent-3d": "a 3D render of {a}",
    "fluent-flat": "a flat drawing of {a}",
    "noto-v1": "an old Google style {}",
    "emojione": "an EmojiOne style {}",
    "emojione-v1": "an old EmojiOne style {}",
    "openmoji": "a drawing of {a} with black outlines",
    "game-icons": "a black and white silhouette of {a}",
    "lucide": "a black line icon of {a}",
    "streamline": "a freehand sketch of {a}",
    "flags": "a flat rectangular {}",
}

# What the members of a subcategory are, where that can be said of all of them.
KINDS = {
    "animal-bird": "a bird",
    "animal-bug": "a small creature",
    "animal-mammal": "an animal",
    "animal-marine": "a sea creature",
    "animal-reptile": "a reptile",
    "cat-face": "a cat",
    "clothing": "clothing",
    "dishware": "tableware",
    "drink": "a drink",
    "food-asian": "Asian food",
    "food-fruit": "a fruit",
    "food-prepared": "a meal",
    "food-sweet": "a sweet",
    "food-vegetable": "a vegetable",
    "geometric": "a shape",
    "hand-fingers-closed": "a hand",
    "hand-fingers-open": "a hand",
    "hand-fingers-partial": "a hand",
    "hand-single-finger": "a hand",
    "lock": "a lock",
    "mail": "mail",
    "monkey-face": "a monkey",
    "musical-instrument": "a musical instrument",
    "person-role": "a person",
    "person-sport": "a person doing sport",
    "place-building": "a building",
    "place-religious": "a religious building",
    "plant-flower": "a flower",
    "time": "time",
    "tool": "a tool",
    "transport-air": "air transport",
    "transport-ground": "transport",
    "transport-water": "water transport",
    "zodiac": "a zodiac sign",
}

UNCOUNTED = frozenset(
    "bread broccoli butter clothing corn fire fog garlic ginger ice lightning luggage mail money music okra poop popcorn "
    "rice salt sake seafood snow spaghetti sushi tempura thread toast wind wood yarn medicine hot_springs".split()
)


@dataclass(frozen=True)
class Label:
    """What Unicode says about one emoji."""

    text: str
    tags: tuple[str, ...]
    category: str
    subcategory: str


def concept_of(code_points: str) -> str:
    """Return the concept id of code points written `1F1EB-FE0F-…`: lower case, no leading zeros, no variation selector."""
    return "-".join(part for part in (p.lstrip("0") for p in code_points.lower().split("-")) if part != "fe0f")


def flag_concept(iso_code: str) -> str:
    """Return the concept of a country's flag: its regional-indicator pair; a subdivision's (`gb-eng`) is the black flag with tags."""
    letters = iso_code.lower().replace("-", "")
    if len(letters) == 2:
        return "-".join(f"{0x1F1E6 + ord(letter) - ord('a'):x}" for letter in letters)
    return "-".join(["1f3f4", *(f"{0xE0000 + ord(letter):x}" for letter in letters), "e007f"])


def slug(text: str) -> str:
    """Return `text` as words joined by hyphens, ASCII and lower case: the form that icon sets use for file names."""
    ascii_text = unicodedata.normalize("NFKD", text).encode("ascii", "ignore").decode().lower().replace("'", "")
    return re.sub(r"[^a-z0-9]+", "-", ascii_text).strip("-")


class Labels:
    """Labels by concept, and concepts by slug for sets that name their files in words."""

    def __init__(self, folder: Path) -> None:
        """Read an unpacked emojibase-data package."""
        english = folder / "en"
        groups = json.loads((folder / "meta" / "groups.json").read_text())
        self.by_concept: dict[str, Label] = {}
        self.by_slug: dict[str, str] = {}
        for entry in json.loads((english / "data.json").read_text()):
            concept = concept_of(entry["hexcode"])
            group = groups["groups"].get(str(entry.get("group")), "")
            label = Label(
                text=entry["label"].replace("’", "'"),
                tags=tuple(tag.replace("’", "'") for tag in entry.get("tags") or ()),
                category=CATEGORIES.get(group, ""),
                subcategory=groups["subgroups"].get(str(entry.get("subgroup")), ""),
            )
            if not label.category:
                continue  # skin tones, hair pieces and single regional indicators are no pictures of something
            self.by_concept[concept] = label
            self.by_slug.setdefault(slug(label.text), concept)
        for file in sorted((english / "shortcodes").glob("*.json")):
            for code, names in json.loads(file.read_text()).items():
                concept = concept_of(code)
                if concept in self.by_concept:
                    for name in [names] if isinstance(names, str) else names:
                        self.by_slug.setdefault(slug(name), concept)


def clean_name(label: str) -> str:
    """Turn a CLDR label into what a person would say: `flag: France` to `flag of France`, `man: beard` to `man with beard`."""
    text = re.sub(r"[“”]", "", label)
    text = re.sub(r"\s*\(.*?\)", "", text).replace(" & ", " and ")
    head, colon, tail = text.partition(": ")
    if not colon:
        return text
    if head == "flag":
        return f"flag of {tail}"
    if head == "keycap":
        return f"keycap {tail}"
    if head in ("family", "kiss", "couple with heart"):
        *first, last = tail.split(", ")
        return f"{head}, {', '.join(first)} and {last}" if first else f"{head}, {last}"
    if tail == "bald":
        return f"bald {head}"
    if tail == "facing right":
        return f"{head} facing right"
    return f"{head} with {'a ' if tail == 'beard' else ''}{tail}"


def with_article(name: str) -> str:
    """Put `a`, `an`, `the` or nothing before a name, whichever English asks for."""
    first, last = name.split()[0], name.split()[-1]
    head = re.split(r" (?:with|of|in|on|behind|and|showing|from|without) ", name)[0].split()[-1]
    if name.startswith("flag of "):
        return f"the {name}"
    if first.lower() in ("no", "two", "three", "person's", "the") or last in UNCOUNTED:
        return name
    if head.endswith("s") and not head.endswith(("ss", "us", "is")) and head not in ("bus", "cross", "compass", "swiss"):
        return name
    if head in ("people", "men", "women", "hands", "feet", "teeth"):
        return name
    vowel = first[0].lower() in "aeiou" and not re.match(r"(?:uni|eu|one\b|ewe|use|ufo)", first.lower())
    spelt = first.isupper() and len(first) <= 3 and first[0] in "AEFHILMNORSX"
    return f"{'an' if vowel or spelt else 'a'} {name}"


def phrasings(name: str, style: str, tags: tuple[str, ...] = (), category: str = "", subcategory: str = "") -> list[str]:
    """Return 6 to 10 captions, the clean name first; the same input always gives the same list."""
    article = with_article(name)
    found = [name, article]
    if name.startswith("flag of "):
        country = name.removeprefix("flag of ")
        found += [f"the {country} flag", f"the national flag of {country}", f"a flag of {country}", "a flag", country]
    elif re.match(r"keycap \d+$", name):
        found += [f"the number {name.split()[1]}", f"the digit {name.split()[1]} on a key"]
    elif subcategory == "time" and "o'clock" in name:
        found += [f"a clock showing {name}", "a clock"]
    elif subcategory == "time" and name.endswith("-thirty"):
        found += [f"a clock showing half past {name.removesuffix('-thirty')}", "a clock"]
    elif is_yellow_face(name, subcategory):
        found += [f"a yellow {name}", "a yellow face", f"a {name} smiley" if "smiling" in name else f"a {name} emoticon"]
    found += [f"{article} emoji" if category else f"{article} symbol", f"an icon of {article}", f"a picture of {article}"]
    if style in STYLE_PHRASES:
        found.append(STYLE_PHRASES[style].format(name, a=article))
    words = [tag for tag in tags if is_word(tag) and tag.lower() not in name.lower()]
    if words:
        found.append(f"{name}, {', '.join(words[:2])}")
    if len(words) > 3:
        found.append(f"{name}, {', '.join(words[2:4])}")
    kind = KINDS.get(subcategory)
    if kind and kind.split()[-1] not in name:
        found.append(f"{article}, {kind}")
    if category and len(found) < MAX_PHRASINGS:
        found.append(f"{name}, {category.lower().replace('&', 'and')}")
    for filler in (f"one {name}", f"a small picture of {article}", f"a drawing of {article}"):
        if len(found) < 6:
            found.append(filler)
    return list(dict.fromkeys(found))[:MAX_PHRASINGS]


def is_word(tag: str) -> bool:
    """Whether a keyword reads as a word and not as a code (`CN`, `:D`, `4`)."""
    return bool(re.fullmatch(r"[a-z][a-z' -]{2,24}", tag))


# Vendors agree on these colours; every other face of the subcategories below is yellow.
NOT_YELLOW = (
    "nauseated",
    "hot face",
    "cold face",
    "enraged",
    "symbols on mouth",
    "horns",
    "angry",
    "vomiting",
    "exploding",
    "clouds",
    "dotted",
)
YELLOW_FACES = (
    "face-smiling face-affection face-tongue face-hand face-neutral-skeptical face-sleepy face-unwell face-hat face-glasses face-concerned"
).split()


def is_yellow_face(name: str, subcategory: str) -> bool:
    """Whether an emoji is one of the plain yellow faces."""
    return subcategory in YELLOW_FACES and "face" in name and not any(word in name for word in NOT_YELLOW)
