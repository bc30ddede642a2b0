"""Unicode names and keywords of emoji, keyed by concept.

A *concept* is an emoji's code points in lower-case hex without the variation selector. All vendors'
drawings of one emoji have one concept, and so one name and one split. Reads an unpacked
emojibase-data package, which holds the labels of CLDR.
"""

import json
import re
import unicodedata
from dataclasses import dataclass
from pathlib import Path

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


@dataclass(frozen=True)
class Label:
    """Name, keywords and groups of one emoji."""

    text: str
    tags: tuple[str, ...]
    category: str
    subcategory: str


def concept_of(code_points: str) -> str:
    """Return the concept of code points joined by `-` or `_`.

    It is in lower case, without leading zeros and without the variation selector.
    """
    parts = code_points.lower().replace("_", "-").split("-")
    return "-".join(part for part in (part.lstrip("0") for part in parts) if part != "fe0f")


def flag_concept(iso_code: str) -> str:
    """Return the concept of the flag of a country (`fr`) or a subdivision (`gb-eng`).

    A country's flag is a pair of regional indicators; a subdivision's is the black flag with tags.
    """
    letters = iso_code.lower().replace("-", "")
    if len(letters) == 2:
        return "-".join(f"{0x1F1E6 + ord(letter) - ord('a'):x}" for letter in letters)
    return "-".join(["1f3f4", *(f"{0xE0000 + ord(letter):x}" for letter in letters), "e007f"])


def slug(text: str) -> str:
    """Return the words of `text` in lower-case ASCII with hyphens, as icon sets name files."""
    ascii_text = (
        unicodedata.normalize("NFKD", text)
        .encode("ascii", "ignore")
        .decode()
        .lower()
        .replace("'", "")
    )
    return re.sub(r"[^a-z0-9]+", "-", ascii_text).strip("-")


class Labels:
    """Labels by concept, and concepts by slug for icon sets that name their files in words."""

    def __init__(self, folder: Path) -> None:
        """Read an unpacked emojibase-data package."""
        english = folder / "en"
        groups = json.loads((folder / "meta" / "groups.json").read_text())
        self.by_concept: dict[str, Label] = {}
        self.by_slug: dict[str, str] = {}
        for entry in json.loads((english / "data.json").read_text()):
            concept = concept_of(entry["hexcode"])
            label = Label(
                text=entry["label"],
                tags=tuple(tag.replace("’", "'") for tag in entry.get("tags") or ()),
                category=CATEGORIES.get(groups["groups"].get(str(entry.get("group")), ""), ""),
                subcategory=groups["subgroups"].get(str(entry.get("subgroup")), ""),
            )
            if not label.category:
                continue  # skin tones, hair pieces and single regional indicators
            self.by_concept[concept] = label
            self.by_slug.setdefault(slug(label.text.replace("’", "")), concept)
        for file in sorted((english / "shortcodes").glob("*.json")):
            for code, names in json.loads(file.read_text()).items():
                concept = concept_of(code)
                if concept in self.by_concept:
                    for name in [names] if isinstance(names, str) else names:
                        self.by_slug.setdefault(slug(name), concept)
