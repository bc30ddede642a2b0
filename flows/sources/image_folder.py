"""List the images of a local folder and read their captions from `.txt` files beside them.

Links that leave the folder, FIFOs and devices are not read but counted.
"""

import os
from collections.abc import Iterator
from pathlib import Path

from flows.sources.caption_text import NotTextError, decode_text, printable
from infra.storage.regular_files import read_regular, why_unsafe

MAX_CAPTION_BYTES = 1 << 20
UNSAFE = "unsafe_file"

IMAGE_SUFFIXES = frozenset(
    (
        ".png",
        ".jpg",
        ".jpeg",
        ".jpe",
        ".jfif",
        ".webp",
        ".gif",
        ".bmp",
        ".tif",
        ".tiff",
        ".avif",
    )
)
UNREAD_SUFFIXES = frozenset(
    (".heic", ".heif", ".jxl", ".jp2", ".svg", ".psd", ".exr", ".hdr", ".ico", ".tga")
)
"""Image formats that no decoder here supports; dropped as `unknown_format`."""

Problem = tuple[str, str]
"""Why a row cannot be used: (counted reason, details for people)."""


def image_files(root: Path) -> Iterator[tuple[Path, Problem | None]]:
    """Yield (image file, problem or None) for every image below a folder, in name order."""
    for file in sorted(root.rglob("*")):
        suffix = file.suffix.lower()
        if suffix not in IMAGE_SUFFIXES | UNREAD_SUFFIXES or file.is_dir():
            continue
        if any(part.startswith(".") for part in file.relative_to(root).parts):
            yield file, ("hidden_file", "its name or its folder's name starts with a dot")
        elif suffix in UNREAD_SUFFIXES:
            yield file, ("unknown_format", f"{suffix} files are not supported")
        elif fault := why_unsafe(file, root):
            yield file, (UNSAFE, f"it is {fault}")
        else:
            yield file, None


def captions_beside(file: Path, root: Path) -> tuple[list[str], Problem | None]:
    """Return the lines of the `.txt` file beside an image below `root`, and a problem if it cannot
    be used.
    """
    text = file.with_suffix(".txt")
    if not os.path.lexists(text) or text.is_dir():
        return [], None
    name = printable(text.name)
    if fault := why_unsafe(text, root):
        return [], (UNSAFE, f"{name} is {fault}")
    data = read_regular(text, MAX_CAPTION_BYTES)
    if data is None:
        return [], ("row_too_large", f"{name} has more than {MAX_CAPTION_BYTES >> 20} MiB")
    try:
        return decode_text(data).splitlines(), None
    except NotTextError as error:
        return [], ("caption_not_text", f"{name}: {error}")
