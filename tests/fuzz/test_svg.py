"""Whatever claims to be an SVG: a PNG file drawn from itself alone, or a documented refusal."""

import io
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import event, example, given
from hypothesis import strategies as st
from PIL import Image

from flows.demo import svg_renderer
from infra.compute.bounded_processes import BoundedProcesses, ProcessEndedError, RefusedError

SIDE_PX, LIMIT_S = 32, 20.0
SECRET = (12, 250, 199)
"""Colour of a picture beside the SVG, which no SVG may show."""
REASONS = {"svg_too_costly", "svg_external_reference", "svg_invalid"}
FILE = "FILE"
HREFS = [
    FILE,
    f"file://{FILE}",
    f"FILE:///{FILE}",
    "http://127.0.0.1:9/x",
    "data:image/png,x",
    "#a",
]
ELEMENTS = st.recursive(
    st.one_of(
        st.builds(
            "<{0} {1}='{2}' width='9' height='9'/>".format,
            st.sampled_from(["image", "use", "feImage", "a", "script", "foreignObject"]),
            st.sampled_from(["href", "xlink:href", "src"]),
            st.sampled_from(HREFS),
        ),
        st.sampled_from(
            [
                "<rect width='9' height='9'/>", "<text>x</text>", "<style>*{fill:url(#a)}</style>",
                "<path d='M0 0L1e38 1e38Z' stroke-width='1e30'/>", "<style>@import 'x';</style>",
                "<feGaussianBlur stdDeviation='1e9'/>", "<feTurbulence numOctaves='99'/>", "&x;",
            ]
        ),
    ),
    lambda inner: st.builds(
        "<{0} id='a' {1}>{2}</{0}>".format,
        st.sampled_from(["g", "svg", "defs", "pattern", "mask", "clipPath", "filter", "symbol"]),
        st.sampled_from(["", "mask='url(#a)'", "filter='url(#a)'", "width='1e9' height='1'"]),
        st.lists(inner, max_size=4).map("".join),
    ),
    max_leaves=15,
)  # fmt: skip
START = "<svg xmlns='http://www.w3.org/2000/svg' xmlns:xlink='http://www.w3.org/1999/xlink' {}>"
SIZES = ["viewBox='0 0 9 9'", "width='9' height='9'", "width='1e9' height='1e-9'", ""]
HEADS = ["", f"<!DOCTYPE svg [<!ENTITY x SYSTEM '{FILE}'>]>", "<!DOCTYPE svg [<!ENTITY x '&x;'>]>"]
SVGS = st.builds(
    "{}{}{}</svg>".format,
    st.sampled_from(HEADS), st.sampled_from(SIZES).map(START.format),
    st.lists(ELEMENTS, max_size=4).map("".join),
)  # fmt: skip


@pytest.fixture(scope="module")
def renderers() -> Iterator[BoundedProcesses]:
    processes = BoundedProcesses("flows.demo.svg_renderer", LIMIT_S)
    yield processes
    processes.close()


@pytest.fixture(scope="module")
def secret(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("secret") / "secret.png"
    Image.new("RGB", (9, 9), SECRET).save(file)
    return file


@example(START.format(SIZES[0]) + "<g>" * 100_000)
@given(SVGS | st.text(max_size=60))
def test_an_svg_is_drawn_from_itself_alone_or_refused(
    renderers: BoundedProcesses, secret: Path, svg: str
) -> None:
    text = svg.replace(FILE, str(secret))
    request = svg_renderer.SIDE.pack(SIDE_PX) + text.encode("utf-8", "replace")
    try:
        png = renderers.call(request)
    except RefusedError as error:
        reason = str(error).partition(":")[0]
        assert reason in REASONS
        event(reason)
        return
    except ProcessEndedError:
        event("process ended")
        return  # counted as svg_too_costly
    event("drawn")
    with Image.open(io.BytesIO(png)) as picture:
        assert picture.format == "PNG" and max(picture.size) <= SIDE_PX
        levels = np.asarray(picture.convert("RGB")).reshape(-1, 3)
    assert not (levels == SECRET).all(1).any(), "it shows a file beside it"
