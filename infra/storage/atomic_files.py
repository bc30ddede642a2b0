"""Put finished files under their final names so that no kill or power cut leaves a part there."""

import shutil
from collections.abc import Sequence
from pathlib import Path

from infra.storage.manifests import sync


def put(staging: Path, names: Sequence[str], folder: Path) -> None:
    """Move files from `aside` into `folder` in this order; the last one's name stands on the disk
    only behind all else.
    """
    for name in names:
        sync(staging / name)
    *others, last = names
    for name in others:
        (staging / name).replace(folder / name)
    sync(folder)
    (staging / last).replace(folder / last)
    sync(folder)


def put_folder(staged: Path, folder: Path) -> None:
    """Give a finished flat folder its final name."""
    for file in staged.iterdir():
        sync(file)
    sync(staged)
    staged.rename(folder)
    sync(folder.parent)


def move_file(source: Path, target: Path) -> None:
    """Link a finished file, or copy it to another file system (whole under its name at once); the
    original stays.
    """
    target.unlink(missing_ok=True)
    try:
        target.hardlink_to(source)
    except OSError:
        part = target.with_name(f".{target.name}.part")
        shutil.copyfile(source, part)
        sync(part)
        part.replace(target)


def clear_leftovers(folder: Path) -> None:
    """Remove what killed processes left aside."""
    for leftover in folder.glob(".[0-9]*"):
        shutil.rmtree(leftover, ignore_errors=True)
