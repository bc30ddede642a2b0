"""Put finished files under their final names so that no kill or power cut leaves a part there."""

import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def atomic_file(target: Path) -> Iterator[Path]:
    """Yield a temporary path beside `target`, and rename it to `target` when the block ends.

    The content is on the disk before the file gets its name. If the block raises, the temporary
    file is removed and `target` stays as it was.
    """
    part = target.with_name(f".{target.name}.{secrets.token_hex(4)}")
    try:
        yield part
        sync(part)
        part.replace(target)
    finally:
        part.unlink(missing_ok=True)


def put_folder(staged: Path, folder: Path) -> None:
    """Rename a finished folder without sub-folders to its final name."""
    for file in staged.iterdir():
        sync(file)
    sync(staged)
    staged.rename(folder)
    sync(folder.parent)


def link_or_copy(source: Path, target: Path) -> None:
    """Hard-link a finished file as `target`, or copy it if the file systems differ.

    `source` stays; an existing `target` is replaced. Change the new file only after
    `make_independent`.
    """
    target.unlink(missing_ok=True)
    try:
        target.hardlink_to(source)
    except OSError:
        with atomic_file(target) as part:
            shutil.copyfile(source, part)


def make_independent(file: Path) -> None:
    """Replace a file that may be hard-linked to another one by a copy that can be changed."""
    with atomic_file(file) as part:
        shutil.copyfile(file, part)


def sync(path: Path) -> None:
    """Write a file's content, or a folder's names, to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
