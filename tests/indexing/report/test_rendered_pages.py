"""A whole report in a real browser: every kind of section, on a phone and a desk, in light and
dark; nothing runs out of the page.
"""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from indexing.evaluation.attack_judges import Witnesses
from indexing.evaluation.evaluate import EvaluateConfig, evaluate
from indexing.evaluation.fidelity import FidelityConfig, fidelity
from indexing.report.comparison import compare, render
from tests.helpers.browser import CHROMIUM, Browser
from tests.helpers.evaluation_run import (
    encode_images,
    generate,
    manifest,
    subject,
    usual_rows,
    write_run,
)
from tests.indexing.evaluation import test_relations, test_typographic_attack, test_zero_shot_suite
from tests.indexing.service.test_search_page import contrast

pytestmark = [pytest.mark.slow, pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on PATH")]
METRICS = {
    "clip": [
        {"images_seen": 100 * step, "loss": 5 / step, "seconds": step} for step in range(1, 60)
    ]
}
SIZES = {"phone": (360, 740), "desk": (1280, 900)}
WIDER = """[...document.querySelectorAll('body *')].filter((each) => !each.closest('.scroll') && !each.closest('svg')
    && each.getBoundingClientRect().right > innerWidth + 1).map((each) => each.outerHTML.slice(0, 120)).join('; ')"""  # noqa: E501
OVER_EDGE = """[...document.querySelectorAll('.plot text')].filter((each) => {
    const own = each.getBoundingClientRect(), plot = each.ownerSVGElement.getBoundingClientRect();
    return own.right > plot.right + 2 || own.left < plot.left - 2 || own.bottom > plot.bottom + 2;
}).map((each) => each.textContent).join('; ')"""


def whole_report(folder: Path) -> dict[str, Any]:
    """Write a run's report with every kind of section: zero-shot with confusions and curves,
    distances, attack, search.
    """

    def drawn(prompts: list[str], seed: int, guidance: float) -> Any:
        return generate(prompts, 1, seed)[:, 0]

    def colours(pictures: Any) -> Any:
        return pictures.mean((1, 2)).astype(np.float32)

    rows = usual_rows()
    write_run(folder, [*rows, *(each | {"key": f"again {each['key']}"} for each in rows)])
    made: list[Any] = test_zero_shot_suite.measure(
        folder / "suite",
        [test_zero_shot_suite.colours_set()],
        **{"EfficientNet-Lite0 (ImageNet)": colours},
    )
    made.append(
        test_typographic_attack.measure(
            folder / "attack",
            encode_images,
            test_typographic_attack.again,
            Witnesses("mean colour", colours, lambda _: ""),
        )
    )
    made.append(test_relations.measured(folder / "relations", 0.4))
    made.append(
        fidelity(
            FidelityConfig(pictures=8),
            subject(folder),
            16,
            drawn,
            {"EfficientNet-Lite0 (ImageNet)": colours},
        )
    )
    for name in ("suite", "attack", "relations"):
        shutil.copytree(
            folder / name / "out" / "pictures", folder / "out" / "pictures", dirs_exist_ok=True
        )
    stages = [manifest("ingest"), manifest("clip", {"ingest": "abc"})]
    config = EvaluateConfig(prompts=("colour 3", "colour 14"), count=2, resamples=200)
    return evaluate(
        config,
        {"config": {"clip": {"width": 64}}},
        stages,
        METRICS,
        subject(folder),
        generate,
        [lambda: made],
    )


def test_a_whole_report_and_a_comparison_fit_a_phone_and_a_desk_in_light_and_dark(
    tmp_path: Path,
) -> None:
    facts = json.loads(json.dumps(whole_report(tmp_path)))
    (tmp_path / "out" / "comparison.html").write_text(
        render({"a run": facts, "another": facts}, compare({"a run": facts, "another": facts}))
    )
    with Browser(tmp_path / "browser") as browser:
        for page in ("report", "comparison"):
            browser.go((tmp_path / "out" / f"{page}.html").as_uri())
            if page == "report":
                kinds = (
                    "img[alt^='Confusion']",
                    ".plot .whisker",
                    ".plot rect",
                    ".curve",
                    "img[alt^='Attacked']",
                    "img[alt^='Samples for']",
                )
                assert [
                    kind
                    for kind in kinds
                    if not browser.run(f'document.querySelectorAll("{kind}").length')
                ] == []
                assert browser.run(
                    "[...document.images].every((each) => each.complete && each.naturalWidth > 0)"
                )
            for size, (width, height) in SIZES.items():
                for is_dark in (False, True):
                    shot = tmp_path / f"{page}-{size}-{'dark' if is_dark else 'light'}.png"
                    browser.look(shot, width, height, is_dark)
                    grey = np.asarray(Image.open(shot).convert("L"))
                    assert (
                        grey.shape == (height, width)
                        and (np.median(grey) < 80) == is_dark
                        and grey.std() > 5
                    )
                    assert browser.run("document.documentElement.scrollWidth <= innerWidth"), (
                        browser.run(WIDER)
                    )
                    assert browser.run(WIDER) == ""
                    assert browser.run(OVER_EDGE) == ""
                    for shown in (
                        "p",
                        "h2",
                        "td",
                        "thead th",
                        ".faint",
                        *((".plot text",) if page == "report" else ()),
                    ):
                        assert (
                            browser.run(
                                contrast(
                                    shown, "fill" if shown == ".plot text" else "color", "body"
                                )
                            )
                            >= 4.5
                        ), shown
            # A table that is wider than a phone moves in a frame of its own, which a keyboard
            # reaches.
            browser.look(tmp_path / "phone.png", *SIZES["phone"])
            frames = browser.run(
                "[...document.querySelectorAll('.scroll')].map((each) => [each.scrollWidth > "
                "each.clientWidth, each.tabIndex])"
            )
            assert any(is_wide for is_wide, _ in frames) and all(index == 0 for _, index in frames)
        assert browser.errors == []
