"""A real S3 server (SeaweedFS) on loopback for a test, and a proxy that does to its connections
what networks do.

`S3Server` starts one process, makes one bucket and gives the environment that reaches it.
`FaultyProxy` forwards HTTP and, by chance
under a fixed seed, answers 503, cuts connections, trickles answers, or flips a byte of a body.
"""

import http.client
import json
import random
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import TracebackType
from typing import Self

import s3fs

BUCKET = "lab"
MAKER = "MAKER-OF-THE-BUCKET"
ACCESS_KEY, SECRET_KEY = "AKIATESTUNCLIP", "s3cr3t-of-the-tests-f00dfeed"
START_LIMIT_S = 60


def free_ports(count: int) -> list[int]:
    """Return ports that are free now, each with the one 10,000 above it (SeaweedFS's gRPC) free
    too.
    """
    found: list[int] = []
    while len(found) < count:
        port = random.randint(20_000, 32_000)
        try:
            for each in (port, port + 10_000):
                with socket.socket() as probe:
                    probe.bind(("127.0.0.1", each))
        except OSError:
            continue
        if port not in found:
            found.append(port)
    return found


class S3Server:
    """Context manager: one SeaweedFS process with its data below `folder` and the bucket `lab`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __enter__(self) -> Self:
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / "store").mkdir(exist_ok=True)
        rights = [f"{right}:{BUCKET}" for right in ("Read", "Write", "List", "Tagging")]
        identities = [
            {
                "name": "maker",
                "credentials": [{"accessKey": MAKER, "secretKey": MAKER}],
                "actions": ["Admin", "Write", "Read", "List"],
            },
            {
                "name": "user",
                "credentials": [{"accessKey": ACCESS_KEY, "secretKey": SECRET_KEY}],
                "actions": rights,
            },
        ]
        (self.folder / "s3.json").write_text(json.dumps({"identities": identities}))
        # Short, because a socket's name has at most 107 bytes and a test's folder is deep.
        self.sockets = Path(
            subprocess.run(
                ["mktemp", "-d"], capture_output=True, text=True, check=True
            ).stdout.strip()
        )
        self.s3_port, self.master, self.volume, self.filer = free_ports(4)
        self.endpoint = f"http://127.0.0.1:{self.s3_port}"
        self.process = subprocess.Popen(
            self._command(), stdout=(self.folder / "weed.log").open("wb"), stderr=subprocess.STDOUT
        )
        try:
            self._wait()
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def _command(self) -> list[str]:
        weed = Path(sys.executable).with_name("weed")
        return [
            str(weed),
            "-logtostderr=true",
            "server",
            f"-dir={self.folder / 'store'}",
            "-ip=127.0.0.1",
            "-ip.bind=127.0.0.1",
            "-master.telemetry=false",
            "-master.electionTimeout=1s",
            "-master.volumeSizeLimitMB=256",
            f"-master.port={self.master}",
            f"-volume.port={self.volume}",
            "-volume.max=16",
            "-volume.minFreeSpace=1",
            "-volume.preStopSeconds=1",
            "-filer",
            f"-filer.port={self.filer}",
            f"-filer.localSocket={self.sockets}/filer",
            "-s3",
            f"-s3.port={self.s3_port}",
            f"-s3.config={self.folder / 's3.json'}",
            f"-s3.localSocket={self.sockets}/s3",
            "-s3.port.iceberg=0",
            "-s3.port.lance=0",
        ]

    def _wait(self) -> None:
        limit = time.monotonic() + START_LIMIT_S
        while True:
            assert self.process.poll() is None, (self.folder / "weed.log").read_text()[-2000:]
            try:
                self.files().mkdir(BUCKET)
                return
            except Exception:  # whatever a server says that is not up yet
                if time.monotonic() > limit:
                    raise
                time.sleep(0.2)

    def files(self) -> s3fs.S3FileSystem:
        """Return a client of all rights that goes around any proxy and remembers nothing."""
        return s3fs.S3FileSystem(
            key=MAKER,
            secret=MAKER,
            client_kwargs={"endpoint_url": self.endpoint, "region_name": "us-east-1"},
            use_listings_cache=False,
            skip_instance_cache=True,
        )

    def environment(self, endpoint: str | None = None) -> dict[str, str]:
        """Return the variables by which any S3 client finds the server, directly or through a
        proxy's `endpoint`.
        """
        return {
            "AWS_ENDPOINT_URL": endpoint or self.endpoint,
            "AWS_ACCESS_KEY_ID": ACCESS_KEY,
            "AWS_SECRET_ACCESS_KEY": SECRET_KEY,
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_EC2_METADATA_DISABLED": "true",
        }

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.process.kill()  # a SIGTERM takes it 18 s
        self.process.wait()
        shutil.rmtree(self.sockets, ignore_errors=True)


@dataclass(frozen=True)
class Faults:
    """How often what happens, as shares of all requests."""

    unavailable: float = 0.0
    cut_request: float = 0.0
    """The connection closes before the server hears of the request."""
    cut_answer: float = 0.0
    """The server has done it, but its answer never arrives whole."""
    slow: float = 0.0
    corrupt_answer: float = 0.0
    corrupt_request: float = 0.0


class _Forward(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: "FaultyProxy"

    def forward(self) -> None:
        body = self.body()
        happening = self.server.draw(self.command, self.path)
        if happening == "unavailable":
            self.reply(
                503,
                [("Content-Type", "application/xml")],
                b"<Error><Code>ServiceUnavailable</Code></Error>",
            )
            return
        if happening == "cut_request":
            self.close_connection = True
            return
        if happening == "corrupt_request" and body:
            body = flipped(body, self.server.chance)
            self.server.happened["corrupt_request_body"] += 1
        upstream = http.client.HTTPConnection("127.0.0.1", self.server.upstream_port, timeout=60)
        try:
            upstream.putrequest(self.command, self.path, skip_host=True, skip_accept_encoding=True)
            for name, value in self.headers.items():
                if name.lower() not in ("connection", "expect", "transfer-encoding"):
                    upstream.putheader(name, value)
            upstream.endheaders(body)
            answer = upstream.getresponse()
            data = answer.read()
            headers = [
                (k, v)
                for k, v in answer.getheaders()
                if k.lower() not in ("connection", "transfer-encoding", "content-length")
            ]
            length = answer.getheader("Content-Length", "0")
        finally:
            upstream.close()
        if self.command == "HEAD":
            self.reply(answer.status, headers, b"", int(length))
        elif happening == "cut_answer" and not data:
            self.close_connection = True
        elif happening == "cut_answer":
            self.reply(answer.status, headers, data[: len(data) // 2], len(data))
            self.close_connection = True
        elif happening == "slow":
            self.reply(answer.status, headers, data, pause_s=0.3)
        else:
            if (
                happening == "corrupt_answer"
                and data
                and self.command == "GET"
                and "?" not in self.path
            ):
                data = flipped(data, self.server.chance)
                self.server.happened["corrupt_answer_body"] += 1
            self.reply(answer.status, headers, data)

    do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = forward  # noqa: N815

    def body(self) -> bytes:
        if "chunked" in self.headers.get("Transfer-Encoding", ""):
            pieces = []
            while size := int(self.rfile.readline().split(b";")[0], 16):
                pieces.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(pieces)
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def reply(
        self,
        status: int,
        headers: list[tuple[str, str]],
        data: bytes,
        length: int | None = None,
        pause_s: float = 0,
    ) -> None:
        self.send_response_only(status)
        for name, value in headers:
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(data) if length is None else length))
        self.end_headers()
        for start in range(0, len(data), max(1, len(data) // 4)):
            self.wfile.write(data[start : start + max(1, len(data) // 4)])
            self.wfile.flush()
            time.sleep(pause_s)

    def log_message(self, format: str, *args: object) -> None:
        pass


def flipped(data: bytes, chance: random.Random) -> bytes:
    """Return the data with one bit of one byte turned over."""
    place = chance.randrange(len(data))
    return data[:place] + bytes([data[place] ^ 0x10]) + data[place + 1 :]


class FaultyProxy(ThreadingHTTPServer):
    """Context manager: listens at `host` and forwards to a server's port on loopback; `happened`
    counts what it did.

    `only` (method, end of the path) restricts the faults to some requests, which are then counted
    too, `at_most` their number.
    """

    daemon_threads = True
    request_queue_size = 128

    def __init__(
        self,
        upstream_port: int,
        faults: Faults,
        seed: int = 0,
        only: tuple[str, str] | None = None,
        at_most: int | None = None,
        host: str = "127.0.0.1",
    ) -> None:
        super().__init__((host, 0), _Forward)
        self.upstream_port, self.faults, self.only, self.at_most = (
            upstream_port,
            faults,
            only,
            at_most,
        )
        self.chance = random.Random(seed)
        self.happened: Counter[str] = Counter()
        self.lock = threading.Lock()
        self.endpoint = f"http://{host}:{self.server_address[1]}"

    def draw(self, method: str, path: str) -> str:
        """Return what shall happen to a request, or ""."""
        with self.lock:
            self.happened["requests"] += 1
            if self.only:
                if method != self.only[0] or not path.partition("?")[0].endswith(self.only[1]):
                    return ""
                self.happened[" ".join(self.only)] += 1
            if (
                self.at_most is not None
                and sum(self.happened[name] for name in vars(self.faults)) >= self.at_most
            ):
                return ""
            left = self.chance.random()
            for name, share in vars(self.faults).items():
                left -= share
                if left < 0:
                    self.happened[name] += 1
                    return str(name)
            return ""

    def handle_error(self, request: object, client_address: object) -> None:
        pass  # the client has hung up

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
        self.shutdown()
        self.server_close()
