"""Static file server on loopback, so that images in local folders are downloaded over HTTP too.

Serves named folders (mounts) read-only as `/<secret>/<mount>/<path>`. Listens on 127.0.0.1. Each
start has a new secret, so that a URL list cannot name served files.
"""

import mimetypes
import os
import secrets
import threading
from collections.abc import Mapping
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import TracebackType
from typing import Self
from urllib.parse import quote, unquote_to_bytes, urlsplit

from infra.storage.regular_files import open_regular

PART_BYTES = 1 << 20


class Handler(BaseHTTPRequestHandler):
    """Answers GET and HEAD below the server's mounts."""

    protocol_version = "HTTP/1.1"  # keep-alive: one connection per image would halve the rate
    disable_nagle_algorithm = True
    wbufsize = -1  # one write, hence one packet, for headers and body
    timeout = 60
    server: "Mounts"

    def do_GET(self) -> None:
        self.answer(with_body=True)

    def do_HEAD(self) -> None:
        self.answer(with_body=False)

    def answer(self, with_body: bool) -> None:
        """Send the file of the request path, or status 404."""
        path = self.server.locate(self.path)
        try:
            file = open_regular(path) if path else None
        except OSError:
            file = None
        if path is None or file is None:
            self.send_error(HTTPStatus.NOT_FOUND)
            return
        with file:
            left_bytes = os.fstat(file.fileno()).st_size
            self.send_response(HTTPStatus.OK)
            self.send_header(
                "Content-Type", mimetypes.guess_type(path.name)[0] or "application/octet-stream"
            )
            self.send_header("Content-Length", str(left_bytes))
            self.end_headers()
            while with_body and left_bytes and (part := file.read(min(PART_BYTES, left_bytes))):
                self.wfile.write(part)
                left_bytes -= len(part)
            if with_body and left_bytes:  # the file was cut while it was read
                self.close_connection = True
        self.wfile.flush()

    def log_message(self, format: str, *args: object) -> None:
        pass

    def version_string(self) -> str:
        return "unclip"


class Mounts(ThreadingHTTPServer):
    """The server: its listening socket and the folders that it serves."""

    daemon_threads = True
    request_queue_size = 256

    def __init__(self, mounts: Mapping[str, Path], port: int = 0) -> None:
        super().__init__(("127.0.0.1", port), Handler)
        self.secret = secrets.token_hex(16)
        self.roots = {f"{self.secret}/{name}": folder.resolve() for name, folder in mounts.items()}

    def handle_error(self, request: object, client_address: object) -> None:
        pass  # a client that closes its connection is not an error

    def locate(self, target: str) -> Path | None:
        """Return the file of a request target, or None.

        Files outside the mounts are never returned, not even through symbolic links.
        """
        try:
            path = os.fsdecode(unquote_to_bytes(urlsplit(target).path))
            for name, root in self.roots.items():
                if path.startswith(f"/{name}/"):
                    file = (root / path[len(name) + 2 :].lstrip("/")).resolve()
                    return file if file.is_relative_to(root) and file.is_file() else None
        except (ValueError, OSError, RuntimeError):
            pass  # an invalid URL, a NUL byte, a name that is too long, a loop of links
        return None


class StaticServer:
    """Context manager: serve `mounts` (name to folder) in a thread; `base` is the base URL."""

    def __init__(self, mounts: Mapping[str, Path]) -> None:
        self.mounts = mounts

    def __enter__(self) -> Self:
        self.server = Mounts(self.mounts)
        self.base = f"http://127.0.0.1:{self.server.server_address[1]}/{self.server.secret}"
        self.thread = threading.Thread(
            target=self.server.serve_forever, kwargs={"poll_interval": 0.1}, daemon=True
        )
        self.thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.server.shutdown()
        self.server.server_close()
        self.thread.join()


def url_path(mount: str, path: str) -> str:
    """Return the path part of the URL of `path` below `mount`, percent-encoded byte by byte."""
    return quote(os.fsencode(f"/{mount}/{path}"), safe="/@")
