"""The harness gives a perfect drawer everything and a wrong one nothing, finds a blind CLIP blind,
and search pays where it should.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from indexing.data.held_out import open_embedded
from indexing.evaluation.context import Subject
from indexing.evaluation.relations import (
    TITLE,
    RelationsConfig,
    build_prompts,
    exchanged,
    relations,
)
from indexing.report import sections
from indexing.scenes import scenes
from indexing.scenes.scenes import Scene, Thing, parse
from tests.benchmarks import search_at_inference
from tests.helpers.evaluation_run import row, subject, write_run

CONFIG = RelationsConfig(prompts_per_row=3, samples=4, steps=10, searched=("position",))
CAPTIONS = {
    "position": [
        "a red circle on top of a blue square",
        "a blue square inside a green circle",
        "a red square to the left of a blue circle",
    ],
    "attribution": ["a blue square and a red circle", "a green triangle and a red square"],
    "counting": ["three blue circles", "two red squares"],
    "writing": ["a sign that says cat"],
}


def write(folder: Path) -> Any:
    rows = [
        row(number, "plain", split, caption=caption, concept=parse(caption).concept, category=name)  # type: ignore[union-attr]
        for name, captions in CAPTIONS.items()
        for number, caption in enumerate(captions)
        for split in [("held_out_concept" if number else "train")]
    ]
    write_run(folder, rows)
    return open_embedded(folder / "embed")


def texts_of(texts: list[str]) -> np.ndarray:
    """Embed a text as a direction of its own."""
    return np.stack(
        [np.random.default_rng(sum(text.encode())).normal(size=8) for text in texts]
    ).astype(np.float32)


def blind(pictures: np.ndarray) -> np.ndarray:
    """Embed a picture by its brightness alone."""
    return np.stack(
        [np.random.default_rng(int(picture.sum())).normal(size=8) for picture in pictures]
    ).astype(np.float32)


def drawer(chance: float, calls: list[tuple[int, int, bool]]) -> Any:
    """Draw what is asked for with this chance, else another thing; a beam and a long sample are
    right twice as often.
    """

    def draw(
        prompts: list[str],
        members: int,
        seed: int,
        steps: int,
        score: Any,
        keep: int,
        checks: tuple[float, ...],
    ) -> np.ndarray:
        calls.append((members, steps, score is not None))
        made = []
        for prompt in prompts:
            for member in range(members):
                rng = np.random.default_rng([seed, sum(prompt.encode()), member])
                scene = parse(prompt)
                assert scene is not None
                is_right = rng.uniform() < (chance if score is None and members > 1 else 2 * chance)
                made.append(scenes.draw(scene if is_right else Scene(word="no"), 32, rng))
        if score is not None:
            scores = score(np.stack(made), np.repeat(np.arange(len(prompts)), members))
            assert scores.shape == (len(prompts) * members,)
        return np.stack(made).reshape(len(prompts), members, 32, 32, 3)

    return draw


def judged(folder: Path) -> Subject:
    """Return what lies in the folder, judged by a CLIP that knows every text and of pictures their
    brightness.
    """
    return subject(folder, texts_of, blind)


def measured(folder: Path, chance: float, calls: list[tuple[int, int, bool]] | None = None) -> Any:
    write(folder)
    found = relations(
        CONFIG, judged(folder), drawer(chance, calls if calls is not None else []), None
    )
    assert all((folder / "out" / each["picture"]).is_file() for each in found["pictures"])
    return found


def test_a_perfect_drawer_has_every_row(tmp_path: Path) -> None:
    calls: list[tuple[int, int, bool]] = []
    found = measured(tmp_path, 1.0, calls)
    trained, held_out = found["tables"][:2]
    assert [each[0] for each in trained["rows"]] == [
        "single object",
        "two objects",
        "counting",
        "position",
        "attribution",
    ]
    assert [each[0] for each in held_out["rows"]] == ["counting", "position", "attribution"]
    assert all(
        figure["value"] == 1
        for table in (trained, held_out)
        for each in table["rows"]
        for figure in each[2:5]
    )
    assert calls == [
        (4, 10, False),
        (1, 40, False),
        (4, 10, True),
        (4, 10, True),
    ]  # equal calls: one long sample, four short ones, beams
    assert any("Writing is not measured" in each for each in found["text"])


def test_a_wrong_drawer_has_none(tmp_path: Path) -> None:
    found = measured(tmp_path, 0.0)
    assert all(
        figure["value"] == 0
        for table in found["tables"][:2]
        for each in table["rows"]
        for figure in each[2:5]
    )
    assert found["tables"][0]["rows"][0][5]["value"] is None  # nothing right to prefer


def test_search_by_the_checker_beats_one_sample_and_a_blind_clip_does_not_help(
    tmp_path: Path,
) -> None:
    found = measured(tmp_path, 0.4)
    (chart,) = found["charts"]
    series = {
        name: {point["x"]: point["value"] for point in points}
        for name, points in chart["series"].items()
    }
    assert set(series["best of n by checker"]) == {10, 20, 40} and set(
        series["one sample, more steps"]
    ) == {10, 40}
    assert (
        series["best of n by checker"][40]
        >= series["best of n by checker"][20]
        > series["best of n by checker"][10]
    )
    assert series["beam by checker"][40] >= series["best of n by checker"][40]
    for table in found["tables"][:2]:
        for each in table["rows"]:
            assert each[4]["value"] >= each[2]["value"]
    against = found["tables"][2]
    (gains,) = against["rows"]
    assert against["head"][1:3] == ["more steps", "one of 4, unjudged"] and gains[0] == "position"
    plain = max(figure["value"] for figure in gains[1:3])
    assert plain > min(figure["value"] for figure in gains[1:3])
    by_checker = dict(zip(against["head"], gains, strict=True))["best of 4 by checker"]
    untold = [
        name
        for name, gain in zip(against["head"][3:], gains[3:], strict=True)
        if gain["low"] <= 0 <= gain["high"]
    ]
    (said,) = [
        each for each in found["text"] if each.startswith("Not significantly different from plain")
    ]
    assert (
        untold
        and all(f"{name} for position" in said for name in untold)
        and said.count(" for position") == len(untold)
    )
    assert by_checker["unit"] == "points" and by_checker["value"] == pytest.approx(
        100 * (series["best of n by checker"][40] - plain)
    )
    assert found["tables"][3]["rows"][0][:2] == ["position", 3]


@pytest.mark.parametrize(("samples", "most"), [(2, 2), (6, 4), (8, 8), (9, 8)])
def test_equal_calls_are_those_that_were_made(tmp_path: Path, samples: int, most: int) -> None:
    calls: list[tuple[int, int, bool]] = []
    config = CONFIG.model_copy(update={"samples": samples})
    write(tmp_path)
    found = relations(config, judged(tmp_path), drawer(0.4, calls), None)
    (against,) = [each for each in found["tables"] if each["caption"].startswith("Search against")]
    assert f" = {10 * most} for a returned picture" in against["caption"]
    beams = [f"beam of {most} by {by}" for by in ("CLIP", "checker") if most > config.keep]
    assert set(against["head"][1:]) == {
        "more steps",
        f"one of {most}, unjudged",
        *(f"best of {most} by {by}" for by in ("CLIP", "checker")),
        *beams,
    }
    assert (
        max(members * steps for members, steps, is_scored in calls if is_scored or members == 1)
        == 10 * most
    )


def test_the_characters_of_signs_are_counted_beside_those_of_drawn_ones(tmp_path: Path) -> None:
    embedded = write(tmp_path)
    place = [each.row for each in build_prompts(CONFIG, embedded, lambda picture: "", 0)].index(
        "writing"
    )
    taught = scenes.draw(Scene(word="cat"), 32, np.random.default_rng([0, place]))

    def reader(picture: np.ndarray) -> str:
        return "cat" if np.array_equal(picture, taught) else "co"

    found = relations(CONFIG, judged(tmp_path), drawer(1.0, []), reader)
    (table,) = [each for each in found["tables"] if each["caption"].startswith("How much")]
    (signs,) = table["rows"]
    assert signs[:2] == ["writing, trained", 1] and signs[5]["value"] == 1
    assert all(
        figure["value"] == pytest.approx(1 / 3) for figure in signs[2:5]
    )  # of three letters, two are to be changed


def test_prompts_are_the_splits_own_and_an_ocr_brings_writing_in(tmp_path: Path) -> None:
    embedded = write(tmp_path)
    without = build_prompts(CONFIG, embedded, None, 0)
    assert {each.prompt for each in without if each.split_name == "held out"} == {
        parse(c).concept for cs in CAPTIONS.values() for c in cs[1:]
    }  # type: ignore[union-attr]
    assert not [each for each in without if each.row == "writing"]
    within = [
        each
        for each in build_prompts(CONFIG, embedded, lambda picture: "cat", 0)
        if each.row == "writing"
    ]
    assert [each.prompt for each in within] == ["a sign that says cat"] and within[0].judge(
        np.zeros((8, 8, 3), np.uint8)
    ) == 1


def test_a_run_without_scenes_says_so(tmp_path: Path) -> None:
    write_run(tmp_path, [row(1, "plain", "held_out_concept")])
    found = relations(CONFIG, judged(tmp_path), drawer(1, []), None)
    assert "no scenes" in found["text"][0] and not found["tables"]


@pytest.mark.parametrize(
    ("caption", "turned"),
    [
        ("a red circle on top of a blue square", "a blue square on top of a red circle"),
        ("a red circle and a blue square", "a blue circle and a red square"),
    ],
)
def test_exchanging(caption: str, turned: str) -> None:
    scene = parse(caption)
    assert (
        scene is not None
        and exchanged(scene).caption == turned
        and exchanged(exchanged(scene)) == scene
    )
    assert Thing("circle", "red") in scene.things


def test_the_benchmark_reads_a_report_and_fails_where_search_does_not_pay(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def figure(value: float, low: float, high: float) -> dict[str, Any]:
        return {"value": value, "low": low, "high": high, "n": 24, "groups": 24, "unit": "points"}

    def ended(
        position: dict[str, Any], rows: tuple[str, ...] = ("position", "attribution")
    ) -> tuple[int, str]:
        head = [
            "Row",
            "more steps",
            "best of 8 by CLIP",
            "best of 8 by checker",
            "beam of 8 by checker",
        ]
        plain = {**figure(0.5, 0.4, 0.6), "unit": "share"}
        cells = {
            "position": [plain, figure(9, 2, 15), position, figure(3, -4, 9)],
            "attribution": [plain, *[figure(8, 1, 15)] * 3],
        }
        against = sections.table(
            "Search against plain sampling at equal calls",
            head,
            [[row, *cells[row]] for row in rows],
        )
        made = sections.section(TITLE, tables=[against])
        (tmp_path / "report.json").write_text(
            json.dumps({"run": {}, "stages": [], "zero_shot": {}, "sections": [made]})
        )
        monkeypatch.setattr(
            "sys.argv", ["search_at_inference", "--root", str(tmp_path), "--run", str(tmp_path)]
        )
        return search_at_inference.main(), capsys.readouterr().out

    code, said = ended(figure(12, 3, 21))
    assert (
        code == 0
        and "| position | 50.0 % (40.0 to 60.0) | 9 (2 to 15) | 12 (3 to 21) | 3 (-4 to 9) |"
        in said
        and ": yes" in said
    )
    code, said = ended(figure(6, -2, 14))  # what CLIP's search gains is no matter
    assert (
        code == 1
        and "not told from plain sampling: position: best of 8 by checker 6 (-2 to 14)" in said
    )
    code, said = ended(figure(12, 3, 21), ("position",))
    assert code == 1 and "attribution: not searched" in said
    monkeypatch.setattr("sys.argv", ["search_at_inference"])
    assert search_at_inference.main() == 0 and capsys.readouterr().out.startswith("skipped")
