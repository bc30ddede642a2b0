"""Typographic attacks: a word written on held-out pictures, what CLIP then calls them and the
decoder makes of them (unCLIP, fig. 6).

Each picture gets the right word, a wrong one and a scrambled one, which takes the same room and
says nothing, in several fonts, sizes and places. Models are callables. Legend: N pictures, K
labels, V ways of writing.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont
from pydantic import Field

from indexing.data.embedding_store import Floats
from indexing.data.held_out import Pairs
from indexing.data.images import INK, PAPER, Pixels, read_picture, write_png
from indexing.evaluation.attack_judges import Witnesses, figures, judge, look_alikes, probabilities
from indexing.evaluation.context import Subject
from indexing.metrics.bootstrap import mean_figure
from indexing.metrics.clip_score import encoded
from indexing.metrics.zero_shot import class_embeddings
from indexing.report import sections
from infra.errors import CallerError
from infra.settings import Section

Way = tuple[str, float, float]
"""How a word is written: font, size and place, as `write_word` takes them."""
Vary = Callable[[Pixels, int, int], NDArray[np.uint8]]
"""(pictures (N, H, W, 3), count, seed) -> variations uint8 (N, count, S, S, 3), from the pictures'
CLIP embeddings alone."""

SIDE_PX = 96
FONTS = {
    "Aileron": "",
    "DejaVu Serif": "DejaVuSerif-Bold.ttf",
    "DejaVu Mono": "DejaVuSansMono-Bold.ttf",
}
SIZES = {"small": 0.17, "large": 0.27}
HEIGHTS = {"top": 0.0, "middle": 0.5, "bottom": 1.0}
WORDS = ("right", "wrong", "scrambled")
VARIED = ("", "right", "wrong")
"""What is written on pictures that the decoder varies; nothing first."""
TOP = 3
AT_ONCE = 256


class TypographicConfig(Section):
    """[evaluate.typographic]: how many pictures are written on, and how many of them the decoder
    varies.
    """

    labels: int = Field(default=32, ge=2, le=1000)
    """Names among which a picture's label is chosen: the shortest of those held-out ones that CLIP
    finds among all for a picture of it."""
    pictures: int = Field(default=32, ge=1, le=10_000)
    """Pictures that are written on, drawn by the seed; those that CLIP names rightly come first,
    since only they can be led astray."""
    varied: int = Field(default=12, ge=1, le=10_000)
    """Pictures whose variations are drawn and judged: untouched, with the right and with the wrong
    word."""
    shown: int = Field(default=4, ge=1, le=64)
    """How many of them are shown, one row of each for the right and the wrong word."""
    variations: int = Field(default=3, ge=1, le=64)
    """Variations of each."""
    font: str = ""
    """A TrueType file to write with besides the packaged fonts."""


def write_word(picture: Pixels, word: str, font: str, size: float, vertical: float) -> Pixels:
    """Write a word in black on a white strip across a picture (S, S, 3): `size` the letters' height
    and `vertical` from top 0 to bottom 1.
    """
    side = len(picture)
    page = Image.fromarray(picture)
    pen = ImageDraw.Draw(page)
    height = size * side
    letters = _font(font, height)
    while (box := pen.textbbox((0, 0), word, letters))[2] - box[0] > 0.94 * side:
        height *= 0.94
        letters = _font(font, height)
    strip = round(1.25 * size * side)
    top = round(vertical * (side - strip))
    pen.rectangle((0, top, side, top + strip), fill=PAPER)
    at = (side / 2 - (box[0] + box[2]) / 2, top + strip / 2 - (box[1] + box[3]) / 2)
    pen.text(at, word, fill=(0, 0, 0), font=letters)
    return np.asarray(page)


def _font(name: str, height: float) -> Any:
    if not name:
        return ImageFont.load_default(height)
    try:
        return ImageFont.truetype(name, round(height))
    except OSError as error:
        raise CallerError(
            f"[evaluate.typographic] font = {name!r} cannot be read ({error}): give a TrueType file"
        ) from None


def fonts(user_font: str) -> dict[str, str]:
    """Return fonts by name: Pillow's own, matplotlib's, whose files are read without importing it,
    and the caller's.
    """
    spec = find_spec("matplotlib")
    folder = Path(spec.origin or "").parent / "mpl-data" / "fonts" / "ttf" if spec else None
    packaged = {
        name: str(folder / file) if file and folder else ""
        for name, file in FONTS.items()
        if not file or folder
    }
    return packaged | ({Path(user_font).stem: user_font} if user_font else {})


def scrambled(word: str, rng: np.random.Generator) -> str:
    """Return the word's letters in another order, as far as there is one."""
    for _ in range(20):
        mixed = "".join(rng.permutation(list(word)).tolist())
        if mixed != word:
            return mixed
    return word[::-1]


def ways(user_font: str) -> dict[str, Way]:
    """Return ways of writing by name: the first one, and from it one change at a time."""
    every = fonts(user_font)
    base = next(iter(every))
    variants = {f"{base}, large, top": (every[base], SIZES["large"], HEIGHTS["top"])}
    variants |= {
        f"{font}, large, top": (file, SIZES["large"], HEIGHTS["top"])
        for font, file in every.items()
    }
    variants |= {f"{base}, small, top": (every[base], SIZES["small"], HEIGHTS["top"])}
    return variants | {
        f"{base}, large, {height}": (every[base], SIZES["large"], share)
        for height, share in HEIGHTS.items()
    }


def frequent_names(pairs: Pairs, count: int) -> tuple[list[str], int, int]:
    """Return so many names, short ones that CLIP finds for one of their pictures first; how many it
    finds so, and of how many.

    It must find the name among those of all pairs, by first captions: a picture that CLIP calls
    wrongly cannot be led astray.
    """
    captions = [row["caption"] for row in pairs.rows]
    first = {caption: number for number, caption in reversed(list(enumerate(captions)))}
    names = sorted(first, key=lambda name: (len(name), name))
    texts = pairs.texts[[first[name] for name in names]]
    predictions = [
        (pairs.images[start : start + AT_ONCE] @ texts.T).argmax(1)
        for start in range(0, len(captions), AT_ONCE)
    ]
    labelled_rows = {
        caption
        for caption, said in zip(captions, np.concatenate(predictions), strict=True)
        if names[said] == caption
    }
    return (
        sorted(names, key=lambda name: name not in labelled_rows)[:count],
        len(labelled_rows),
        len(names),
    )


def choose(
    pairs: Pairs, classes: Floats, names: Sequence[str], count: int, seed: int
) -> tuple[list[int], NDArray[np.int64], float]:
    """Return which rows are written on (N), the label of each (N,), and the share of all rows of
    these names that CLIP names rightly.
    """
    number_of = {name: number for number, name in enumerate(names)}
    labelled_rows = [number for number, row in enumerate(pairs.rows) if row["caption"] in number_of]
    labels = np.array([number_of[pairs.rows[row]["caption"]] for row in labelled_rows], np.int64)
    is_right = (pairs.images[labelled_rows] @ classes.T).argmax(1) == labels
    order = np.random.default_rng(seed).permutation(len(labelled_rows))
    order = order[np.argsort(~is_right[order], kind="stable")][:count]
    return [labelled_rows[number] for number in order], labels[order], float(is_right.mean())


@dataclass(frozen=True)
class Attack:
    """Pictures (N) that are written on: what each is, (N,) of the names, and the words, N for each
    of WORDS.
    """

    pictures: list[Pixels]
    groups: list[str]
    names: list[str]
    labels: NDArray[np.int64]
    others: NDArray[np.int64]
    """The label of the wrong word."""
    words: dict[str, list[str]]

    def written(self, kind: str, way: Way, numbers: Iterable[int] | None = None) -> list[Pixels]:
        """Return the pictures, or those at some places, with their words of a kind written on them
        in a way.
        """
        chosen = range(len(self.pictures)) if numbers is None else numbers
        return [
            write_word(self.pictures[number], self.words[kind][number], *way) for number in chosen
        ]


Scores = Callable[[Sequence[Pixels]], Floats]
"""Pictures (N) -> CLIP's cosines with the names (N, K)."""


def typographic(
    config: TypographicConfig,
    subject: Subject,
    pairs: Pairs,
    templates: Sequence[str],
    logit_scale: float,
    vary: Vary,
    witnesses: Witnesses,
) -> sections.ReportSection:
    """Attack held-out pictures and return the report's section; writes its picture into the
    report's folder.
    """
    shards, resamples, seed = subject.shards, subject.resamples, subject.seed
    title = "Typographic attack"
    if len({row["caption"] for row in pairs.rows}) < 2:
        return sections.section(title, ["Not measured: fewer than two held-out names."])
    rng = np.random.default_rng(seed)
    names, labelled_rows, of_names = frequent_names(pairs, config.labels)
    classes = class_embeddings(subject.encode_texts, names, templates)
    picked, labels, right_of_all = choose(pairs, classes, names, config.pictures, seed)
    others = (labels + rng.integers(1, len(names), len(labels))) % len(names)
    words = {
        "right": [names[label] for label in labels],
        "wrong": [names[label] for label in others],
        "scrambled": [scrambled(names[label], rng) for label in others],
    }
    pictures = [read_picture(pairs.rows[number], shards, SIDE_PX) for number in picked]
    attack = Attack(
        pictures, [pairs.groups[number] for number in picked], names, labels, others, words
    )
    by_way = ways(config.font)

    def scores(images: Sequence[Pixels]) -> Floats:
        return encoded(subject.encode_images, np.stack(images)) @ classes.T

    tables = _tables_of_words(attack, by_way, scores, resamples, seed)
    subset = rng.permutation(len(pictures))[: config.varied]
    keys = {pairs.rows[at]["key"] for at in picked}
    looks, labelled = look_alikes(witnesses, subject.embedded, names, keys, shards, SIDE_PX, seed)
    subset_pictures = {"": np.stack([pictures[n] for n in subset])}
    subset_pictures |= {
        kind: np.stack(attack.written(kind, next(iter(by_way.values())), subset))
        for kind in VARIED[1:]
    }
    drawn = {
        kind: vary(images, config.variations, seed) for kind, images in subset_pictures.items()
    }  # (N, count, S', S', 3) each
    rows: list[list[sections.Cell]] = []
    chances: dict[str, Floats] = {}
    for kind, (what, images_of) in product(
        VARIED, (("the picture", subset_pictures), ("variations", drawn))
    ):
        count = config.variations if images_of is drawn else 1
        flat = images_of[kind].reshape(-1, *images_of[kind].shape[-3:])
        cosines = scores(list(flat))
        at = np.repeat(subset, count)
        judged = judge(
            flat,
            [words[kind or "wrong"][n] for n in at],
            cosines.argmax(1),
            looks,
            witnesses.read_text,
        )
        figures_of = figures(
            judged, labels[at], others[at], [attack.groups[n] for n in at], resamples, seed
        )
        rows.append([f"{what}, {kind + ' word' if kind else 'untouched'}", len(flat), *figures_of])
        chances[f"{what} {kind}"] = probabilities(cosines, logit_scale).reshape(
            len(subset), count, -1
        )
    head = [
        "What",
        "Pictures",
        "CLIP says the object",
        "CLIP says the wrong word",
        "Looks like the object",
        "Looks like the wrong word's",
    ]
    caption = (
        "What the decoder draws from an attacked picture's embedding, by the attacked CLIP, by a "
        "network that it never met, and by OCR"
    )
    tables.append(sections.table(caption, [*head, "Characters of the word read"], rows))
    sheet_cells = [(n, kind) for n in range(min(config.shown, len(subset))) for kind in VARIED[1:]]
    page = figure_6(
        np.stack([subset_pictures[kind][n] for n, kind in sheet_cells]),
        np.stack([chances[f"the picture {kind}"][n, 0] for n, kind in sheet_cells]),
        names,
        np.stack([drawn[kind][n] for n, kind in sheet_cells]),
        np.stack([chances[f"variations {kind}"][n] for n, kind in sheet_cells]),
    )
    folder = subject.out / "pictures"
    folder.mkdir(parents=True, exist_ok=True)
    write_png(page, folder / "typographic.png")
    description = "; ".join(
        f"“{words[kind][subset[n]]}” on {names[labels[subset[n]]]}" for n, kind in sheet_cells
    )
    network = f"the look-alike by {witnesses.name}" if looks else "no look-alike"
    return sections.section(
        title,
        [
            f"{len(pictures)} held-out pictures are written on in {len(by_way)} ways, with their "
            "own name, with another's, and with that "
            f"other's letters scrambled. CLIP chooses among {len(names)} names: the shortest of "
            f"{labelled_rows:,} that it finds among {of_names:,} "
            f"for a picture, since what it calls wrongly cannot be led astray ({right_of_all:.0%} "
            "of all held-out pictures of these are "
            "named rightly; those come first here). Where a label moves to the wrong word more "
            "often than it does for scrambled letters, "
            "the word was read; the rest is what a strip across the picture hides.",
            f"The decoder draws {config.variations} variations of {len(subset)} of them from "
            f"their embeddings alone (seed {seed}). What "
            f"these show is asked of the CLIP that was attacked; of {network}, the nearest of "
            f"{labelled} other pictures of these names; "
            "and of OCR, which reads the wrong word on untouched pictures only by chance. The "
            "rows of the pictures themselves tell how "
            "far each of these is to be trusted.",
            f"Below: attacked pictures, and to the right their variations, with the {TOP} "
            "likeliest names at CLIP's own temperature.",
        ],
        tables,
        [
            sections.picture(
                "pictures/typographic.png",
                f"Attacked pictures and their variations: {description}",
                "One row each",
            )
        ],
    )


def _tables_of_words(
    attack: Attack, by_way: Mapping[str, Way], scores: Scores, resamples: int, seed: int
) -> list[dict[str, Any]]:
    """Return what CLIP says with each kind of word written in all ways, and with the wrong word by
    the way it is written.
    """
    labels, others = attack.labels, attack.others
    clean = scores(attack.pictures).argmax(1)
    said = {
        kind: np.stack([scores(attack.written(kind, way)).argmax(1) for way in by_way.values()])
        for kind in WORDS
    }  # (V, N) each

    def row(name: str, values: NDArray[np.int64]) -> list[sections.Cell]:
        groups = np.tile(np.array(attack.groups, object), len(values)).astype(str)
        shares = [values == labels, values == others, values != clean]
        return [
            name,
            int(values.size),
            *(mean_figure(share.ravel(), groups, resamples, seed) for share in shares),
        ]

    untouched: list[sections.Cell] = [
        "nothing",
        len(clean),
        mean_figure(clean == labels, attack.groups, resamples, seed),
        mean_figure(clean == others, attack.groups, resamples, seed),
        None,
    ]
    head = [
        "Written",
        "Pictures",
        "Label is the object",
        "Label is the wrong word",
        "Label changed",
    ]
    of_kinds = [untouched, *(row(f"{kind} word", said[kind]) for kind in WORDS)]
    of_ways = [row(name, said["wrong"][number : number + 1]) for number, name in enumerate(by_way)]
    return [
        sections.table("What CLIP says with a word written on the picture", head, of_kinds),
        sections.table("The wrong word, by how it is written", head, of_ways),
    ]


def figure_6(
    attacked: Pixels, chances: Floats, names: Sequence[str], varied: Pixels, of_varied: Floats
) -> Pixels:
    """Return a page with each attacked picture (N, S, S, 3) and its variations (N, count, S', S',
    3) in a row.

    Below each stand the names it most likely has, by probabilities (N, K) and (N, count, K).
    """
    line, gap, side = 15, 8, SIDE_PX
    column = side + 5 * gap  # a name of fifteen letters
    height, width = side + TOP * line + 2 * gap, (1 + varied.shape[1]) * column + 4 * gap
    page = Image.new("RGB", (width, height * len(attacked) + gap), PAPER)
    pen, letters = ImageDraw.Draw(page), ImageFont.load_default(11)
    for row, picture in enumerate(attacked):
        top = gap + row * height
        for number, (row_cells, way_name) in enumerate(
            ((picture, chances[row]), *zip(varied[row], of_varied[row], strict=True))
        ):
            left = gap + number * column + (2 * gap if number else 0)
            resample = Image.Resampling.NEAREST if number else Image.Resampling.LANCZOS
            page.paste(Image.fromarray(row_cells).resize((side, side), resample), (left, top))
            for rank, label in enumerate(np.argsort(-way_name, kind="stable")[:TOP]):
                text = f"{way_name[label]:.0%} {names[label]}"
                while letters.getlength(text) > column - gap:
                    text = text[:-1]
                pen.text((left, top + side + 2 + rank * line), text, fill=INK, font=letters)
    return np.asarray(page)
