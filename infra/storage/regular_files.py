"""Read files of folders that others fill: regular files only, and not through links that leave the
folder.

A FIFO, a device and a link to either would be read for ever.
"""

import errno
import os
import stat
from pathlib import Path
from typing import BinaryIO


def why_unsafe(file: Path, root: Path) -> str:
    """Return why a file below `root` must not be read, or "".

    Only its last part may be a link, as in the listing of `Path.rglob`.
    """
    mode = file.lstat().st_mode
    if stat.S_ISLNK(mode):
        try:
            target = file.resolve(strict=True)
            mode = target.stat().st_mode
        except (OSError, RuntimeError):  # RuntimeError: a circle of links
            return "a link to nothing"
        if not target.is_relative_to(root.resolve()):
            return "a link that leaves the folder"
    return "" if stat.S_ISREG(mode) else "no regular file"


def open_regular(file: Path) -> BinaryIO:
    """Open a file for reading, without waiting for a writer of a FIFO. Raises OSError, also for
    what is no regular file.
    """
    descriptor = os.open(file, os.O_RDONLY | os.O_NONBLOCK)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, "no regular file", str(file))
    return os.fdopen(descriptor, "rb")


def read_regular(file: Path, max_bytes: int) -> bytes | None:
    """Return the content of a regular file, or None if it has more than `max_bytes`. Raises
    OSError as `open_regular` does.
    """
    with open_regular(file) as opened:
        data = opened.read(max_bytes + 1)
    return data if len(data) <= max_bytes else None
