"""Images in a local folder and the captions in `.txt` files beside them."""

from collections.abc import Iterator
from pathlib import Path

from flows.sources.caption_text import NotTextError, decode_text, printable

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
"""Images that no decoder here reads: counted as `unknown_format`."""

Problem = tuple[str, str]
"""Why something cannot be used: the counted reason, and details for people."""


def image_files(root: Path) -> Iterator[tuple[Path, Problem | None]]:
    """Yield every image file below a folder in name order, and why it is not to be read."""
    for file in sorted(root.rglob("*")):
        suffix = file.suffix.lower()
        if suffix not in IMAGE_SUFFIXES | UNREAD_SUFFIXES or not file.is_file():
            continue
        if any(part.startswith(".") for part in file.relative_to(root).parts):
            yield file, ("hidden_file", "its name or its folder's name starts with a dot")
        elif suffix in UNREAD_SUFFIXES:
            yield file, ("unknown_format", f"{suffix} is not read")
        else:
            yield file, None


def captions_beside(file: Path) -> tuple[list[str], Problem | None]:
    """Return the lines of the `.txt` beside an image, and why there are none if it is no text."""
    text = file.with_suffix(".txt")
    if not text.is_file():
        return [], None
    try:
        return decode_text(text.read_bytes()).splitlines(), None
    except NotTextError as error:
        return [], ("caption_not_text", f"{printable(text.name)}: {error}")
