"""A hostile SVG is refused and counted, reads nothing, and costs at most its own process."""

import base64
import io
from pathlib import Path

import cv2
import numpy as np
import pytest
import resvg_py
from PIL import Image

from flows.demo import emoji_packages
from flows.demo.emoji_packages import Drawing, render, rendered_name
from flows.demo.svg_renderer import external_reference
from infra.compute.bounded_processes import BoundedProcesses

HEAD = (
    '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
    'viewBox="0 0 32 32">'
)
PLAIN = f'{HEAD}<rect id="r" width="32" height="16" fill="tomato"/><use href="#r" y="16"/></svg>'


def refusals(svgs: dict[str, str], folder: Path) -> dict[str, tuple[str, str]]:
    return render([Drawing(name, name, svg=svg) for name, svg in svgs.items()], folder, 96)


def test_a_usual_svg_has_the_same_pixels_as_without_bounds(tmp_path: Path) -> None:
    png = io.BytesIO()
    Image.new("RGB", (4, 4), "navy").save(png, "PNG")
    data_url = f"data:image/png;base64,{base64.b64encode(png.getvalue()).decode()}"
    embedded = f'{HEAD}<image width="9" height="9" href="{data_url}"/></svg>'
    svgs = {"plain": PLAIN, "linked": f'{HEAD}<a href="https://a.b/"/>{PLAIN}</svg>'}
    svgs["embedded"] = embedded
    assert refusals(svgs, tmp_path) == {}
    for name, svg in svgs.items():
        expected = resvg_py.svg_to_bytes(
            svg_string=svg, width=96, height=96, skip_system_fonts=True
        )
        assert (tmp_path / f"{name}.png").read_bytes() == bytes(expected)


@pytest.mark.parametrize(
    "body",
    [
        '<image width="32" height="32" href="{}"/>',
        '<image width="32" height="32" xlink:href=" {}"/>',
        '<filter id="f"><feImage href="{}"/></filter><rect width="9" height="9" filter="url(#f)"/>',
    ],
)
def test_a_file_that_an_svg_names_is_not_drawn(tmp_path: Path, body: str) -> None:
    secret = tmp_path / "secret.png"
    cv2.imwrite(str(secret), np.full((32, 32, 3), 255, np.uint8))
    hostile = f"{HEAD}{body.format(secret)}</svg>"
    entity = f'<!DOCTYPE svg [<!ENTITY e "{secret}">]>{HEAD}{body.format("&e;")}</svg>'
    found = refusals({"a": hostile, "b": entity, "c": PLAIN}, tmp_path / "rendered")
    assert {reason for reason, _ in found.values()} == {"svg_external_reference"}
    assert set(found) == {"a", "b"} and str(secret)[:90] in found["a"][1]
    assert [file.name for file in (tmp_path / "rendered").iterdir()] == ["c.png"]


def test_a_reference_that_escapes_the_check_still_opens_no_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    secret = tmp_path / "secret.png"
    cv2.imwrite(str(secret), np.full((32, 32, 3), 255, np.uint8))
    svg = f'{HEAD}<image width="32" height="32" href="{secret}"/></svg>'
    unbounded = resvg_py.svg_to_bytes(svg_string=svg, width=96, height=96, skip_system_fonts=True)
    assert Image.open(io.BytesIO(bytes(unbounded))).getextrema()[3] == (255, 255)
    unchecked = "tests.helpers.unchecked_renderer"
    processes = BoundedProcesses(unchecked, limit_s=60)
    drawn = processes.call(emoji_packages.SIDE.pack(96) + svg.encode())
    processes.close()
    assert Image.open(io.BytesIO(drawn)).getextrema()[3] == (0, 0), "nothing is drawn"


def test_svgs_that_crash_or_never_end_are_counted_and_the_others_drawn(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(emoji_packages, "RENDER_S", 1.0)
    deep = HEAD + "<g>" * 200_000 + "</g>" * 200_000 + "</svg>"
    blur = '<feGaussianBlur stdDeviation="9"/>' * 40_000
    slow = (
        f'{HEAD}<filter id="f">{blur}</filter><rect width="32" height="32" filter="url(#f)"/></svg>'
    )
    svgs = {"deep": deep, "slow": slow, "no": "<rect", "large": f"{HEAD}{' ' * (9 << 20)}</svg>"}
    found = refusals({**svgs, "plain": PLAIN}, tmp_path)
    reasons = {name: reason for name, (reason, _) in found.items()}
    assert reasons.pop("no") == "svg_invalid"
    assert reasons == dict.fromkeys(("deep", "slow", "large"), "svg_too_costly")
    assert "more than 1 s" in found["slow"][1] and (tmp_path / "plain.png").is_file()


def test_after_many_costly_svgs_the_others_are_counted_but_not_tried(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(emoji_packages, "MAX_COSTLY", 0)
    found = refusals({"plain": PLAIN}, tmp_path)
    assert found["plain"] == ("svg_too_costly", "not tried after 0 such SVGs")
    assert not (tmp_path / rendered_name(Drawing("plain", ""))).exists()


def test_links_to_pages_and_own_parts_are_no_references() -> None:
    assert external_reference(PLAIN) == ""
    assert external_reference(f'{HEAD}<a xlink:href="https://a.b/"><g/></a></svg>') == ""
    assert external_reference(f'{HEAD}<use href="other.svg#r"/></svg>') == "other.svg#r"
