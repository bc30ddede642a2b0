"""Readers of the npm packages of emoji and icons: one `Picture` for every drawing of a package.

Each reader knows the layout of one family of packages. Skin-tone variants are left out, because
they are near-duplicates of their concept. Reads unpacked packages; renders every SVG once to a PNG
in the cache, in processes with bounds (`svg_renderer.py`).
"""

import json
import os
import re
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import flows.demo.svg_renderer as svg_renderer
from flows.demo.emoji_captions import build_phrasings, clean_name
from flows.demo.emoji_labels import Labels, concept_of, flag_concept, slug
from flows.demo.main_colour import main_colour
from flows.demo.npm_packages import split_spec
from flows.demo.svg_renderer import SIDE
from infra.compute.bounded_processes import BoundedProcesses, ProcessEndedError, RefusedError
from infra.errors import CallerError

SKIN_TONE = re.compile(r"1f3f[b-f]")
RENDER_S = 10.0
"""Maximum seconds for one SVG; a usual one takes a few milliseconds."""
MAX_COSTLY = 50
"""Maximum SVGs of a package that may end their process; the others are then not rendered."""


@dataclass(frozen=True)
class Picture:
    """One drawing with its captions.

    `file` is the image file; `origin` is the path in the package; `problem` is the counted reason
    and details where the drawing cannot be used, and then `file` may not exist.
    """

    file: Path
    origin: str
    concept: str
    style: str
    licence: str
    category: str
    subcategory: str
    captions: tuple[str, ...]
    problem: tuple[str, str] | None = None


@dataclass(frozen=True)
class Drawing:
    """A drawing before it has captions: an image file, or SVG text to render."""

    origin: str
    concept: str
    name: str = ""  # used if Unicode has no label for the concept
    tags: tuple[str, ...] = ()
    file: Path | None = None
    svg: str = ""
    category: str = ""


@dataclass(frozen=True)
class Family:
    """Style and licence of a package's images, and the function that reads the package."""

    style: str
    licence: str
    read: Callable[[Path, Labels], Iterator[Drawing]]


def read_datasource(folder: Path, labels: Labels) -> Iterator[Drawing]:
    """Read emoji-datasource-<vendor>: `emoji.json` and `img/<vendor>/64/*.png`."""
    vendor = next((folder / "img").iterdir()).name
    for entry in json.loads((folder / "emoji.json").read_text()):
        path = f"img/{vendor}/64/{entry['image']}"
        if entry["category"] != "Component" and (folder / path).is_file():
            yield Drawing(
                path, concept_of(entry["unified"]), name=entry["name"].lower(), file=folder / path
            )


def read_code_point_files(folder: Path, labels: Labels) -> Iterator[Drawing]:
    """Read images in `assets/` that are named by their code points (@lobehub/fluent-emoji-3d)."""
    for file in sorted((folder / "assets").iterdir()):
        concept = concept_of(file.stem)
        if concept in labels.by_concept:  # without a label there is no caption
            yield Drawing(f"assets/{file.name}", concept, file=file)


def read_iconify(folder: Path, labels: Labels) -> Iterator[Drawing]:
    """Read an @iconify-json set of emoji: SVG bodies in `icons.json`.

    The code points are in `chars.json`, or the names are Unicode's labels.
    """
    icons = json.loads((folder / "icons.json").read_text())
    chars = json.loads((folder / "chars.json").read_text())
    concepts: dict[str, str] = {
        name: concept_of(code) for code, name in sorted(chars.items(), reverse=True)
    }
    for name in icons["icons"]:
        concept = concepts.get(name) or labels.by_slug.get(name)
        if concept:
            yield Drawing(f"icons.json#{name}", concept, svg=iconify_svg(icons, name))


def read_iconify_words(folder: Path, labels: Labels) -> Iterator[Drawing]:
    """Read an @iconify-json set of other icons, whose names are captions."""
    icons = json.loads((folder / "icons.json").read_text())
    metadata = folder / "metadata.json"
    listed = json.loads(metadata.read_text()).get("categories", {}) if metadata.is_file() else {}
    tags = {
        name: re.sub(r"(?<=[a-z])(?=[A-Z])", " ", group).lower()
        for group, names in listed.items()
        for name in names
    }
    for name in icons["icons"]:
        words = re.sub(r"(?:-\d+|-rectangle|-(?:bold|thin))+$", "", name)
        concept = labels.by_slug.get(words, words)
        yield Drawing(
            f"icons.json#{name}",
            concept,
            name=words.replace("-", " "),
            tags=(tags[name],) if name in tags else (),
            svg=iconify_svg(icons, name),
        )


def iconify_svg(icons: dict[str, Any], name: str) -> str:
    """Return an icon's body as a complete SVG document."""
    icon = icons["icons"][name]
    box = [
        icon.get(k, icons.get(k, d))
        for k, d in (("left", 0), ("top", 0), ("width", 16), ("height", 16))
    ]
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="{" ".join(map(str, box))}" '
        f'color="#000">{icon["body"]}</svg>'
    )


def read_openmoji(folder: Path, labels: Labels) -> Iterator[Drawing]:
    """Read openmoji: `data/openmoji.json` and `color/svg/*.svg`.

    Its additional icons, which Unicode does not have, bring their own annotation and tags.
    """
    for entry in json.loads((folder / "data" / "openmoji.json").read_text()):
        if entry["group"] == "component" or entry["skintone"] or "brand" in entry["subgroups"]:
            continue
        path = f"color/svg/{entry['hexcode']}.svg"
        if (folder / path).is_file():
            tags = tuple(
                tag.strip()
                for tag in f"{entry['tags']},{entry['openmoji_tags']}".split(",")
                if tag.strip()
            )
            yield Drawing(
                path,
                concept_of(entry["hexcode"]),
                name=entry["annotation"],
                tags=tags,
                svg=(folder / path).read_text(),
            )


def read_country_flags(folder: Path, labels: Labels) -> Iterator[Drawing]:
    """Read svg-country-flags: PNG files named by ISO code, names in `countries.json`."""
    countries = json.loads((folder / "countries.json").read_text())
    for file in sorted((folder / "png250px").glob("*.png")):
        country = countries.get(file.stem.upper(), "")
        if country or flag_concept(file.stem) in labels.by_concept:
            yield Drawing(
                f"png250px/{file.name}",
                flag_concept(file.stem),
                name=f"flag: {country}",
                file=file,
                category="Flags",
            )


def read_lucide(folder: Path, labels: Labels) -> Iterator[Drawing]:
    """Read lucide-static: `icons/*.svg` and `tags.json`."""
    tags = json.loads((folder / "tags.json").read_text())
    for file in sorted((folder / "icons").glob("*.svg")):
        concept = labels.by_slug.get(file.stem, file.stem)
        words = file.stem.replace("-", " ")
        yield Drawing(
            f"icons/{file.name}",
            concept,
            name=words,
            tags=tuple(tags.get(file.stem, ())),
            svg=file.read_text(),
        )


FAMILIES = {
    "emoji-datasource-google": Family("google", "Apache-2.0", read_datasource),
    "emoji-datasource-twitter": Family("twitter", "CC-BY-4.0", read_datasource),
    "@lobehub/fluent-emoji-3d": Family("fluent-3d", "MIT", read_code_point_files),
    "@iconify-json/fluent-emoji-flat": Family("fluent-flat", "MIT", read_iconify),
    "@iconify-json/noto-v1": Family("noto-v1", "Apache-2.0", read_iconify),
    "@iconify-json/emojione": Family("emojione", "CC-BY-4.0", read_iconify),
    "@iconify-json/emojione-v1": Family("emojione-v1", "CC-BY-SA-4.0", read_iconify),
    "@iconify-json/game-icons": Family("game-icons", "CC-BY-3.0", read_iconify_words),
    "@iconify-json/streamline-freehand-color": Family(
        "streamline", "CC-BY-4.0", read_iconify_words
    ),
    "openmoji": Family("openmoji", "CC-BY-SA-4.0", read_openmoji),
    "svg-country-flags": Family("flags", "public domain", read_country_flags),
    "lucide-static": Family("lucide", "ISC", read_lucide),
}


def read_package(
    spec: str, folder: Path, labels: Labels, rendered: Path, svg_px: int
) -> list[Picture]:
    """Return the pictures of an unpacked package.

    SVGs are rendered into the folder `rendered`, with `svg_px` pixels on the longer side. Raises
    CallerError for a package without a reader.
    """
    name, _ = split_spec(spec)
    if name not in FAMILIES:
        raise CallerError(
            f"[data] there is no reader for the package {name!r}: use one of {', '.join(FAMILIES)}"
        )
    family = FAMILIES[name]
    drawings: dict[str, Drawing] = {}
    for drawing in family.read(folder, labels):
        if not SKIN_TONE.search(drawing.concept):
            drawings.setdefault(drawing.origin, drawing)
    refused = render([d for d in drawings.values() if d.svg], rendered, svg_px)
    # Threads help, because decoding releases the interpreter lock.
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return list(
            pool.map(
                lambda drawing: describe(
                    drawing, family, labels, rendered, refused.get(drawing.origin)
                ),
                drawings.values(),
            )
        )


def describe(
    drawing: Drawing,
    family: Family,
    labels: Labels,
    rendered: Path,
    problem: tuple[str, str] | None = None,
) -> Picture:
    """Return a drawing with its captions, from Unicode's label or, without one, its own name."""
    label = labels.by_concept.get(drawing.concept)
    subcategory = label.subcategory if label else ""
    name = clean_name(label.text if label else drawing.name or drawing.concept, subcategory)
    category = label.category if label else drawing.category
    file = drawing.file or rendered / rendered_name(drawing)
    captions = build_phrasings(
        name,
        family.style,
        label.tags if label else drawing.tags,
        category,
        subcategory,
        "" if problem else main_colour(file),
    )
    return Picture(
        file,
        drawing.origin,
        drawing.concept,
        family.style,
        family.licence,
        category,
        subcategory,
        tuple(captions),
        problem,
    )


def rendered_name(drawing: Drawing) -> str:
    """Return the file name of a drawing's rendered SVG."""
    return slug(drawing.origin.removesuffix(".svg")) + ".png"


def render(drawings: list[Drawing], rendered: Path, svg_px: int) -> dict[str, tuple[str, str]]:
    """Render the SVGs that are not in the folder `rendered` yet.

    Returns reason and details for the origins of those that are refused, which have no file there:
    `svg_invalid`, `svg_external_reference` for files and URLs that they name, or `svg_too_costly`.
    """
    rendered.mkdir(parents=True, exist_ok=True)
    present = {file.name for file in rendered.iterdir()}
    processes = BoundedProcesses(svg_renderer.__name__, RENDER_S)
    refused: dict[str, tuple[str, str]] = {}
    costly: list[str] = []

    def draw(drawing: Drawing) -> None:
        name = rendered_name(drawing)
        if name in present:
            return
        if len(costly) >= MAX_COSTLY:
            refused[drawing.origin] = "svg_too_costly", f"not tried after {MAX_COSTLY} such SVGs"
            return
        try:
            png = processes.call(SIDE.pack(svg_px) + drawing.svg.encode("utf-8", "replace"))
        except RefusedError as error:
            reason, _, detail = str(error).partition(": ")
            refused[drawing.origin] = reason, detail
            return
        except ProcessEndedError as error:
            costly.append(drawing.origin)
            refused[drawing.origin] = "svg_too_costly", str(error)
            return
        partial = rendered / f".{name}.{os.getpid()}"
        partial.write_bytes(png)
        partial.rename(rendered / name)

    try:
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            list(pool.map(draw, drawings))
    finally:
        processes.close()
    return refused
