"""List the images of a local folder and read their captions from `.txt` files beside them."""

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
"""Image formats that no decoder here supports; dropped as `unknown_format`."""

Problem = tuple[str, str]
"""Why a row cannot be used: (counted reason, details for people)."""


def image_files(root: Path) -> Iterator[tuple[Path, Problem | None]]:
    """Yield (image file, problem or None) for every image below a folder, in name order."""
    for file in sorted(root.rglob("*")):
        suffix = file.suffix.lower()
        if suffix not in IMAGE_SUFFIXES | UNREAD_SUFFIXES or not file.is_file():
            continue
        if any(part.startswith(".") for part in file.relative_to(root).parts):
            yield file, ("hidden_file", "its name or its folder's name starts with a dot")
        elif suffix in UNREAD_SUFFIXES:
            yield file, ("unknown_format", f"{suffix} files are not supported")
        else:
            yield file, None


def captions_beside(file: Path) -> tuple[list[str], Problem | None]:
    """Return the lines of the `.txt` file beside an image, and a problem if it is not text."""
    text = file.with_suffix(".txt")
    if not text.is_file():
        return [], None
    try:
        return decode_text(text.read_bytes()).splitlines(), None
    except NotTextError as error:
        return [], ("caption_not_text", f"{printable(text.name)}: {error}")
