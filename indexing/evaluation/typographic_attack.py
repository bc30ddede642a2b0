"""Typographic attacks: a word is written on held-out pictures (unCLIP, fig. 6).

Measures how CLIP names the pictures then, and what the decoder draws from their embeddings. Each
picture gets its right word, a wrong word and scrambled letters (which cover the same area but have
no meaning), in several fonts, sizes and positions. Returns a section of the report and writes its
picture. Models are callables. Legend: N pictures, M varied ones, K names, V ways of writing.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont
from pydantic import Field

from indexing.data.contact_sheet import INK, PAPER
from indexing.data.embedding_store import Floats
from indexing.data.held_out import Pairs
from indexing.data.images import Pixels, read_picture, write_png
from indexing.evaluation.attack_judges import (
    Looks,
    Witnesses,
    figures,
    judge,
    look_alikes,
    probabilities,
)
from indexing.evaluation.context import Subject
from indexing.metrics.bootstrap import mean_figure
from indexing.metrics.clip_score import EncodeImages, encoded
from indexing.metrics.zero_shot import class_embeddings
from indexing.report import sections
from infra.errors import CallerError
from infra.settings import Section

Font = ImageFont.FreeTypeFont | ImageFont.ImageFont
Way = tuple[str, float, float]
"""Font, size and vertical position of a word, as `write_word` takes them."""
Vary = Callable[[Pixels, int, int], NDArray[np.uint8]]
"""(pictures (N, H, W, 3), count, seed) -> variations uint8 (N, count, S, S, 3), drawn from the CLIP
embeddings alone."""

TITLE = "Typographic attack"

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
"""Kinds of words on the pictures that the decoder varies; "" is an untouched picture."""
VARIATIONS_HEAD = (
    "What",
    "Pictures",
    "CLIP says the object",
    "CLIP says the wrong word",
    "Looks like the object",
    "Looks like the wrong word's",
    "Characters of the word read",
)
TOP = 3
"""Number of most likely names written below a picture."""
AT_ONCE = 256


class TypographicConfig(Section):
    """[evaluate.typographic]: number of attacked pictures, and of those that the decoder varies."""

    labels: int = Field(default=32, ge=2, le=1000)
    """Number of names that CLIP chooses from: the shortest held-out names that CLIP, among all
    names, finds for at least one of their pictures."""
    pictures: int = Field(default=32, ge=1, le=10_000)
    """Number of attacked pictures, drawn by the seed. Pictures that CLIP names rightly come first,
    because only they can be misled."""
    varied: int = Field(default=12, ge=1, le=10_000)
    """Number of pictures whose variations are drawn and judged: untouched, with the right word and
    with the wrong word."""
    shown: int = Field(default=4, ge=1, le=64)
    """Number of varied pictures in the report: a row each for the right and wrong word."""
    variations: int = Field(default=3, ge=1, le=64)
    """Number of variations of a picture."""
    font: str = ""
    """Path of a TrueType file to use in addition to the packaged fonts."""


def write_word(picture: Pixels, word: str, font: str, size: float, vertical: float) -> Pixels:
    """Return a picture (S, S, 3) with a word in black on a white strip across it.

    `font` is a TrueType file or "" for Pillow's own; `size` is the height of the letters as a share
    of the side (smaller where the word does not fit); `vertical` runs from 0 (top) to 1 (bottom).
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
    corner = (side / 2 - (box[0] + box[2]) / 2, top + strip / 2 - (box[1] + box[3]) / 2)
    pen.text(corner, word, fill=(0, 0, 0), font=letters)
    return np.asarray(page)


def _font(name: str, height: float) -> Font:
    if not name:
        return ImageFont.load_default(height)
    try:
        return ImageFont.truetype(name, round(height))
    except OSError as error:
        raise CallerError(
            f"[evaluate.typographic] font = {name!r} cannot be read ({error}): give a TrueType file"
        ) from None


def fonts(user_font: str) -> dict[str, str]:
    """Return font files by font name: Pillow's own (""), matplotlib's and the user's.

    matplotlib's files are located without importing it; without matplotlib they are left out.
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
    """Return the letters of a word in another order, or the word where no other order exists."""
    for _ in range(20):
        mixed = "".join(rng.permutation(list(word)).tolist())
        if mixed != word:
            return mixed
    return word[::-1]


def ways(user_font: str) -> dict[str, Way]:
    """Return ways of writing by name: a base, and variants of it that differ in one property."""
    files = fonts(user_font)
    base = next(iter(files))
    large, top = SIZES["large"], HEIGHTS["top"]
    variants = {f"{font}, large, top": (file, large, top) for font, file in files.items()}
    variants[f"{base}, small, top"] = (files[base], SIZES["small"], top)
    for height, vertical in HEIGHTS.items():
        variants[f"{base}, large, {height}"] = (files[base], large, vertical)
    return variants


def frequent_names(pairs: Pairs, count: int) -> tuple[list[str], int, int]:
    """Return up to `count` names, the number of names that CLIP finds, and the number of all names.

    A name is a first caption. CLIP finds a name if it is the nearest of all names to at least one
    picture of it; a picture that CLIP names wrongly cannot be misled. Names that CLIP finds come
    first, then shorter ones.
    """
    captions = [row["caption"] for row in pairs.rows]
    first = {caption: number for number, caption in reversed(list(enumerate(captions)))}
    names = sorted(first, key=lambda name: (len(name), name))
    texts = pairs.texts[[first[name] for name in names]]
    predictions = [
        (pairs.images[start : start + AT_ONCE] @ texts.T).argmax(1)
        for start in range(0, len(captions), AT_ONCE)
    ]
    recognised = {
        caption
        for caption, label in zip(captions, np.concatenate(predictions), strict=True)
        if names[label] == caption
    }
    chosen = sorted(names, key=lambda name: name not in recognised)[:count]
    return chosen, len(recognised), len(names)


def choose(
    pairs: Pairs, classes: Floats, names: Sequence[str], count: int, seed: int
) -> tuple[list[int], NDArray[np.int64], float]:
    """Choose up to `count` pairs to attack, rightly named ones first, else in an order by the seed.

    Return their rows (N), their labels (N,), and the share of all pairs of these names that CLIP
    names rightly. `classes` are the unit vectors (K, D) of the names.
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
    """N pictures to attack, with the label of each (N,) in `names`."""

    pictures: list[Pixels]
    groups: list[str]
    names: list[str]
    labels: NDArray[np.int64]
    others: NDArray[np.int64]
    """Labels (N,) of the wrong words."""
    words: dict[str, list[str]]
    """N words for each kind in WORDS."""

    def written(self, kind: str, way: Way, numbers: Iterable[int] | None = None) -> list[Pixels]:
        """Return pictures with their words of one kind; `numbers` selects some pictures."""
        chosen = range(len(self.pictures)) if numbers is None else numbers
        return [
            write_word(self.pictures[number], self.words[kind][number], *way) for number in chosen
        ]


@dataclass(frozen=True)
class _Classifier:
    """The attacked CLIP as a classifier of K names."""

    encode_images: EncodeImages
    classes: Floats
    """Unit vectors (K, D) of the names."""
    logit_scale: float

    def scores(self, pictures: Sequence[Pixels]) -> Floats:
        """Return the cosines (N, K) of pictures with the names."""
        return encoded(self.encode_images, np.stack(pictures)) @ self.classes.T


@dataclass(frozen=True)
class _Varied:
    """Attacked pictures and their variations, by the kind of word in VARIED."""

    subset: NDArray[np.int64]
    """Positions (M,) of the pictures in the attack."""
    pictures: dict[str, Pixels]
    """(M, S, S, 3) of each kind."""
    variations: dict[str, Pixels]
    """(M, count, S', S', 3) of each kind."""


def typographic(
    config: TypographicConfig,
    subject: Subject,
    pairs: Pairs,
    templates: Sequence[str],
    logit_scale: float,
    vary: Vary,
    witnesses: Witnesses,
) -> sections.ReportSection:
    """Attack held-out pictures and return the section; write its picture."""
    seed = subject.seed
    if len({row["caption"] for row in pairs.rows}) < 2:
        return sections.section(TITLE, ["Not measured: fewer than two held-out names."])
    rng = np.random.default_rng(seed)
    names, named_count, name_count = frequent_names(pairs, config.labels)
    classes = class_embeddings(subject.encode_texts, names, templates)
    picked, labels, right_share = choose(pairs, classes, names, config.pictures, seed)
    attack = _build_attack(subject, pairs, picked, names, labels, rng)
    classifier = _Classifier(subject.encode_images, classes, logit_scale)
    by_way = ways(config.font)
    tables = _tables_of_words(attack, by_way, classifier, subject.resamples, seed)
    varied = _vary(config, attack, next(iter(by_way.values())), vary, rng, seed)
    keys = {pairs.rows[number]["key"] for number in picked}
    looks, labelled = look_alikes(
        witnesses, subject.embedded, names, keys, subject.shards, SIDE_PX, seed
    )
    table, chances = _judge_variations(attack, varied, classifier, looks, witnesses, subject)
    look_alike = f"the look-alike by {witnesses.name}" if looks else "no look-alike"
    return sections.section(
        TITLE,
        [
            f"A word is written on {len(attack.pictures)} held-out pictures in {len(by_way)} ways: "
            "their own name, another name, and the letters of that other name scrambled. CLIP "
            f"chooses among {len(names)} names: the shortest of the {named_count:,} names, of "
            f"{name_count:,}, that it finds for a picture of them, because a picture that CLIP "
            f"names wrongly cannot be misled ({right_share:.0%} of all held-out pictures of these "
            "names are named rightly; those come first here). Where the label changes to the wrong "
            "word more often than with scrambled letters, CLIP read the word; the other changes "
            "come from the strip that covers part of the picture.",
            f"The decoder draws {config.variations} variations of {len(varied.subset)} of the "
            f"pictures from their embeddings alone (seed {seed}). Three judges say what the "
            f"variations show: the attacked CLIP; {look_alike}, the nearest of {labelled} other "
            "pictures of these names; and OCR, which reads the wrong word on untouched pictures "
            "only by chance. The rows of the pictures themselves show how far to trust each judge.",
            "Below: attacked pictures, and to the right of each its variations, with the "
            f"{TOP} most likely names at CLIP's own temperature.",
        ],
        [*tables, table],
        [_figure_6_picture(config, attack, varied, chances, subject.out)],
    )


def _build_attack(
    subject: Subject,
    pairs: Pairs,
    picked: Sequence[int],
    names: list[str],
    labels: NDArray[np.int64],
    rng: np.random.Generator,
) -> Attack:
    """Read the picked pictures and draw a wrong name and a scrambled one for each."""
    others = (labels + rng.integers(1, len(names), len(labels))) % len(names)
    words = {
        "right": [names[label] for label in labels],
        "wrong": [names[label] for label in others],
        "scrambled": [scrambled(names[label], rng) for label in others],
    }
    pictures = [read_picture(pairs.rows[number], subject.shards, SIDE_PX) for number in picked]
    groups = [pairs.groups[number] for number in picked]
    return Attack(pictures, groups, names, labels, others, words)


def _vary(
    config: TypographicConfig,
    attack: Attack,
    way: Way,
    vary: Vary,
    rng: np.random.Generator,
    seed: int,
) -> _Varied:
    """Draw the decoder's variations of some pictures, untouched and with each kind of word."""
    subset = rng.permutation(len(attack.pictures))[: config.varied]
    pictures = {"": np.stack([attack.pictures[number] for number in subset])}
    for kind in VARIED[1:]:
        pictures[kind] = np.stack(attack.written(kind, way, subset))
    drawn = {kind: vary(images, config.variations, seed) for kind, images in pictures.items()}
    return _Varied(subset, pictures, drawn)


def _judge_variations(
    attack: Attack,
    varied: _Varied,
    classifier: _Classifier,
    looks: Looks | None,
    witnesses: Witnesses,
    subject: Subject,
) -> tuple[sections.Table, dict[tuple[str, str], Floats]]:
    """Judge pictures and variations; return the table and CLIP's probabilities (M, count, K).

    The probabilities are by kind of word and by what is judged, "the picture" or "variations".
    """
    rows: list[list[sections.Cell]] = []
    chances: dict[tuple[str, str], Floats] = {}
    for kind in VARIED:
        whole = {
            "the picture": varied.pictures[kind][:, None],
            "variations": varied.variations[kind],
        }
        for what, images in whole.items():
            count = images.shape[1]
            flat = images.reshape(-1, *images.shape[-3:])
            cosines = classifier.scores(list(flat))
            numbers = np.repeat(varied.subset, count)
            words = [attack.words[kind or "wrong"][number] for number in numbers]
            judged = judge(flat, words, cosines.argmax(1), looks, witnesses.read_text)
            groups = [attack.groups[number] for number in numbers]
            objects, others = attack.labels[numbers], attack.others[numbers]
            row = figures(judged, objects, others, groups, subject.resamples, subject.seed)
            rows.append([f"{what}, {kind + ' word' if kind else 'untouched'}", len(flat), *row])
            chances[kind, what] = probabilities(cosines, classifier.logit_scale).reshape(
                len(varied.subset), count, -1
            )
    caption = (
        "What the decoder draws from an attacked picture's embedding, by the attacked CLIP, by a "
        "network that it never met, and by OCR"
    )
    return sections.table(caption, VARIATIONS_HEAD, rows), chances


def _figure_6_picture(
    config: TypographicConfig,
    attack: Attack,
    varied: _Varied,
    chances: Mapping[tuple[str, str], Floats],
    out: Path,
) -> sections.Picture:
    """Write the first pictures with their variations, one row for each kind of word."""
    count = min(config.shown, len(varied.subset))
    rows = [(number, kind) for number in range(count) for kind in VARIED[1:]]
    page = figure_6(
        np.stack([varied.pictures[kind][number] for number, kind in rows]),
        np.stack([chances[kind, "the picture"][number, 0] for number, kind in rows]),
        attack.names,
        np.stack([varied.variations[kind][number] for number, kind in rows]),
        np.stack([chances[kind, "variations"][number] for number, kind in rows]),
    )
    folder = out / "pictures"
    folder.mkdir(parents=True, exist_ok=True)
    write_png(page, folder / "typographic.png")
    descriptions = []
    for number, kind in rows:
        position = varied.subset[number]
        name = attack.names[attack.labels[position]]
        descriptions.append(f"“{attack.words[kind][position]}” on {name}")
    return sections.picture(
        "pictures/typographic.png",
        f"Attacked pictures and their variations: {'; '.join(descriptions)}",
        "One row each",
    )


def _tables_of_words(
    attack: Attack, by_way: Mapping[str, Way], classifier: _Classifier, resamples: int, seed: int
) -> list[sections.Table]:
    """Return two tables of CLIP's labels: by kind of word, and by way for the wrong word."""
    labels, others = attack.labels, attack.others
    clean = classifier.scores(attack.pictures).argmax(1)
    predicted = {
        kind: np.stack(
            [classifier.scores(attack.written(kind, way)).argmax(1) for way in by_way.values()]
        )
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
    of_kinds = [untouched, *(row(f"{kind} word", predicted[kind]) for kind in WORDS)]
    of_ways = [
        row(name, predicted["wrong"][number : number + 1]) for number, name in enumerate(by_way)
    ]
    return [
        sections.table("What CLIP says with a word written on the picture", head, of_kinds),
        sections.table("The wrong word, by how it is written", head, of_ways),
    ]


def figure_6(
    attacked: Pixels, chances: Floats, names: Sequence[str], varied: Pixels, of_varied: Floats
) -> Pixels:
    """Draw one row for each attacked picture (N, S, S, 3): it and its variations.

    `varied` are (N, count, S', S', 3). Below each picture stand its TOP most likely names, by the
    probabilities `chances` (N, K) and `of_varied` (N, count, K).
    """
    line, gap, side = 15, 8, SIDE_PX
    column = side + 5 * gap  # a name of fifteen letters
    height, width = side + TOP * line + 2 * gap, (1 + varied.shape[1]) * column + 4 * gap
    page = Image.new("RGB", (width, height * len(attacked) + gap), PAPER)
    pen, letters = ImageDraw.Draw(page), ImageFont.load_default(11)
    for row, picture in enumerate(attacked):
        top = gap + row * height
        cells = [(picture, chances[row]), *zip(varied[row], of_varied[row], strict=True)]
        for number, (image, chance) in enumerate(cells):
            left = gap + number * column + (2 * gap if number else 0)
            resample = Image.Resampling.NEAREST if number else Image.Resampling.LANCZOS
            page.paste(Image.fromarray(image).resize((side, side), resample), (left, top))
            for rank, label in enumerate(np.argsort(-chance, kind="stable")[:TOP]):
                text = f"{chance[label]:.0%} {names[label]}"
                while letters.getlength(text) > column - gap:
                    text = text[:-1]
                pen.text((left, top + side + 2 + rank * line), text, fill=INK, font=letters)
    return np.asarray(page)
