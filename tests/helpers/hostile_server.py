"""A real HTTP server on loopback that answers as the open internet does: well, wrongly, slowly,
falsely and not at all.
"""

import gzip
import struct
import threading
import time
import zlib
from collections import Counter
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Self
from urllib.parse import quote

import cv2
import numpy as np


def picture(number: int, side: int = 48) -> np.ndarray:
    """Return a picture that no other number has: (side, side, 3) uint8."""
    image = np.full((side, side, 3), 255, np.uint8)
    cv2.circle(
        image,
        (side // 2, side // 2),
        side // 4 + number % 5,
        ((number * 37) % 200, (number * 91) % 200, (number * 53) % 200),
        -1,
    )
    cv2.putText(image, str(number), (2, side - 4), cv2.FONT_HERSHEY_SIMPLEX, 0.4, (0, 0, 0), 1)
    return image


def encoded(image: np.ndarray, suffix: str = ".png") -> bytes:
    return cv2.imencode(suffix, image)[1].tobytes()


def bomb() -> bytes:
    """Return a PNG of a few bytes that declares 60,000 x 60,000 pixels."""
    return png(60_000, 60_000, 2, zlib.compress(b"\0" * 1000))


def thread(length_px: int) -> bytes:
    """Return a whole grey PNG of 1 x `length_px` pixels."""
    return png(1, length_px, 0, zlib.compress(b"\0\x80" * length_px))


def png(width: int, height: int, colours: int, data: bytes) -> bytes:
    """Return a PNG of eight bits a channel that declares a size and holds these compressed rows."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    header = struct.pack(">IIBBBBB", width, height, 8, colours, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b"")
    )


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: "Server"

    def do_GET(self) -> None:
        kind, _, rest = self.path.lstrip("/").partition("/")
        with self.server.lock:
            self.server.asked[self.path] += 1
            asked = self.server.asked[self.path]
            self.server.at_once += 1
            self.server.most_at_once = max(self.server.most_at_once, self.server.at_once)
        self.server.before_answer(self.path)
        try:
            time.sleep(self.server.delay_s)
        finally:
            with self.server.lock:
                self.server.at_once -= 1
        if self.server.is_away:
            self.answer(503, b"")
            return
        if kind == "robots.txt" and self.server.is_robots_silent:
            self.server.closing.wait(30)
            self.close_connection = True
            return
        if kind == "robots.txt":
            robots = self.server.robots
            self.answer(
                503 if robots is None else 200 if robots else 404,
                robots or b"",
                "text/plain",
                robots="noindex",
            )
            return
        number = int("0" + "".join(c for c in rest if c.isdigit()))
        good = encoded(picture(number))
        if kind == "good":
            self.answer(200, good)
        elif kind == "jpeg":
            self.answer(200, encoded(picture(number), ".jpg"), "image/jpeg")
        elif kind == "html":
            self.answer(200, b"<!DOCTYPE html><title>gone</title>")
        elif kind == "truncated":
            self.answer(200, good[: len(good) // 2])
        elif kind == "truncated_jpeg":
            whole = encoded(picture(number, 200), ".jpg")
            self.answer(200, whole[: len(whole) // 2], "image/jpeg")
        elif kind == "broken_header":
            self.answer(200, b"\x89PNG\r\n\x1a\n" + b"garbage" * 9)
        elif kind == "bomb":
            self.answer(200, bomb())
        elif kind == "thread":
            self.answer(200, thread(1_000_000))
        elif kind == "flaky":
            self.answer(503 if asked == 1 else 200, b"" if asked == 1 else good)
        elif kind == "flaky3":
            self.answer(503 if asked <= 3 else 200, b"" if asked <= 3 else good)
        elif kind == "dead":
            self.answer(503, b"")
        elif kind == "forbidden":
            self.answer(403, b"no")
        elif kind == "noindex":
            self.answer(200, good, robots="noindex")
        elif kind == "other_agent":
            self.answer(200, good, robots="somebot: noindex")
        elif kind == "redirect":
            self.answer(302, b"", location=f"/good/{rest}")
        elif kind == "raw_redirect":  # its bytes are UTF-8
            self.answer(302, b"", location=f"/größe/{rest}".encode().decode("latin-1"))
        elif kind == quote("größe"):
            self.answer(200, good)
        elif kind == "early_hints":
            for link in ("a", "b"):
                head = f"HTTP/1.1 103 Early Hints\r\nLink: </{link}.css>; rel=preload\r\n\r\n"
                self.wfile.write(head.encode())
            self.answer(200, good)
        elif kind == "endless_hints":
            self.drip(b"", b"HTTP/1.1 103 Early Hints\r\n\r\n", 0)
        elif kind in ("gzip", "x-gzip"):
            self.answer(200, gzip.compress(good), encoding=kind)
        elif kind == "deflate":
            self.answer(200, zlib.compress(good), encoding=kind)
        elif kind == "raw_deflate":
            self.answer(200, zlib.compress(good, wbits=-15), encoding="deflate")
        elif kind == "gzip_twice":
            self.answer(200, gzip.compress(gzip.compress(good)), encoding="gzip, gzip")
        elif kind == "gzip_in_name_only":
            self.answer(200, good, encoding="gzip")
        elif kind == "gzip_bomb":
            self.answer(200, gzip.compress(bytes(10**6)), encoding="gzip")
        elif kind == "gzip_cut":
            self.answer(200, gzip.compress(good)[:-9], encoding="gzip")
        elif kind == "away":
            self.answer(
                302, b"", location=f"http://localhost:{self.server.server_address[1]}/good/{rest}"
            )
        elif kind == "to_file":
            self.answer(302, b"", location="file:///etc/hostname")
        elif kind == "loop":
            self.answer(302, b"", location=self.path)
        elif kind == "declared_large":
            self.send_response(200)
            self.send_header("Content-Length", str(10**10))
            self.end_headers()
        elif kind == "endless":
            self.drip(b"HTTP/1.1 200 OK\r\n\r\n", b"x" * 4096, 0)
        elif kind == "slow_body":
            self.drip(b"HTTP/1.1 200 OK\r\nContent-Length: 100000\r\n\r\n", b"x", 0.1)
        elif kind == "slow_headers":
            self.drip(b"HTTP/1.1 200 OK\r\n", b"X-A: b\r\n", 0.1)
        elif kind == "silent":
            self.server.closing.wait(30)
            self.close_connection = True
        elif kind == "cut":
            self.wfile.write(b"HTTP/1.1 200 OK\r\nContent-Length: 9999\r\n\r\n" + good)
            self.close_connection = True
        elif kind == "nonsense":
            self.wfile.write(b"SSH-2.0-OpenSSH_9.7\r\n")
            self.close_connection = True
        else:
            self.answer(404, b"not here")

    def answer(
        self,
        status: int,
        body: bytes,
        kind: str = "image/png",
        robots: str = "",
        location: str = "",
        encoding: str = "",
    ) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        if robots:
            self.send_header("X-Robots-Tag", robots)
        if location:
            self.send_header("Location", location)
        if encoding:
            self.send_header("Content-Encoding", encoding)
        self.end_headers()
        self.wfile.write(body)

    def drip(self, start: bytes, piece: bytes, pause_s: float) -> None:
        self.close_connection = True
        try:
            self.wfile.write(start)
            while not self.server.closing.wait(pause_s):
                self.wfile.write(piece)
        except OSError:
            pass  # the client has had enough

    def log_message(self, format: str, *args: object) -> None:
        pass


class Server(ThreadingHTTPServer):
    """Context manager; listens at `host`, `base` is its URL, `asked` counts the requests by path,
    `delay_s` delays every answer.
    """

    daemon_threads = True
    request_queue_size = 256

    def __init__(self, delay_s: float = 0.0, host: str = "127.0.0.1") -> None:
        super().__init__((host, 0), Handler)
        self.asked: Counter[str] = Counter()
        self.lock = threading.Lock()
        self.closing = threading.Event()
        self.delay_s = delay_s
        self.before_answer: Callable[[str], object] = lambda path: None
        """Called with the path of every request before it is answered; an answer waits for it."""
        self.robots: bytes | None = b""
        """What /robots.txt says; b"" for none, None for a 503."""
        self.is_robots_silent = False
        """Whether who asks for /robots.txt waits for ever."""
        self.is_away = False
        """Whether all that is asked is answered by a 503."""
        self.at_once = self.most_at_once = 0
        self.base = f"http://{host}:{self.server_address[1]}"

    def handle_error(self, request: object, client_address: object) -> None:
        pass

    def __enter__(self) -> Self:
        threading.Thread(
            target=self.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True
        ).start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.closing.set()
        self.shutdown()
        self.server_close()
