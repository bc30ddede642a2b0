"""The card of an exported system, in Markdown: what it is, how to draw with it, what it was measured at, what it was made from.

Every number comes from the run's own manifests and report; what was not measured is said to be missing. Words that come from data
(styles, licences, run names) are hostile until `plain` has been over them.
"""

from collections.abc import Mapping, Sequence
from typing import Any

USE = """```python
from training.generation.unclip import Unclip
pictures = Unclip.load("{folder}").generate(["a red heart"], count=4, seed=0)  # uint8 (1, 4, {side}, {side}, 3)
```

This needs this project's code and, of its dependencies, torch, numpy, pydantic, safetensors and tokenizers alone: no Ray, no Prefect, no
network (`pip install --no-deps -e .` in the checkout, then these five)."""

LIMITS = """- It knows what its training pictures show and the words that were put to them, nothing else.
- One forward pass cannot reason about relations ("a red cube on top of a blue cube") and does not write (unCLIP, section 7).
- z_i says little about which attribute belongs to which object; the decoder may mix them.
- The weights are derived from the pictures above: their licences apply to what one does with samples that come close to one of them;
  `report.html` of the run shows each sample beside its nearest training pictures."""


def card(
    record: Mapping[str, Any],
    manifests: Mapping[str, Mapping[str, Any]],
    facts: Mapping[str, Mapping[str, Any]],
    pictures: Mapping[str, Mapping[str, int]],
    report: Mapping[str, Any] | None,
) -> str:
    """Return the card; `facts` are the models' config.json, `pictures` training pictures by licence and by style, `report` report.json."""
    side_px = facts["decoder"]["decoder"]["image_size_px"]
    parts = [
        f"---\npipeline_tag: text-to-image\ntags: [unclip]\n---\n\n# {plain(record['name'])}",
        f"A text-to-image system of the unCLIP kind (Ramesh et al. 2022, arXiv 2204.06125): CLIP, a prior and a decoder of {side_px} px, "
        f"trained {_day(manifests['clip'])} to {_day(manifests['decoder'])} by the recipe `{plain(record['recipe'])}`.",
        "## Use\n\n" + USE.format(folder="this folder", side=side_px) + _enlarged(facts),
        "## Models\n\n" + _models(manifests, facts),
        "## Measured\n\n" + _measured(report),
        "## Data\n\n" + _data(pictures),
        "## Limits\n\n" + LIMITS,
        "## Lineage\n\n`lineage.json` holds the manifest of every stage: resolved config, inputs, counts, checksums, package versions.\n\n"
        + _table(
            ("stage", "key", "made"),
            [(stage, f"`{each['key']}`", each["finished"]) for stage, each in manifests.items()],
        ),
    ]
    return "\n\n".join(parts) + "\n"


def plain(text: Any) -> str:
    """Return a text as one line that Markdown and HTML read as words."""
    line = " ".join(str(text).split())[:200]
    return "".join(
        f"&#{ord(letter)};" if letter in "<>&`*_[]()|\\#!~" else letter for letter in line
    )


def _enlarged(facts: Mapping[str, Mapping[str, Any]]) -> str:
    sides = [
        each["upsampler"]["image_size_px"]
        for name, each in facts.items()
        if name.startswith("upsampler")
    ]
    return (
        f" `generate(..., upsample=True)` enlarges what it draws to {max(sides)} px."
        if sides
        else ""
    )


def _models(manifests: Mapping[str, Any], facts: Mapping[str, Any]) -> str:
    rows = [
        (
            stage,
            f"{each['parameters'] / 1e6:.2f} M" if "parameters" in each else "",
            f"{manifests[stage]['counts']['images_seen']:,}"
            if "images_seen" in manifests[stage]["counts"]
            else "",
            f"{manifests[stage]['counts']['loss']:.4f}"
            if "loss" in manifests[stage]["counts"]
            else "",
        )
        for stage, each in facts.items()
    ]
    return _table(("model", "parameters", "images seen", "last loss"), rows) + (
        f"\n\nEmbeddings have {facts['prior']['embed_dim']} dimensions; captions up to {facts['prior']['context']} tokens of a "
        f"vocabulary of {facts['prior']['vocab_size']:,}. Weights are exponential moving averages, float32."
    )


def _measured(report: Mapping[str, Any] | None) -> str:
    if report is None:
        return "This run was not evaluated: nothing is known of its quality (`unclip evaluate`)."
    rows = []
    for split, labels in report["zero_shot"].items():
        for label, found in labels.items():
            if "top_1" in found:
                name = f"zero-shot {label.replace('_', ' ')}, {split.replace('_', ' ')}: top-1 of {found['classes']:,}"
                rows.append(
                    (
                        name,
                        _share(found["top_1"]),
                        f"{found['n']:,}",
                        _share({"value": found["top_1"].get("chance")}),
                    )
                )
    for split, found in report["retrieval"].items():
        for way in ("text_to_image", "image_to_text"):
            if way in found:
                name = f"retrieval {way.replace('_', ' ')}, {split.replace('_', ' ')}: recall@10"
                figure = found[way]["recall@10"]
                rows.append(
                    (
                        name,
                        _share(figure),
                        f"{figure['n']:,}",
                        _share({"value": figure.get("chance")}),
                    )
                )
    generation = report["generation"]
    for name, key in (("CLIP score of samples (its own CLIP)", "clip_score"), ("the same with other prompts", "mismatched"),
                      ("the same of real held-out pairs", "real_pairs")):  # fmt: skip
        rows.append((name, _number(generation[key]), f"{generation[key]['n']:,}", ""))
    rows.append(("own prompt scores highest", _share(generation["own_prompt_first"]), f"{generation['own_prompt_first']['n']:,}",
                 _share({"value": generation["own_prompt_first"].get("chance")})))  # fmt: skip
    table = _table(("figure", "value (95 % interval)", "n", "chance"), rows)
    return f"![samples](samples.png)\n\n{table}\n\nThe CLIP score is this system's own CLIP's: it compares runs of one CLIP, not systems."


def _data(pictures: Mapping[str, Mapping[str, int]]) -> str:
    if not pictures:
        return "What it was trained on is not recorded in this run."
    parts = []
    for name, counts in pictures.items():
        rows = [(plain(each), f"{count:,}") for each, count in counts.items()]
        parts.append(f"Training pictures by {name}:\n\n" + _table((name, "pictures"), rows))
    return "\n\n".join(parts)


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _share(figure: Mapping[str, Any]) -> str:
    if figure["value"] is None:
        return ""
    low, high = figure.get("low"), figure.get("high")
    interval = (
        f" ({100 * low:.1f} to {100 * high:.1f})" if low is not None and high is not None else ""
    )
    return (
        f"{100 * figure['value']:.1f} %{interval}"
        if figure["value"] >= 0.001
        else f"{100 * figure['value']:.2f} %{interval}"
    )


def _number(figure: Mapping[str, Any]) -> str:
    if figure["value"] is None:
        return ""
    return f"{figure['value']:.1f}" + (
        f" ({figure['low']:.1f} to {figure['high']:.1f})" if figure["low"] is not None else ""
    )


def _day(manifest: Mapping[str, Any]) -> str:
    return str(manifest["finished"])[:10]
