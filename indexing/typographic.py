"""Typographic attacks: a word written on held-out pictures, what CLIP then calls them and the decoder makes of them (unCLIP, fig. 6).

Each picture gets the right word, a wrong one and a scrambled one, which takes the same room and says nothing, in several fonts, sizes
and places. Models are callables. Legend: N pictures, K labels, V ways of writing.
"""

from collections.abc import Callable, Sequence
from importlib.util import find_spec
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont
from pydantic import Field

from indexing import sections
from indexing.embeddings import Floats
from indexing.generation import EncodeImages
from indexing.held_out import Embedded, Pairs
from indexing.intervals import mean_figure
from indexing.pictures import INK, PAPER, Pixels, read_picture, write_png
from indexing.varied import Witnesses, figures, judge, look_alikes, probabilities
from indexing.zero_shot import EncodeTexts, class_embeddings, unit
from infra.settings import Section

Vary = Callable[[Pixels, int, int], NDArray[np.uint8]]
"""(pictures (N, H, W, 3), count, seed) -> variations uint8 (N, count, S, S, 3), from the pictures' CLIP embeddings alone."""

SIDE_PX = 96
FONTS = {"Aileron": "", "DejaVu Serif": "DejaVuSerif-Bold.ttf", "DejaVu Mono": "DejaVuSansMono-Bold.ttf"}
SIZES = {"small": 0.17, "large": 0.27}
PLACES = {"top": 0.0, "middle": 0.5, "bottom": 1.0}
WORDS = ("right", "wrong", "scrambled")
VARIED = ("", "right", "wrong")
"""What is written on pictures that the decoder varies; nothing first."""
TOP = 3
AT_ONCE = 256


class TypographicConfig(Section):
    """[evaluate.typographic]: how many pictures are written on, and how many of them the decoder varies."""

    labels: int = Field(default=32, ge=2, le=1000)
    """Names among which a picture's label is chosen: the shortest of those held-out ones that CLIP finds among all for a picture of it."""
    pictures: int = Field(default=32, ge=1, le=10_000)
    """Pictures that are written on, drawn by the seed; those that CLIP names rightly come first, since only they can be led astray."""
    varied: int = Field(default=12, ge=1, le=10_000)
    """Pictures whose variations are drawn and judged: untouched, with the right and with the wrong word."""
    shown: int = Field(default=4, ge=1, le=64)
    """How many of them are shown, one row of each for the right and the wrong word."""
    variations: int = Field(default=3, ge=1, le=64)
    """Variations of each."""
    font: str = ""
    """A TrueType file to write with besides the packaged fonts."""


def write_word(picture: Pixels, word: str, font: str, size: float, place: float) -> Pixels:
    """Write a word in black on a white strip across a picture (S, S, 3): `size` the letters' height and `place` from top 0 to bottom 1."""
    side = len(picture)
    page = Image.fromarray(picture)
    pen = ImageDraw.Draw(page)
    height = size * side
    letters = _font(font, height)
    while (box := pen.textbbox((0, 0), word, letters))[2] - box[0] > 0.94 * side:
        height *= 0.94
        letters = _font(font, height)
    strip = round(1.25 * size * side)
    top = round(place * (side - strip))
    pen.rectangle((0, top, side, top + strip), fill=PAPER)
    at = (side / 2 - (box[0] + box[2]) / 2, top + strip / 2 - (box[1] + box[3]) / 2)
    pen.text(at, word, fill=(0, 0, 0), font=letters)
    return np.asarray(page)


def _font(name: str, height: float) -> Any:
    if not name:
        return ImageFont.load_default(height)
    return ImageFont.truetype(name, round(height))


def fonts(own: str) -> dict[str, str]:
    """Return fonts by name: Pillow's own, matplotlib's, whose files are read without importing it, and the caller's."""
    found = find_spec("matplotlib")
    folder = Path(found.origin or "").parent / "mpl-data" / "fonts" / "ttf" if found else None
    packaged = {name: str(folder / file) if file and folder else "" for name, file in FONTS.items() if not file or folder}
    return packaged | ({Path(own).stem: own} if own else {})


def scrambled(word: str, rng: np.random.Generator) -> str:
    """Return the word's letters in another order, as far as there is one."""
    for _ in range(20):
        mixed = "".join(rng.permutation(list(word)).tolist())
        if mixed != word:
            return mixed
    return word[::-1]


def ways(own: str) -> dict[str, tuple[str, float, float]]:
    """Return ways of writing by name, (font, size, place): the first one, and from it one change at a time."""
    every = fonts(own)
    base = next(iter(every))
    found = {f"{base}, large, top": (every[base], SIZES["large"], PLACES["top"])}
    found |= {f"{font}, large, top": (file, SIZES["large"], PLACES["top"]) for font, file in every.items()}
    found |= {f"{base}, small, top": (every[base], SIZES["small"], PLACES["top"])}
    return found | {f"{base}, large, {place}": (every[base], SIZES["large"], share) for place, share in PLACES.items()}


def known_names(pairs: Pairs, count: int) -> tuple[list[str], int, int]:
    """Return so many names, short ones that CLIP finds for one of their pictures first; how many it finds so, and of how many.

    It must find the name among those of all pairs, by first captions: a picture that CLIP calls wrongly cannot be led astray.
    """
    captions = [row["caption"] for row in pairs.rows]
    first = {caption: place for place, caption in reversed(list(enumerate(captions)))}
    names = sorted(first, key=lambda name: (len(name), name))
    texts = pairs.texts[[first[name] for name in names]]
    found = [(pairs.images[start : start + AT_ONCE] @ texts.T).argmax(1) for start in range(0, len(captions), AT_ONCE)]
    known = {caption for caption, said in zip(captions, np.concatenate(found), strict=True) if names[said] == caption}
    return sorted(names, key=lambda name: name not in known)[:count], len(known), len(names)


def choose(pairs: Pairs, classes: Floats, names: Sequence[str], count: int, seed: int) -> tuple[list[int], NDArray[np.int64], float]:
    """Return which rows are written on (N), the label of each (N,), and the share of all rows of these names that CLIP names rightly."""
    known = [place for place, row in enumerate(pairs.rows) if row["caption"] in names]
    labels = np.array([names.index(pairs.rows[place]["caption"]) for place in known], np.int64)
    is_right = (pairs.images[known] @ classes.T).argmax(1) == labels
    order = np.random.default_rng(seed).permutation(len(known))
    order = order[np.argsort(~is_right[order], kind="stable")][:count]
    return [known[place] for place in order], labels[order], float(is_right.mean())


def typographic(
    config: TypographicConfig,
    embedded: Embedded,
    pairs: Pairs,
    templates: Sequence[str],
    shards: Path,
    encode_texts: EncodeTexts,
    encode_images: EncodeImages,
    logit_scale: float,
    vary: Vary,
    witnesses: Witnesses,
    resamples: int,
    seed: int,
    out: Path,
) -> sections.Section:
    """Attack held-out pictures and return the report's section; writes its picture into `out` / pictures."""
    title = "Typographic attack"
    if len({row["caption"] for row in pairs.rows}) < 2:
        return sections.section(title, ["Not measured: fewer than two held-out names."])
    rng = np.random.default_rng(seed)
    names, known, of_names = known_names(pairs, config.labels)
    classes = class_embeddings(encode_texts, names, templates)
    picked, labels, right_of_all = choose(pairs, classes, names, config.pictures, seed)
    pictures = [read_picture(pairs.rows[place], shards, SIDE_PX) for place in picked]
    groups = [pairs.groups[place] for place in picked]
    other = (labels + rng.integers(1, len(names), len(labels))) % len(names)
    words = {
        "right": [names[label] for label in labels],
        "wrong": [names[label] for label in other],
        "scrambled": [scrambled(names[label], rng) for label in other],
    }
    written = ways(config.font)

    def scores(images: Sequence[Pixels]) -> Floats:
        pieces = [
            np.asarray(encode_images(np.stack(images[start : start + AT_ONCE])), np.float32) for start in range(0, len(images), AT_ONCE)
        ]
        return unit(np.concatenate(pieces)) @ classes.T  # (N, K)

    clean = scores(pictures).argmax(1)
    said = {
        kind: np.stack(
            [
                scores([write_word(p, word, font, size, place) for p, word in zip(pictures, words[kind], strict=True)]).argmax(1)
                for font, size, place in written.values()
            ]
        )
        for kind in WORDS
    }  # (V, N) each

    def row(name: str, kind: str, chosen: NDArray[np.bool_]) -> list[sections.Cell]:
        found = said[kind][chosen]
        again = np.tile(np.array(groups, object), len(found)).astype(str)
        figures = [found == labels, found == other, found != clean]
        return [name, int(found.size), *(mean_figure(each.ravel(), again, resamples, seed) for each in figures)]

    every = np.ones(len(written), bool)
    each_way = np.eye(len(written), dtype=bool)
    untouched: list[sections.Cell] = [
        "nothing",
        len(clean),
        mean_figure(clean == labels, groups, resamples, seed),
        mean_figure(clean == other, groups, resamples, seed),
        None,
    ]
    head = ["Written", "Pictures", "Label is the object", "Label is the wrong word", "Label changed"]
    whole = sections.table(
        "What CLIP says with a word written on the picture", head, [untouched, *(row(f"{kind} word", kind, every) for kind in WORDS)]
    )
    by_way = sections.table(
        "The wrong word, by how it is written", head, [row(name, "wrong", chosen) for name, chosen in zip(written, each_way, strict=True)]
    )

    some = rng.permutation(len(pictures))[: config.varied]
    font, size, place = next(iter(written.values()))
    of_some = {"": np.stack([pictures[n] for n in some])}
    of_some |= {kind: np.stack([write_word(pictures[n], words[kind][n], font, size, place) for n in some]) for kind in VARIED[1:]}
    drawn = {kind: vary(each, config.variations, seed) for kind, each in of_some.items()}  # (N, count, S', S', 3) each
    looks, labelled = look_alikes(witnesses, embedded, names, {pairs.rows[at]["key"] for at in picked}, shards, SIDE_PX, seed)
    rows: list[list[sections.Cell]] = []
    chances: dict[str, Floats] = {}
    for kind, (what, own) in product(VARIED, (("the picture", of_some), ("variations", drawn))):
        count = config.variations if own is drawn else 1
        flat = own[kind].reshape(-1, *own[kind].shape[-3:])
        cosines = scores(list(flat))
        at = np.repeat(some, count)
        judged = judge(flat, [words[kind or "wrong"][n] for n in at], cosines.argmax(1), looks, witnesses.read_text)
        found = figures(judged, labels[at], other[at], [groups[n] for n in at], resamples, seed)
        rows.append([f"{what}, {kind + ' word' if kind else 'untouched'}", len(flat), *found])
        chances[f"{what} {kind}"] = probabilities(cosines, logit_scale).reshape(len(some), count, -1)
    network = f"the look-alike by {witnesses.name}" if looks else "no look-alike"
    after = sections.table(
        "What the decoder draws from an attacked picture's embedding, by the attacked CLIP, by a network that it never met, and by OCR",
        [
            *(
                "What",
                "Pictures",
                "CLIP says the object",
                "CLIP says the wrong word",
                "Looks like the object",
                "Looks like the wrong word's",
            ),
            "Characters of the word read",
        ],
        rows,
    )
    few = range(min(config.shown, len(some)))
    page = figure_6(
        np.stack([of_some[kind][n] for n in few for kind in VARIED[1:]]),
        np.stack([chances[f"the picture {kind}"][n, 0] for n in few for kind in VARIED[1:]]),
        names,
        np.stack([drawn[kind][n] for n in few for kind in VARIED[1:]]),
        np.stack([chances[f"variations {kind}"][n] for n in few for kind in VARIED[1:]]),
    )
    folder = out / "pictures"
    folder.mkdir(parents=True, exist_ok=True)
    write_png(page, folder / "typographic.png")
    told = [f"“{words[kind][some[n]]}” on {names[labels[some[n]]]}" for n in few for kind in VARIED[1:]]
    return sections.section(
        title,
        [
            f"{len(pictures)} held-out pictures are written on in {len(written)} ways, with their own name, with another's, and with that "
            f"other's letters scrambled. CLIP chooses among {len(names)} names: the shortest of {known:,} that it finds among {of_names:,} "
            f"for a picture, since what it calls wrongly cannot be led astray ({right_of_all:.0%} of all held-out pictures of these are "
            "named rightly; those come first here). Where a label moves to the wrong word more often than it does for scrambled letters, "
            "the word was read; the rest is what a strip across the picture hides.",
            f"The decoder draws {config.variations} variations of {len(some)} of them from their embeddings alone (seed {seed}). What "
            f"these show is asked of the CLIP that was attacked; of {network}, the nearest of {labelled} other pictures of these names; "
            "and of OCR, which reads the wrong word on untouched pictures only by chance. The rows of the pictures themselves tell how "
            "far each of these is to be trusted.",
            f"Below: attacked pictures, and to the right their variations, with the {TOP} likeliest names at CLIP's own temperature.",
        ],
        [whole, by_way, after],
        [sections.picture("pictures/typographic.png", f"Attacked pictures and their variations: {'; '.join(told)}", "One row each")],
    )


def figure_6(attacked: Pixels, chances: Floats, names: Sequence[str], varied: Pixels, of_varied: Floats) -> Pixels:
    """Return a page with each attacked picture (N, S, S, 3) and its variations (N, count, S', S', 3) in a row.

    Below each stand the names it most likely has, by probabilities (N, K) and (N, count, K).
    """
    line, gap, side = 15, 8, SIDE_PX
    column = side + 5 * gap  # a name of fifteen letters
    height, width = side + TOP * line + 2 * gap, (1 + varied.shape[1]) * column + 4 * gap
    page = Image.new("RGB", (width, height * len(attacked) + gap), PAPER)
    pen, letters = ImageDraw.Draw(page), ImageFont.load_default(11)
    for row, picture in enumerate(attacked):
        top = gap + row * height
        for place, (each, own) in enumerate(((picture, chances[row]), *zip(varied[row], of_varied[row], strict=True))):
            left = gap + place * column + (2 * gap if place else 0)
            resample = Image.Resampling.NEAREST if place else Image.Resampling.LANCZOS
            page.paste(Image.fromarray(each).resize((side, side), resample), (left, top))
            for rank, label in enumerate(np.argsort(-own, kind="stable")[:TOP]):
                text = f"{own[label]:.0%} {names[label]}"
                while letters.getlength(text) > column - gap:
                    text = text[:-1]
                pen.text((left, top + side + 2 + rank * line), text, fill=INK, font=letters)
    return np.asarray(page)
