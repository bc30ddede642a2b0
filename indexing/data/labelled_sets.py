"""Labelled picture sets for zero-shot classification and linear probes.

Reads three layouts:

- a folder with a folder of pictures for each class;
- a parquet file with the columns `image` (encoded bytes, or Hugging Face's {"bytes", "path"})
  and `label` (a number or a name);
- WebDataset shards in CLIP_benchmark's layout: `test/*.tar` with `KEY.jpg|png|webp` beside
  `KEY.cls`.

Where they exist beside the data, `classnames.txt` holds the class names and `templates.txt` or
`zeroshot_classification_templates.txt` the templates, in which `{c}` or `{}` stands for the name.
Files and pictures above a maximum size are refused.
"""

import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from indexing.data.images import Pixels, Square
from infra.errors import CallerError, DataError
from infra.schemas import open_parquet
from infra.square_image import square
from infra.storage.bounded_tar import read_members
from infra.storage.regular_files import open_regular, read_regular, why_unsafe

SUFFIXES = frozenset((".png", ".jpg", ".jpeg", ".webp", ".bmp"))
LARGEST_BYTES = 20 * 2**20
LARGEST_PIXELS = 50_000_000
CLASSNAMES = "classnames.txt"
TEMPLATES = ("templates.txt", "zeroshot_classification_templates.txt")


@dataclass(frozen=True)
class ImageSet:
    """A labelled set in memory: N encoded pictures, the class number of each (N,), and the names of
    the classes.
    """

    name: str
    encoded: list[bytes]
    labels: NDArray[np.int64]
    names: list[str]
    templates: tuple[str, ...]
    """Each with one {}; empty where the set has none."""
    square: Square = square
    """Makes the squares, as the evaluated CLIP does; by default whole pictures on white."""

    def __len__(self) -> int:
        return len(self.encoded)

    def pictures(self, side_px: int) -> Pixels:
        """Decode all pictures as squares, uint8 (N, S, S, 3) RGB.

        Raises DataError for a picture that cannot be decoded.
        """
        pixels = np.empty((len(self), side_px, side_px, 3), np.uint8)
        for number, data in enumerate(self.encoded):
            decoded = _decode(data)
            if decoded is None:
                raise DataError(
                    f"set {self.name}: picture {number} cannot be read as an 8-bit picture of at "
                    f"most {LARGEST_PIXELS:,} pixels: remove it from the set"
                )
            pixels[number] = self.square(decoded, side_px)
        return pixels

    def only(self, rows: NDArray[np.int64]) -> "ImageSet":
        """Return the set of the pictures with these numbers."""
        return replace(self, encoded=[self.encoded[row] for row in rows], labels=self.labels[rows])


def open_set(path: Path, name: str = "") -> ImageSet:
    """Read a set in any of the layouts; by default its name is that of the file or folder.

    Raises CallerError where the path holds no set, DataError where labels and names disagree.
    """
    name = name or path.stem
    if path.is_file() and path.suffix == ".parquet":
        return _build(name, path.parent, list(_from_parquet(path)), path.stem)
    if not path.is_dir():
        raise CallerError(
            f"[evaluate.suite] set {str(path)!r} does not exist: name a folder of classes, a "
            "parquet file or a folder of WebDataset shards"
        )
    shards = sorted(path.glob("test/*.tar")) or sorted(path.glob("*.tar"))
    if shards:
        return _build(name, path, [pair for shard in shards for pair in _from_shard(shard)])
    pairs = list(_from_folders(path))
    if not pairs:
        raise CallerError(
            f"[evaluate.suite] set {str(path)!r} holds no pictures: it needs CLASS/*.png, "
            "test/*.tar or a parquet file"
        )
    return _build(name, path, pairs)


def _decode(data: bytes) -> NDArray[np.uint8] | None:
    """Return the picture, or None where it is no 8-bit picture or has too many pixels."""
    if not data:
        return None
    decoded = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED)
    if decoded is None or decoded.dtype != np.uint8:
        return None
    if decoded.shape[0] * decoded.shape[1] > LARGEST_PIXELS:
        return None
    return np.asarray(decoded, np.uint8)


def _build(
    name: str, folder: Path, pairs: Sequence[tuple[bytes, int | str]], stem: str = ""
) -> ImageSet:
    """Return the set of pairs of a picture and a label; files that begin with `stem` come before
    the shared ones.
    """
    listed = _lines(folder, (f"{stem}.{CLASSNAMES}", CLASSNAMES) if stem else (CLASSNAMES,))
    numbers, names = _number_labels(name, [label for _, label in pairs], listed)
    template_lines = _lines(folder, (f"{stem}.templates.txt", *TEMPLATES) if stem else TEMPLATES)
    templates = tuple(template.replace("{c}", "{}") for template in template_lines)
    for template in templates:
        if template.count("{}") != 1:
            raise DataError(
                f"set {name}: the template {template!r} must contain {{}} or {{c}} exactly once"
            )
    return ImageSet(name, [data for data, _ in pairs], numbers, names, templates)


def _number_labels(
    name: str, labels: Sequence[int | str], listed: list[str]
) -> tuple[NDArray[np.int64], list[str]]:
    """Return the class number of each label, and the class names: `listed`, or those of the labels
    where it is empty.
    """
    if all(isinstance(label, int) for label in labels):
        numbers = np.array(labels, np.int64)
        names = listed or [str(number) for number in range(int(numbers.max(initial=0)) + 1)]
        if len(numbers) and not 0 <= numbers.min() <= numbers.max() < len(names):
            raise DataError(
                f"set {name}: labels are {numbers.min()} to {numbers.max()}, but there are "
                f"{len(names)} class names"
            )
        return numbers, names
    texts = [str(label) for label in labels]
    names = listed or sorted(set(texts))
    unknown = sorted(set(texts) - set(names))
    if unknown:
        raise DataError(
            f"set {name}: the label {unknown[0]!r} is not one of the {len(names)} class names"
        )
    number_of: dict[str, int] = {}
    for number, class_name in enumerate(names):
        number_of.setdefault(class_name, number)
    return np.array([number_of[text] for text in texts], np.int64), names


def _lines(folder: Path, files: tuple[str, ...]) -> list[str]:
    """Return the lines of the first file that exists, without empty ones."""
    for file in files:
        if (folder / file).is_file():
            return [
                line.strip() for line in (folder / file).read_text().splitlines() if line.strip()
            ]
    return []


def _from_folders(path: Path) -> Iterator[tuple[bytes, str]]:
    for folder in sorted(entry for entry in path.iterdir() if entry.is_dir()):
        for file in sorted(folder.rglob("*")):
            if file.suffix.lower() in SUFFIXES and not file.is_dir():
                if fault := why_unsafe(file, path):
                    raise DataError(f"{file} is {fault}: remove it from the set")
                data = read_regular(file, LARGEST_BYTES)
                yield _bounded(data or b"", str(file)), folder.name


def _from_parquet(path: Path) -> Iterator[tuple[bytes, int | str]]:
    file = open_parquet(path)
    missing = {"image", "label"} - set(file.schema_arrow.names)
    if missing:
        raise CallerError(
            f"[evaluate.suite] set {str(path)!r} has no column {sorted(missing)[0]!r}: it needs "
            "`image` and `label`"
        )
    for batch in file.iter_batches(1000, columns=["image", "label"]):
        for record in batch.to_pylist():
            image: Any = record["image"]
            data = image.get("bytes") if isinstance(image, dict) else image
            yield _bounded(data or b"", f"{path.name}, one of its rows"), record["label"]


def _from_shard(shard: Path) -> Iterator[tuple[bytes, int | str]]:
    samples: dict[str, dict[str, bytes]] = {}
    try:
        with open_regular(shard) as file:
            for member, stream in read_members(file):
                key, dot, suffix = member.name.rpartition(".")
                if not dot or stream is None or (f".{suffix}" not in SUFFIXES and suffix != "cls"):
                    continue
                if member.size > LARGEST_BYTES:
                    raise DataError(
                        f"{shard.name}: {member.name} is larger than {LARGEST_BYTES:,} bytes"
                    )
                samples.setdefault(key, {})["cls" if suffix == "cls" else "image"] = stream.read()
    except (tarfile.TarError, OSError) as error:
        raise DataError(f"{shard} cannot be read ({error}): download it again") from error
    for key, parts in samples.items():
        if parts.keys() != {"cls", "image"}:
            raise DataError(
                f"{shard.name}: {key} has only {' and '.join(parts)}: it needs a picture and a .cls"
            )
        text = parts["cls"].decode(errors="replace").strip()
        yield parts["image"], int(text) if text.isdigit() else text


def _bounded(data: bytes, where: str) -> bytes:
    """Return the bytes of a picture. Raises DataError where they are empty or too many."""
    if not data or len(data) > LARGEST_BYTES:
        raise DataError(f"{where}: the picture is empty or larger than {LARGEST_BYTES:,} bytes")
    return data
