"""Query pictures that clients send: checks their size, has them decoded in other processes and
returns RGB squares.

Knows nothing of models and HTTP.
"""

import base64
import binascii
import os
import signal
import struct
import subprocess
import sys
import threading

import cv2
import numpy as np

from indexing.data.images import Pixels, Square
from indexing.service import picture_decoder
from indexing.service.picture_decoder import ANSWER, HEAD
from infra.square_image import square

MAX_BYTES = 8 << 20
SIDES, LEAST_PX = 8, 512
"""A picture is first reduced to SIDES times the encoder's side, but not below LEAST_PX."""
DECODE_S = 5.0
"""Maximum seconds for one picture."""

Process = subprocess.Popen[bytes]


def from_base64(text: str) -> bytes:
    """Return the bytes of a picture in base64, with or without a `data:` prefix. Raises ValueError
    if it is not base64 or has more than MAX_BYTES.
    """
    body = text.partition(",")[2] if text.lstrip().startswith("data:") else text
    body = "".join(body.split())  # many encoders break lines
    if len(body) > MAX_BYTES * 4 // 3 + 4:
        raise ValueError(f"the picture is larger than {MAX_BYTES >> 20} MiB")
    try:
        return base64.b64decode(body, validate=True)
    except (binascii.Error, ValueError):
        raise ValueError("the picture is not in base64") from None


class PictureDecoders:
    """Decodes pictures in processes of their own, one for each thread that decodes at that time."""

    def __init__(self, limit_s: float = DECODE_S) -> None:
        self.limit_s = limit_s
        self._lock = threading.Lock()
        self._idle: list[Process] = []
        self._busy: set[Process] = set()
        self._is_closed = False

    def decode(self, data: bytes, side_px: int, square: Square = square) -> Pixels:
        """Decode a PNG, JPEG or WebP file to an upright RGB square (S, S, 3), on white unless
        `square` crops. Raises ValueError with the reason.
        """
        if len(data) > MAX_BYTES:
            raise ValueError(f"the picture is larger than {MAX_BYTES >> 20} MiB")
        process = self._take()
        try:
            width, height, payload = _exchange(
                process, data, max(LEAST_PX, SIDES * side_px), self.limit_s
            )
        except (OSError, struct.error):  # the process has ended
            raise ValueError(self._reason(process)) from None
        finally:
            self._put_back(process)
        if not width:
            raise ValueError(payload.decode())
        upright = np.frombuffer(payload, np.uint8).reshape(height, width, 4)
        return square(cv2.cvtColor(upright, cv2.COLOR_RGBA2BGRA), side_px)

    def close(self) -> None:
        """End all processes; pictures that are being decoded are refused."""
        with self._lock:
            self._is_closed = True
            processes = [*self._idle, *self._busy]
            self._idle.clear()
        for process in processes:
            process.kill()

    def _take(self) -> Process:
        with self._lock:
            if self._is_closed:
                raise ValueError("the service is ending")
            process = self._idle.pop() if self._idle else _start()
            self._busy.add(process)
            return process

    def _put_back(self, process: Process) -> None:
        with self._lock:
            self._busy.discard(process)
            if process.poll() is None and not self._is_closed:
                self._idle.append(process)
                return
        process.kill()
        process.communicate()

    def _reason(self, process: Process) -> str:
        process.kill()
        if process.wait() == -signal.SIGALRM:
            return f"the picture takes more than {self.limit_s:g} s to decode"
        return "the picture cannot be read: give a PNG, JPEG or WebP file"


def _start() -> Process:
    """Start a process that decodes; its threads are one, for several run side by side."""
    return subprocess.Popen(
        [sys.executable, "-P", picture_decoder.__file__],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env=os.environ | {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"},
    )


def _exchange(
    process: Process, data: bytes, max_side_px: int, limit_s: float
) -> tuple[int, int, bytes]:
    """Return width, height and RGBA pixels of a picture, or 0, 0 and why it was refused. Raises
    OSError or struct.error if the process ends.
    """
    assert process.stdin is not None and process.stdout is not None
    process.stdin.write(HEAD.pack(len(data), max_side_px, limit_s) + data)
    process.stdin.flush()
    width, height, size_bytes = ANSWER.unpack(process.stdout.read(ANSWER.size))
    payload = process.stdout.read(size_bytes)
    if len(payload) != size_bytes:
        raise OSError("the process ended while it answered")
    return width, height, payload
