"""The model card of an exported system, in Markdown: use, models, measurements, data and limits.

Every number comes from the run's manifests and report; missing measurements are named as missing.
Text from data (styles, licences, run names) is untrusted and must pass through `plain`. Reads and
writes no files.
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Literal, TypedDict

if TYPE_CHECKING:  # its figures import numpy, which the card does not need
    from flows.runs.record_schema import RunRecord
    from indexing.metrics.bootstrap import Figure
    from indexing.report.report_types import Report
    from infra.storage.manifest_schema import Manifest

USE = """```python
from training.generation.unclip import Unclip
unclip = Unclip.load("{folder}")
pictures = unclip.generate(["a red heart"], count=4, seed=0)  # uint8 (1, 4, {side}, {side}, 3)
```

This needs this project's code and, of its dependencies, only torch, numpy, pydantic, safetensors
and tokenizers: no Ray, no Prefect, no network (`pip install --no-deps -e .` in the checkout, then
these five)."""

LIMITS = """- It knows only what its training pictures show and the words in their captions.
- One forward pass cannot reason about relations ("a red cube on top of a blue cube") and does not
  write text (unCLIP, section 7).
- z_i says little about which attribute belongs to which object; the decoder may mix them.
- The weights are derived from the pictures above: their licences apply to the use of samples that
  are close to one of them; `report.html` of the run shows each sample beside its nearest training
  pictures."""


class PixelSection(TypedDict):
    """The section of a model that draws pixels."""

    image_size_px: int


class ModelConfig(TypedDict, total=False):
    """A model's config.json, as far as the card reads it."""

    parameters: int
    embed_dim: int
    context: int
    vocab_size: int
    decoder: PixelSection
    upsampler: PixelSection


def card(
    record: "RunRecord",
    manifests: "Mapping[str, Manifest]",
    facts: Mapping[str, ModelConfig],
    pictures: Mapping[str, Mapping[str, int]],
    report: "Report | None",
) -> str:
    """Return the card as Markdown.

    `facts` holds each model's config.json, `pictures` the number of training images by licence and
    by style, and `report` the run's report.json, or None.
    """
    side_px = facts["decoder"]["decoder"]["image_size_px"]
    parts = [
        f"---\npipeline_tag: text-to-image\ntags: [unclip]\n---\n\n# {plain(record['name'])}",
        f"A text-to-image system of the unCLIP kind (Ramesh et al. 2022, arXiv 2204.06125): "
        f"CLIP, a prior and a decoder of {side_px} px, trained {_day(manifests['clip'])} to "
        f"{_day(manifests['decoder'])} by the recipe `{plain(record['recipe'])}`.",
        "## Use\n\n" + USE.format(folder="this folder", side=side_px) + _enlarged(facts),
        "## Models\n\n" + _models(manifests, facts),
        "## Measured\n\n" + _measured(report),
        "## Data\n\n" + _data(pictures),
        "## Limits\n\n" + LIMITS,
        "## Lineage\n\n`lineage.json` holds the manifest of every stage: resolved config, inputs, "
        "counts, checksums, package versions.\n\n"
        + _table(
            ("stage", "key", "made"),
            [
                (stage, f"`{manifest['key']}`", manifest["finished"])
                for stage, manifest in manifests.items()
            ],
        ),
    ]
    return "\n\n".join(parts) + "\n"


def plain(text: object) -> str:
    """Return a text as one line, with the characters special to Markdown and HTML escaped."""
    line = " ".join(str(text).split())[:200]
    return "".join(
        f"&#{ord(letter)};" if letter in "<>&`*_[]()|\\#!~" else letter for letter in line
    )


def _enlarged(facts: Mapping[str, ModelConfig]) -> str:
    sides = [
        fact["upsampler"]["image_size_px"]
        for name, fact in facts.items()
        if name.startswith("upsampler")
    ]
    return (
        f" `generate(..., upsample=True)` enlarges what it draws to {max(sides)} px."
        if sides
        else ""
    )


def _models(manifests: "Mapping[str, Manifest]", facts: Mapping[str, ModelConfig]) -> str:
    rows = [
        (
            stage,
            f"{fact['parameters'] / 1e6:.2f} M" if "parameters" in fact else "",
            f"{manifests[stage]['counts']['images_seen']:,}"
            if "images_seen" in manifests[stage]["counts"]
            else "",
            f"{manifests[stage]['counts']['loss']:.4f}"
            if "loss" in manifests[stage]["counts"]
            else "",
        )
        for stage, fact in facts.items()
    ]
    return _table(("model", "parameters", "images seen", "last loss"), rows) + (
        f"\n\nEmbeddings have {facts['prior']['embed_dim']} dimensions; captions have up to "
        f"{facts['prior']['context']} tokens from a vocabulary of "
        f"{facts['prior']['vocab_size']:,}. Weights are exponential moving averages, float32."
    )


Row = tuple[str, str, str, str]
"""Figure, value, n and chance level of one line of the table of measurements."""
DIRECTIONS: tuple[Literal["text_to_image", "image_to_text"], ...] = (
    "text_to_image",
    "image_to_text",
)


def _measured(report: "Report | None") -> str:
    if report is None:
        return "This run was not evaluated, so its quality is unknown (`unclip evaluate`)."
    table = _table(
        ("figure", "value (95 % interval)", "n", "chance"),
        [*_zero_shot_rows(report), *_retrieval_rows(report), *_generation_rows(report)],
    )
    return (
        f"![samples](samples.png)\n\n{table}\n\n"
        "The CLIP score is this system's own CLIP's: it compares runs of one CLIP, not systems."
    )


def _zero_shot_rows(report: "Report") -> list[Row]:
    return [
        (
            f"zero-shot {_words(label)}, {_words(split)}: top-1 of {figures['classes']:,}",
            _share(figures["top_1"]),
            f"{figures['n']:,}",
            _chance(figures["top_1"]),
        )
        for split, labels in report["zero_shot"].items()
        for label, figures in labels.items()
        if "top_1" in figures
    ]


def _retrieval_rows(report: "Report") -> list[Row]:
    rows = []
    for split, figures in report["retrieval"].items():
        for direction in DIRECTIONS:
            if direction in figures:
                figure = figures[direction]["recall@10"]
                name = f"retrieval {_words(direction)}, {_words(split)}: recall@10"
                rows.append((name, _share(figure), f"{figure['n']:,}", _chance(figure)))
    return rows


def _generation_rows(report: "Report") -> list[Row]:
    generation = report["generation"]
    scores = {
        "CLIP score of samples (its own CLIP)": generation["clip_score"],
        "the same with other prompts": generation["mismatched"],
        "the same of real held-out pairs": generation["real_pairs"],
    }
    rows = [(name, _number(score), f"{score['n']:,}", "") for name, score in scores.items()]
    first = generation["own_prompt_first"]
    rows.append(("own prompt scores highest", _share(first), f"{first['n']:,}", _chance(first)))
    return rows


def _words(name: str) -> str:
    return name.replace("_", " ")


def _chance(figure: "Figure") -> str:
    chance = figure.get("chance")
    return "" if chance is None else _percent(chance)


def _data(pictures: Mapping[str, Mapping[str, int]]) -> str:
    if not pictures:
        return "What it was trained on is not recorded in this run."
    parts = []
    for name, counts in pictures.items():
        rows = [(plain(source), f"{count:,}") for source, count in counts.items()]
        parts.append(f"Training pictures by {name}:\n\n" + _table((name, "pictures"), rows))
    return "\n\n".join(parts)


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _share(figure: "Figure") -> str:
    value, low, high = figure["value"], figure["low"], figure["high"]
    if value is None:
        return ""
    if low is None or high is None:
        return _percent(value)
    return f"{_percent(value)} ({100 * low:.1f} to {100 * high:.1f})"


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %" if share >= 0.001 else f"{100 * share:.2f} %"


def _number(figure: "Figure") -> str:
    value, low, high = figure["value"], figure["low"], figure["high"]
    if value is None:
        return ""
    if low is None or high is None:
        return f"{value:.1f}"
    return f"{value:.1f} ({low:.1f} to {high:.1f})"


def _day(manifest: "Manifest") -> str:
    return str(manifest["finished"])[:10]
