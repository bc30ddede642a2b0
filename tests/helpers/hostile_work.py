"""Work that does what its request says, for the tests of bounded processes."""

import sys
import time
from pathlib import Path

from infra.compute.bounded_processes import RefusedError, serve


def work(request: bytes) -> bytes:
    """Do what a hostile file would make a reader do."""
    verb, _, word = request.decode().partition(" ")
    if verb == "refuse":
        raise RefusedError(word)
    if verb == "open":
        try:
            return Path(word).read_bytes()
        except OSError as error:
            return str(error.strerror).encode()
    if verb == "sleep":
        time.sleep(float(word))
    if verb == "hold":
        return str(len(bytearray(int(word)))).encode()
    if verb == "crash":
        sys.exit(3)
    return request


if __name__ == "__main__":
    serve(work, 256 << 20, may_open_files=False)
