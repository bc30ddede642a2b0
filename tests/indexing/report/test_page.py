"""The page stands alone, shows every figure, and lets nothing hostile through."""

import json
import tomllib
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from indexing.evaluation.evaluate import EvaluateConfig, evaluate
from indexing.report import page as report_page
from tests.helpers.evaluation_run import (
    HOSTILE,
    generate,
    manifest,
    row,
    subject,
    usual_rows,
    write_run,
)

CONFIG = {
    "data": {
        "sources": [
            {"kind": "packages", "packages": ["a@1", "b@2"]},
            {"kind": "folder", "path": 'C:\\x "y"\n'},
        ],
        "image_size_px": 64,
    },
    "clip": {
        "learning_rate": 2e-3,
        "betas": [0.9, 0.98],
        "is_causal": True,
        "seed": None,
        "scale": 1e-8,
    },
}


class Page(HTMLParser):
    """Collects what a page would load, run and say."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str]]] = []
        self.words: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, {name: value or "" for name, value in attrs}))

    def handle_data(self, data: str) -> None:
        self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())


def make(
    folder: Path,
    rows: list[dict[str, Any]],
    prompts: tuple[str, ...] = ("colour 3", "colour 14"),
    **facts: Any,
) -> dict[str, Any]:
    write_run(folder, rows)
    (folder / "out").mkdir()
    metrics = {
        "clip": [
            {"images_seen": 100 * step, "loss": 5 / step, "seconds": step} for step in range(1, 60)
        ]
    }
    counted = {
        "in": 24,
        "out": 24,
        "dropped": {},
        "parameters": 1670417,
        "loss": 0.9409561,
        "splits": {"train": 1},
    }
    stages = [manifest("ingest"), manifest("clip", {"ingest": "abc"}, **counted)]
    config = EvaluateConfig(prompts=prompts, count=2, resamples=200)
    return evaluate(config, {"config": CONFIG, **facts}, stages, metrics, subject(folder), generate)


@pytest.fixture(scope="module")
def usual(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Page]:
    folder = tmp_path_factory.mktemp("run")
    facts = make(folder, usual_rows())
    return facts, Page((folder / "out" / "report.html").read_text())


def assert_stands_alone(page: Page) -> None:
    """No script, no handler, no address to load from but data URIs, no link that leaves it or leads
    nowhere; every picture has a text.
    """
    places = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(set(places)) == len(places)
    assert {attributes["href"][1:] for tag, attributes in page.tags if tag == "a"} <= set(places)
    for tag, attributes in page.tags:
        assert tag not in {"script", "iframe", "object", "embed", "link", "base", "form"}
        assert not [name for name in attributes if name.startswith("on")]
        assert attributes.get("href", "#").startswith("#")
        for name in ("src", "srcset", "data", "action", "style"):
            assert (
                attributes.get(name, "data:").startswith("data:image/png;base64,")
                or name not in attributes
            )
        if tag == "img":
            assert attributes["alt"].strip()


def test_the_page_stands_alone(usual: tuple[dict[str, Any], Page]) -> None:
    facts, page = usual
    assert_stands_alone(page)
    policy = next(
        attributes["content"]
        for tag, attributes in page.tags
        if attributes.get("http-equiv") == "Content-Security-Policy"
    )
    assert policy == "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
    pictures = [attributes for tag, attributes in page.tags if tag == "img"]
    shown = facts["generation"]["n"] * 3 + sum(
        len(each["results"]) for found in facts["retrieval"].values() for each in found["examples"]
    )
    assert len(pictures) == shown


def test_a_stage_leads_to_what_it_was_made_from_where_that_is_on_the_page(tmp_path: Path) -> None:
    facts = make(tmp_path, usual_rows())
    ingest, clip = facts["stages"]
    assert clip["inputs"] == {"ingest": "abc"}  # another key than the page's

    def links(inputs: dict[str, str]) -> list[str]:
        page = Page(
            report_page.render(
                {**facts, "stages": [ingest, {**clip, "inputs": inputs}]}, tmp_path / "out"
            )
        )
        assert_stands_alone(page)
        return [
            attributes["href"]
            for tag, attributes in page.tags
            if tag == "a" and attributes["href"].startswith("#stage-")
        ]

    assert links({"ingest": "abc"}) == [] and links({"ingest": ingest["key"]}) == ["#stage-ingest"]


def test_every_figure_is_on_the_page(tmp_path: Path) -> None:
    facts = json.loads(json.dumps(make(tmp_path, usual_rows())))
    numbers = iter(range(1, 1000))
    shares, scores = [], []

    def mark(value: Any, name: str = "") -> None:
        """Give every figure numbers that stand nowhere else."""
        if isinstance(value, dict) and "low" in value:
            (
                scores
                if name in ("clip_score", "mismatched", "real_pairs", "samples", "unseen")
                else shares
            ).append((name, value))
            value |= {
                each: next(numbers) / 1000
                for each in ("value", "low", "high", "chance", "majority")
                if each in value
            }
        elif isinstance(value, dict):
            for key, each in value.items():
                mark(each, key)

    for section in ("zero_shot", "retrieval", "generation"):
        mark(facts[section])
    assert (len(shares), len(scores)) == (2 * 5 * 3 + 2 * 2 * 2 * 3 + 1, 3 + 4)
    for _, figure in scores:
        figure |= {each: 1000 * figure[each] for each in ("value", "low", "high")}
    page = Page(report_page.render(facts, tmp_path / "out"))
    for name, figure in shares:
        assert f"{100 * figure['value']:.1f} %" in page.text
        if name not in ("top_5", "mean_per_class"):
            assert f"{100 * figure['low']:.1f} to {100 * figure['high']:.1f}" in page.text
            assert all(
                f"{100 * figure[each]:.1f} %" in page.text
                for each in ("chance", "majority")
                if each in figure
            )
    for name, figure in scores:
        assert (
            f"{figure['value']:,.1f}" in page.text or f"{100 * figure['value']:,.1f}" in page.text
        ), name


def test_the_run_is_on_the_page(usual: tuple[dict[str, Any], Page]) -> None:
    facts, page = usual
    for words in (
        "colour 14 not a training caption",
        "colour 3 a training caption",
        "2 decode_error",
        "1 min 6 s",
        "1.2 MB",
        "numpy",
        "CC0",
    ):
        assert words in page.text
    assert facts["stages"][1]["key"][:8] in page.text
    assert [tag for tag, attributes in page.tags if attributes.get("class") == "curve"] == [
        "svg"
    ]  # of clip; ingest has no loss


def test_hostile_texts_stay_texts(tmp_path: Path) -> None:
    hostile = {
        "caption": HOSTILE,
        "captions": [HOSTILE],
        "licence": HOSTILE,
        "style": HOSTILE,
        "category": HOSTILE,
        "origin": "javascript:alert(1)",
    }
    rows = usual_rows() + [
        row(number, "plain", split, **hostile)
        for number in (1, 2)
        for split in ("train", "held_out_concept")
    ]
    # A picture's name on disk comes from its key and its prompt: neither may climb out of the
    # folder.
    rows += [row(5, "plain", "train", key="../../../evil")]
    make(tmp_path, rows, prompts=(HOSTILE, "../../up"), name=HOSTILE)
    text = (tmp_path / "out" / "report.html").read_text()
    page = Page(text)
    assert_stands_alone(page)
    assert "<script" not in text
    assert HOSTILE in "".join(
        page.words
    )  # shown as it is: not run, not lost, its braces not taken for a template
    assert any(
        HOSTILE in attributes.get("alt", "") for tag, attributes in page.tags if tag == "img"
    )
    assert {path.parent for path in tmp_path.rglob("*.png")} == {tmp_path / "out" / "pictures"}


def test_the_recipe_reads_back() -> None:
    text = report_page.toml_text(CONFIG)
    wanted = {
        name: {key: value for key, value in section.items() if value is not None}
        for name, section in CONFIG.items()
    }
    assert tomllib.loads(text) == wanted
    assert "# seed is not set" in text


def test_a_page_without_a_recipe_stages_and_losses(tmp_path: Path) -> None:
    facts = make(tmp_path, usual_rows())
    facts |= {
        "run": facts["run"] | {"config": {}, "started": None, "finished": None, "packages": {}},
        "stages": [],
    }
    page = Page(report_page.render(json.loads(json.dumps(facts)), tmp_path / "out"))
    assert "No stage recorded a loss." in page.text
    assert "recipe" not in page.text


def test_stage_facts_come_from_the_manifest() -> None:
    found = report_page.stage_facts(manifest("index", {"embed": "e"}, factory="Flat"), ())
    assert found["seconds"] == 65.5
    assert (found["in"], found["out"], found["dropped"], found["bytes"], found["more"]) == (
        40,
        38,
        {"decode_error": 2},
        1234567,
        {"factory": "Flat"},
    )
    assert "loss" not in found


def test_losses_that_are_not_finite_are_left_out() -> None:
    rows = [
        {"images_seen": n, "loss": loss}
        for n, loss in enumerate((float("nan"), 4.0, None, 2.0, float("inf")))
    ] + [{"images_seen": 9}]
    found = report_page.stage_facts(manifest("clip"), rows)
    assert found["curve"] == [(1, 4.0), (3, 2.0)]
    assert found["loss"] == {"value": 2.0, "n": 1, "images_seen": 3}


def test_a_long_curve_is_thinned_to_means() -> None:
    thin = report_page.thinned([(x, float(x % 2)) for x in range(1, 1001)], 100)
    assert len(thin) == 100
    assert thin[0] == (10, 0.5)
    assert thin[-1][0] == 1000


def test_package_versions_that_differ_are_all_named() -> None:
    other = manifest("clip") | {"packages": {"numpy": "2.5.0"}}
    assert report_page.run_facts({}, [manifest("ingest"), other])["packages"] == {
        "numpy": ["2.4.6", "2.5.0"],
        "python": ["3.11.7"],
    }


@pytest.mark.parametrize(
    ("figure", "says"),
    [
        ({"low": 0.3, "high": 0.4, "chance": 0.1, "majority": 0.2}, "above chance and majority"),
        ({"low": 0.15, "high": 0.4, "chance": 0.1, "majority": 0.2}, "above chance, not majority"),
        ({"low": 0.05, "high": 0.4, "chance": 0.1, "majority": 0.2}, "not different from chance"),
        ({"low": 0.01, "high": 0.05, "chance": 0.1}, "below chance"),
        ({"low": 0.2, "high": 0.4, "chance": 0.1}, "above chance"),
        ({"low": None, "high": None, "chance": 0.1}, ""),
    ],
)
def test_the_verdict_follows_the_interval(figure: dict[str, Any], says: str) -> None:
    assert report_page.verdict(figure) == says


def test_numbers_for_people() -> None:
    assert [report_page.percent(each) for each in (None, 0, 0.4123, 0.0004, 1)] == [
        "–",
        "0.0 %",
        "41.2 %",
        "0.04 %",
        "100.0 %",
    ]
    assert report_page.interval({"low": 0.1, "high": 0.25}) == "10.0 to 25.0"
    assert report_page.interval({"low": None, "high": None}) == "–"
    assert [report_page.number(None), report_page.number(12345), report_page.number(1.25, 1)] == [
        "–",
        "12,345",
        "1.2",
    ]
    assert [report_page.megabytes(2_500_000), report_page.megabytes(1500)] == ["2.5 MB", "1.5 kB"]
