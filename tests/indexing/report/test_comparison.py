"""Comparing runs: every figure with a value is there, differences and their intervals are right,
and the page stands alone in a browser.
"""

import copy
import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from flows.cli.main import main
from indexing.evaluation.fidelity import FidelityConfig, fidelity
from indexing.metrics.bootstrap import mean_figure
from indexing.report.comparison import changed, compare, difference, figures, is_significant, render
from indexing.report.sections import section, table
from tests.helpers.evaluation_run import HOSTILE, draw, row, subject, usual_rows, write_run
from tests.indexing.report.test_page import Page, assert_stands_alone, make

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")


@pytest.fixture(scope="module")
def facts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return make(tmp_path_factory.mktemp("run"), usual_rows())


def other(facts: dict[str, Any]) -> dict[str, Any]:
    made = copy.deepcopy(facts)
    made["zero_shot"]["held_out_style"]["name"]["top_1"] |= {"value": 0.2, "low": 0.1, "high": 0.3}
    made["run"]["config"]["clip"]["learning_rate"] = 0.5
    made["sections"] = [
        section(
            HOSTILE,
            tables=[
                table(
                    "t",
                    ["Row", "Score"],
                    [["a", mean_figure([3, 5], [0, 1], 200, 0, unit="score")]],
                )
            ],
        )
    ]
    return made


def test_every_figure_is_found_at_its_place(facts: dict[str, Any]) -> None:
    found = figures(other(facts))
    assert found["zero shot", "held out style", "name", "top 1"]["value"] == 0.2
    assert found[HOSTILE, "t", "a", "Score"]["value"] == 4
    assert ("generation", "clip score") in found and (
        "retrieval",
        "held out concept",
        "text to image",
        "recall@10",
    ) in found
    assert all(figure["value"] is not None for figure in found.values())


def test_a_run_does_not_differ_from_itself(facts: dict[str, Any]) -> None:
    rows = compare({"a": facts, "b": copy.deepcopy(facts)})
    assert len(rows) > 20 and not any(row["differs"] for row in rows)
    assert all(row["differences"]["b"]["value"] == 0 for row in rows)


def test_what_differs_is_told_and_what_one_run_lacks_is_none(facts: dict[str, Any]) -> None:
    rows = {tuple(row["place"]): row for row in compare({"a": facts, "b": other(facts)})}
    assert [place for place, row in rows.items() if row["differs"]] == [
        ("zero shot", "held out style", "name", "top 1")
    ]
    assert rows["zero shot", "held out style", "name", "top 1"]["differences"]["b"][
        "value"
    ] == pytest.approx(-0.8)
    lacking = rows[HOSTILE, "t", "a", "Score"]
    assert lacking["runs"]["a"] is None and lacking["differences"]["b"] is None
    assert changed({"a": facts["run"]["config"], "b": other(facts)["run"]["config"]}) == [
        ("clip.learning_rate", ["0.002", "0.5"])
    ]


def test_distances_between_sets_are_compared_where_they_were_measured_alike(tmp_path: Path) -> None:
    pairs = [
        row(number, style, split)
        for number in range(10)
        for style in ("plain", "framed")
        for split in ("train", "held_out_concept")
    ]
    write_run(tmp_path, pairs)

    def measured(spread: int, pictures: int = 16) -> dict[str, Any]:
        def drawn(prompts: list[str], seed: int, guidance: float) -> np.ndarray:
            return np.stack(
                [draw(spread * int(prompt.split()[-1]), "plain", 16) for prompt in prompts]
            )

        config = FidelityConfig(pictures=pictures, guidance=(1.0,))
        networks: dict[str, Any] = {"mean colour": lambda pictures: pictures.mean((1, 2))}
        return {"sections": [fidelity(config, subject(tmp_path), 16, drawn, networks)]}

    rows = compare({"near": measured(1), "far": measured(0), "few": measured(1, 12)})
    alike = {
        row["place"][-1]: row
        for row in rows
        if row["place"][2] == "guidance 1" and row["runs"]["near"]
    }
    assert {
        "CLIP score",
        "CMMD on our CLIP",
        "Precision",
        "Recall",
        "Fréchet on mean colour",
        "kernel × 1000 on mean colour",
    } == set(alike)
    assert all(
        "16 captions" in each["place"][1] and "seed 0" in each["place"][1]
        for each in alike.values()
    )
    assert alike["CLIP score"]["differs"] and alike["CMMD on our CLIP"]["differs"]
    assert all(
        each["differences"]["far"]["low"] is not None and each["differences"]["few"] is None
        for each in alike.values()
    )


def test_the_interval_of_a_difference_is_that_of_two_means() -> None:
    rng = np.random.default_rng(0)
    a, b = rng.normal(1.0, 1, 400), rng.normal(0.0, 2, 300)
    delta = difference(mean_figure(a, range(400), 2000, 0), mean_figure(b, range(300), 2000, 0))
    half = 1.96 * np.sqrt(a.var() / 400 + b.var() / 300)
    assert delta["value"] == pytest.approx(a.mean() - b.mean())
    assert (delta["low"], delta["high"]) == pytest.approx(
        (delta["value"] - half, delta["value"] + half), abs=0.02
    )
    assert (
        is_significant(delta)
        and not is_significant(difference({**delta, "low": None}, delta))
        and not is_significant(None)
    )


def test_the_page_stands_alone_and_escapes(facts: dict[str, Any]) -> None:
    reports = {"a": facts, HOSTILE: other(facts)}
    page = Page(render(reports, compare(reports)))
    assert_stands_alone(page)
    assert (
        "-80.0 points" in page.text
        and "clip.learning_rate" in page.text
        and " ".join(HOSTILE.split()) in page.text
    )


def test_the_command_compares_reports_by_path(
    facts: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, each in (("a", facts), ("b", other(facts))):
        (tmp_path / name).mkdir()
        (tmp_path / name / "report.json").write_text(json.dumps(each))
    with pytest.raises(SystemExit) as stopped:
        main(
            [
                "report",
                "compare",
                str(tmp_path / "a"),
                str(tmp_path / "b" / "report.json"),
                "--out",
                str(tmp_path / "c.html"),
                "--json",
            ]
        )
    printed = json.loads(capsys.readouterr().out)
    assert (
        stopped.value.code == 0
        and printed["page"] == str(tmp_path / "c.html")
        and sum(row["differs"] for row in printed["figures"]) == 1
    )
    assert (tmp_path / "c.html").read_text().rstrip().endswith("</html>")
    (tmp_path / "b" / "report.json").write_text("{}")
    for wrong, said in (
        (["b"], "two or more different runs"),
        (["a", "b"], "is no report.json of a run"),
    ):
        with pytest.raises(SystemExit) as stopped:
            main(
                [
                    "report",
                    "compare",
                    *(str(tmp_path / name) for name in wrong),
                    "--out",
                    str(tmp_path / "d.html"),
                ]
            )
        assert stopped.value.code == 2 and said in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on PATH")
@pytest.mark.parametrize("width", [360, 1200])
def test_the_pages_fit_a_phone_and_a_desk_in_chromium(
    facts: dict[str, Any], tmp_path: Path, width: int
) -> None:
    folder = tmp_path / "run"
    made = make(folder, usual_rows())
    page = folder / "out" / "report.html"
    (tmp_path / "compared.html").write_text(
        render({"a": made, "b": other(made)}, compare({"a": made, "b": other(made)}))
    )
    probe = (
        "<script>document.title = [document.documentElement.scrollWidth, innerWidth, "
        "document.images.length,"
        " [...document.images].filter(i => !i.naturalWidth).length].join(' ')</script></body>"
    )
    for file in (page, tmp_path / "compared.html"):
        probed = tmp_path / "probed.html"
        text = (
            file.read_text()
            .replace("default-src 'none'", "default-src 'none'; script-src 'unsafe-inline'")
            .replace("</body>", probe)
        )
        probed.write_text(text)
        browser = [
            str(CHROMIUM),
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            "--hide-scrollbars",
            f"--user-data-dir={tmp_path / 'profile'}",
        ]
        browser += [f"--window-size={width},900"]
        shown = subprocess.run(
            [*browser, f"--screenshot={tmp_path / 'shot.png'}", probed.as_uri()],
            capture_output=True,
            timeout=120,
        )
        assert shown.returncode == 0, shown.stderr[-500:]
        shot = np.asarray(Image.open(tmp_path / "shot.png").convert("L"))
        assert shot.shape[1] == width and shot.std() > 5  # something is drawn
        dumped = subprocess.run(
            [*browser, "--dump-dom", probed.as_uri()], capture_output=True, text=True, timeout=120
        ).stdout
        title = dumped.partition("<title>")[2].partition("</title>")[0]
        wide, inner, images, broken = map(int, title.split())
        assert wide <= inner and broken == 0 and (images > 0) == (file == page)
