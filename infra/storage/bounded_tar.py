"""Read tar archives that others wrote: headers are bounded before they are read.

A header may hold a name, a list of holes or comments of any size, which tarfile reads whole and
keeps for every member.
"""

import gzip
import tarfile
from collections.abc import Iterator
from typing import IO, BinaryIO

MAX_HEADER_BYTES = 64 << 10
"""Maximum bytes of all headers of one member."""
MAX_NAME_CHARS = 1024
MAX_SHARED_HEADERS = 16
"""Maximum headers that an archive may set for all of its members."""


def read_members(
    file: BinaryIO | gzip.GzipFile,
) -> Iterator[tuple[tarfile.TarInfo, IO[bytes] | None]]:
    """Yield the members of an archive in order, regular files with a stream of their content, which
    is valid until the next one.

    Links, devices and folders have none. Raises tarfile.TarError for a broken archive and for
    headers above the bounds, and any error of reading `file`.
    """
    metered = _Metered(file)
    with tarfile.open(fileobj=metered, mode="r:") as archive:
        while True:
            metered.left_bytes = MAX_HEADER_BYTES
            member = archive.next()
            if member is None:
                return
            archive.members = []  # type: ignore[attr-defined]  # else it holds all headers
            if member.size < 0:  # tarfile would go back and never end
                raise tarfile.ReadError(f"the size of {member.name[:60]!r} is negative")
            if len(member.name) > MAX_NAME_CHARS:
                raise tarfile.ReadError(
                    f"the name {member.name[:60]!r}... has more than {MAX_NAME_CHARS} characters"
                )
            if len(archive.pax_headers) > MAX_SHARED_HEADERS:
                raise tarfile.ReadError(f"more than {MAX_SHARED_HEADERS} shared headers")
            metered.left_bytes = member.size
            yield member, archive.extractfile(member) if member.isfile() else None


class _Metered:
    """A file of which at most `left_bytes` more are read."""

    def __init__(self, file: BinaryIO | gzip.GzipFile) -> None:
        self.file, self.left_bytes = file, MAX_HEADER_BYTES
        self.tell, self.seek, self.close = file.tell, file.seek, file.close

    def read(self, size: int = -1) -> bytes:
        """Read `size` bytes, fewer at the end of the file. Raises tarfile.ReadError."""
        if not 0 <= size <= self.left_bytes:
            raise tarfile.ReadError(
                f"the headers of a member have more than {MAX_HEADER_BYTES:,} bytes"
            )
        self.left_bytes -= size
        return self.file.read(size)

    def write(self, data: bytes) -> int:
        """Refuse."""
        raise AssertionError("archives are only read")
