"""Small packages of the layouts that `flows/demo/emoji_packages.py` reads, made on the spot, and a
fake npm that hands them out.
"""

import json
import os
import stat
import tarfile
from pathlib import Path

import cv2
import numpy as np
import pytest

WORDS = "emojibase-data@17.0.0"
SVG = '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 32 16"><rect width="32" height="16" fill="{}"/></svg>'  # noqa: E501

# concept code points, label, tags, group, subgroup
EMOJI = [
    ("2764-FE0F", "red heart", ["love"], 0, 10),
    ("1F34E", "red apple", ["fruit", "health"], 4, 43),
    ("1F1EB-1F1F7", "flag: France", ["FR", "flag"], 9, 98),
    ("1F44B", "waving hand", ["hello"], 1, 15),
    ("0023-FE0F-20E3", "keycap: #", ["keycap"], 8, 94),
]
SUBGROUPS = {
    "10": "heart",
    "43": "food-fruit",
    "98": "country-flag",
    "15": "hand-fingers-open",
    "94": "keycap",
}
GROUPS = {
    "0": "smileys-emotion",
    "1": "people-body",
    "4": "food-drink",
    "8": "symbols",
    "9": "flags",
    "2": "component",
}


def drawing(number: int, side: int = 64) -> np.ndarray:
    """Return a transparent picture with one coloured disc, (side, side, 4) uint8."""
    image = np.zeros((side, side, 4), np.uint8)
    colour = (number * 41 % 200, number * 67 % 200, number * 97 % 200, 255)
    cv2.circle(image, (side // 2, side // 2), side // 4 + number % 7, colour, -1)
    return image


def write_words(folder: Path) -> None:
    (folder / "en" / "shortcodes").mkdir(parents=True)
    (folder / "meta").mkdir()
    (folder / "meta" / "groups.json").write_text(
        json.dumps({"groups": GROUPS, "subgroups": SUBGROUPS})
    )
    entries = [
        dict(zip(("hexcode", "label", "tags", "group", "subgroup"), entry, strict=True))
        for entry in EMOJI
    ]
    entries.append({"hexcode": "1F1E6", "label": "regional indicator A"})
    (folder / "en" / "data.json").write_text(json.dumps(entries))
    (folder / "en" / "shortcodes" / "joypixels.json").write_text(
        json.dumps({"2764": ["heart", "heavy-heart"], "1F34E": "apple"})
    )


def write_google(folder: Path) -> None:
    pictures = folder / "img" / "google" / "64"
    pictures.mkdir(parents=True)
    entries = []
    for number, (code, label, *_) in enumerate(EMOJI):
        image = f"{code.lower()}.png"
        cv2.imwrite(str(pictures / image), drawing(number))
        entries.append(
            {"name": label.upper(), "unified": code, "image": image, "category": "Symbols"}
        )
    cv2.imwrite(
        str(pictures / "1f44b-1f3fb.png"), drawing(99)
    )  # a skin tone that only a folder listing would find
    entries.append(
        {
            "name": "FITZPATRICK",
            "unified": "1F3FB",
            "image": "1f44b-1f3fb.png",
            "category": "Component",
        }
    )
    (folder / "emoji.json").write_text(json.dumps(entries))


def write_fluent_3d(folder: Path) -> None:
    (folder / "assets").mkdir(parents=True)
    for number, code in enumerate(["2764-fe0f", "1f34e", "1f44b", "1f44b-1f3fb", "1f9ff-1f9ff"]):
        cv2.imwrite(str(folder / "assets" / f"{code}.webp"), drawing(number + 20, 256))


def write_fluent_flat(folder: Path) -> None:
    folder.mkdir(parents=True)
    bodies = {
        "red-heart": "red",
        "red-apple": "green",
        "waving-hand": "blue",
        "waving-hand-light": "pink",
        "no-emoji": "black",
    }
    icons = {
        name: {"body": f'<rect x="4" y="4" width="24" height="24" fill="{colour}"/>'}
        for name, colour in bodies.items()
    }
    icons["broken"] = {"body": "<rect"}
    chars = {
        "2764": "red-heart",
        "1f34e": "red-apple",
        "1f44b": "waving-hand",
        "1f44b-1f3fb": "waving-hand-light",
        "1f1eb-1f1f7": "broken",
    }
    (folder / "icons.json").write_text(json.dumps({"width": 32, "height": 32, "icons": icons}))
    (folder / "chars.json").write_text(json.dumps(chars))


def write_emojione(folder: Path) -> None:
    folder.mkdir(parents=True)
    icons = {
        name: {"body": '<circle cx="32" cy="32" r="20"/>'}
        for name in ("red-heart", "apple", "flag-for-france", "unknown-thing")
    }
    (folder / "icons.json").write_text(json.dumps({"width": 64, "height": 64, "icons": icons}))
    (folder / "chars.json").write_text("{}")


def write_game_icons(folder: Path) -> None:
    folder.mkdir(parents=True)
    icons = {
        name: {"body": '<circle cx="256" cy="256" r="200"/>'}
        for name in ("heart", "battle-axe", "castle-2")
    }
    (folder / "icons.json").write_text(json.dumps({"width": 512, "height": 512, "icons": icons}))
    (folder / "chars.json").write_text("{}")


def write_openmoji(folder: Path) -> None:
    (folder / "color" / "svg").mkdir(parents=True)
    (folder / "data").mkdir()
    entries = []
    for code, annotation, group, subgroup, skintone in (
        ("2764", "red heart", "smileys-emotion", "heart", ""),
        ("1F44B-1F3FB", "waving hand: light skin tone", "people-body", "hand-fingers-open", "1"),
        ("E000", "goldfish", "extras-openmoji", "animals-nature", ""),
        ("E053", "Chromium", "extras-openmoji", "brand", ""),
    ):
        (folder / "color" / "svg" / f"{code}.svg").write_text(SVG.format("tomato"))
        entries.append(
            {
                "hexcode": code,
                "annotation": annotation,
                "group": group,
                "subgroups": subgroup,
                "skintone": skintone,
                "tags": "a, fish",
                "openmoji_tags": "pet",
            }
        )
    (folder / "data" / "openmoji.json").write_text(json.dumps(entries))


def write_flags(folder: Path) -> None:
    (folder / "png250px").mkdir(parents=True)
    (folder / "countries.json").write_text(
        json.dumps({"FR": "France", "AN": "Netherlands Antilles"})
    )
    for number, code in enumerate(("fr", "an", "zz")):
        cv2.imwrite(
            str(folder / "png250px" / f"{code}.png"),
            np.full((100, 250, 3), (number * 60, 200, 90), np.uint8),
        )


def write_lucide(folder: Path) -> None:
    (folder / "icons").mkdir(parents=True)
    (folder / "icons" / "axe.svg").write_text(SVG.format("black"))
    (folder / "icons" / "apple.svg").write_text(SVG.format("black"))
    (folder / "tags.json").write_text(
        json.dumps({"axe": ["hatchet", "weapon"], "apple": ["fruit"]})
    )


PACKAGES = {
    WORDS: write_words,
    "emoji-datasource-google@16.0.0": write_google,
    "@lobehub/fluent-emoji-3d@1.1.0": write_fluent_3d,
    "@iconify-json/fluent-emoji-flat@1.2.6": write_fluent_flat,
    "@iconify-json/emojione@1.2.3": write_emojione,
    "@iconify-json/game-icons@1.2.4": write_game_icons,
    "openmoji@17.0.0": write_openmoji,
    "svg-country-flags@1.2.10": write_flags,
    "lucide-static@1.62.0": write_lucide,
}


def use_fake_npm(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pack all PACKAGES and put an npm first on PATH that hands them out."""
    folder.mkdir()
    for spec, write in PACKAGES.items():
        name = spec.replace("/", "__")
        write(folder / name / "package")
        with tarfile.open(folder / f"{name}.tgz", "w:gz") as tar:
            tar.add(folder / name / "package", "package")
    program = folder / "npm"
    program.write_text(
        f'#!/bin/sh\nname=$(echo "$2" | sed "s#/#__#g")\ncp "{folder}/$name.tgz" . || exit 1\n'
    )
    program.chmod(program.stat().st_mode | stat.S_IEXEC)
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")
