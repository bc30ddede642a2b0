"""Headers of a hostile archive are bounded before they are read, and the archive ends."""

import gzip
import io
import tarfile
import tracemalloc
from pathlib import Path

import pytest

from infra.storage.bounded_tar import MAX_HEADER_BYTES, read_members

BLOCK = tarfile.BLOCKSIZE


def header(kind: bytes, size_bytes: int, name: str = "x") -> bytes:
    """Return the header of a member as its writer would."""
    member = tarfile.TarInfo(name)
    member.type, member.size = kind, size_bytes
    return member.tobuf(tarfile.GNU_FORMAT)


def read(data: bytes) -> list[tuple[str, bytes | None]]:
    return [
        (member.name, stream.read() if stream else None)
        for member, stream in read_members(io.BytesIO(data))
    ]


def test_members_are_read_as_tarfile_reads_them(tmp_path: Path) -> None:
    contents = {"a": b"1" * 9000, "b" * 400: b"", "ä/c": b"22"}
    for form in (tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        file = io.BytesIO()
        with tarfile.open(fileobj=file, mode="w", format=form) as tar:
            for name, data in contents.items():
                member = tarfile.TarInfo(name)
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
            link = tarfile.TarInfo("link")
            link.type, link.linkname = tarfile.SYMTYPE, "/dev/zero"
            tar.addfile(link)
        assert read(file.getvalue()) == [*contents.items(), ("link", None)]


@pytest.mark.parametrize("kind", [tarfile.GNUTYPE_LONGNAME, tarfile.XHDTYPE, tarfile.XGLTYPE])
def test_a_header_of_a_gigabyte_is_not_read(tmp_path: Path, kind: bytes) -> None:
    with gzip.open(tmp_path / "p.tgz", "wb", compresslevel=1) as file:
        file.write(header(kind, 1 << 30))
        file.write(b"a" * (16 << 20))  # as much as shows whether it is read
    tracemalloc.start()
    with gzip.open(tmp_path / "p.tgz") as file, pytest.raises(tarfile.ReadError, match="headers"):
        list(read_members(file))
    _, peak_bytes = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak_bytes < 4 << 20


@pytest.mark.parametrize("size_bytes", [-BLOCK, -10 * BLOCK])
def test_a_negative_size_does_not_go_round_in_a_circle(size_bytes: int) -> None:
    with pytest.raises(tarfile.ReadError):
        read(header(tarfile.REGTYPE, 0) + header(tarfile.REGTYPE, size_bytes) + bytes(2 * BLOCK))


def test_many_small_headers_count_together() -> None:
    name = header(tarfile.GNUTYPE_LONGNAME, 3) + b"abc".ljust(BLOCK, b"\0")
    assert read(name * 8 + header(tarfile.REGTYPE, 0) + bytes(2 * BLOCK)) == [("abc", b"")]
    with pytest.raises(tarfile.ReadError, match="headers"):
        read(name * (MAX_HEADER_BYTES // BLOCK))
    holes = b"".join(b"%011o\0" % number for number in range(1, 43)) + b"\1" + bytes(7)
    with pytest.raises(tarfile.ReadError):
        read(header(tarfile.GNUTYPE_SPARSE, 0)[:482] + b"\1" + bytes(29) + holes * 1000)


def test_a_name_of_many_characters_is_refused() -> None:
    long = b"a" * 2000
    name = header(tarfile.GNUTYPE_LONGNAME, len(long)) + long.ljust(4 * BLOCK, b"\0")
    with pytest.raises(tarfile.ReadError, match="more than 1024 characters"):
        read(name + header(tarfile.REGTYPE, 0) + bytes(2 * BLOCK))
