"""Renders SVGs in a process of its own, which `flows.demo.emoji_packages` starts.

Hostile files cost at most this process (`infra.compute.bounded_processes`), which can open no file
and no connection. A request is SIDE and the SVG as UTF-8, an answer a PNG file. The reasons of
refusals are `reason: detail`.
"""

import struct
from xml.parsers import expat

import resvg_py

from infra.compute.bounded_processes import RefusedError, serve

SIDE = struct.Struct("<I")
"""Longer side of the picture in pixels."""
MEMORY_BYTES = 1 << 30
"""Maximum address space of the process; a usual SVG takes a tenth."""
MAX_SVG_BYTES = 8 << 20
LINKS = frozenset(("a",))
"""Elements that lead to another page and draw nothing of it."""


def render(svg: str, side_px: int) -> bytes:
    """Return an SVG as PNG. Raises RefusedError if it cannot be drawn, or not from itself alone."""
    size_bytes = len(svg.encode("utf-8", "replace"))
    if size_bytes > MAX_SVG_BYTES:
        raise RefusedError(f"svg_too_costly: it has more than {MAX_SVG_BYTES >> 20} MiB")
    if reference := external_reference(svg):
        raise RefusedError(f"svg_external_reference: it names {reference[:100]!r}")
    try:
        png = resvg_py.svg_to_bytes(
            svg_string=svg, width=side_px, height=side_px, skip_system_fonts=True
        )
    except ValueError as error:
        raise RefusedError(f"svg_invalid: {' '.join(str(error).split())[:200]}") from None
    return bytes(png)


def external_reference(svg: str) -> str:
    """Return the first file or URL that an SVG would draw, or "".

    Entities count with their text. Raises RefusedError for what is no XML.
    """
    references: list[str] = []

    def note(element: str, attributes: dict[str, str]) -> None:
        if local_name(element) not in LINKS:
            references.extend(
                value.strip()
                for name, value in attributes.items()
                if local_name(name) == "href"
                and value.strip()
                and not value.strip().startswith(("#", "data:"))
            )

    parser = expat.ParserCreate("utf-8")
    parser.StartElementHandler = note
    try:
        parser.Parse(svg.encode("utf-8", "replace"), True)
    except expat.ExpatError as error:
        raise RefusedError(f"svg_invalid: {error}") from None
    return references[0] if references else ""


def local_name(name: str) -> str:
    """Return a name without its prefix."""
    return name.rpartition(":")[2]


def answer(request: bytes) -> bytes:
    """Return the PNG file for SIDE and an SVG."""
    (side_px,) = SIDE.unpack_from(request)
    return render(request[SIDE.size :].decode("utf-8", "replace"), side_px)


if __name__ == "__main__":
    serve(answer, MEMORY_BYTES, may_open_files=False)
