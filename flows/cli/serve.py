"""The command `serve`: open a run's live index and its CLIP, and serve them over HTTP.

`application` is the same service for Ray Serve, for use in a Serve config or a RayService
(infra/deploy/rayservice.yaml). Every process reads secrets (the token, a store's credentials) from
its own environment, because Ray stores and shows the arguments of an application. Reads ROOT and
writes nothing to it.
"""

import ipaddress
import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any
from urllib.parse import urlsplit

import typer
from pydantic import Field

from flows.cli.option_groups import option_groups
from flows.cli.options import DEFAULT_ROOT, RootUri, RunName
from flows.config.roots import open_for
from infra.compute.bounded_processes import PACKAGES
from infra.compute.cluster import Cluster, ClusterConfig
from infra.compute.supervisor import Supervisor, end_with
from infra.console.line_log import write_lines
from infra.console.log_redirect import quiet_terminal, terminated
from infra.errors import CallerError, UnclipError
from infra.settings import Section
from infra.storage.store import Root

if TYPE_CHECKING:
    from flows.live_index.lineage import Lineage
    from indexing.ann.view import Segment
    from indexing.service.state import Encoders, Opened, Parts, ServeConfig, Service

QUERY_RULES: dict[str, Any] = {
    "timeout_s": 10,
    "retries": 0,
    "max_bytes": 8 << 20,
    "max_pixels": 32 << 20,
    "allow_private": False,
}
"""Rules for images that a query names by URL (flows.ingest.http_fetch.Rules)."""
TOKEN = "UNCLIP_TOKEN"
BACKLOG = 2048
"""Connections that wait while the service starts again."""
START_WORKER = (
    "import sys; sys.path.append(sys.argv.pop(1)); from flows.cli.main import main; main()"
)


class Replicated(Section):
    """Which run to serve, and how; the arguments of `application`."""

    root: str
    """URI of ROOT, reachable from every node."""
    run: str | None = None
    """Name of the run; by default the promoted or the last one, also when that changes later."""
    replicas: int = Field(default=2, ge=1, le=1000)
    """Number of server processes; each holds the index's hot part in memory."""
    cpus: float = Field(default=1, gt=0)
    """CPU cores that Ray reserves for each replica."""
    rate: float = Field(default=50, ge=0)
    """Maximum requests per second of one address to all replicas together; 0 is no limit."""
    allow_urls: bool = False
    """Whether clients may name query images by a public URL, which the server fetches."""
    is_open: bool = False
    """Whether to serve without a token, to loopback names only.

    Otherwise UNCLIP_TOKEN must be in the nodes' environment.
    """
    allow_origins: tuple[str, ...] = ()
    """Origins whose web pages may send requests, in addition to our own page."""
    removal_lag_s: float = Field(default=0, ge=0)
    """Maximum age of the cached removal log of a ROOT in a store; 0 checks it on every query."""


class Work(Section):
    """What `serve_worker` reads from its stdin; the token is in no argument, which others see."""

    settings: Replicated
    """Which run to serve, and how."""
    host: str
    """Address that the socket listens on."""
    token: str | None
    """Token that clients must send."""
    fd: int
    """File descriptor of the listening socket."""


Host = Annotated[
    str,
    typer.Option(
        "--host",
        metavar="ADDRESS",
        help="Address to listen on; all except loopback need a token.",
    ),
]
Port = Annotated[int, typer.Option("--port", min=0, max=65_535, help="0 selects a free port.")]
Token = Annotated[
    str | None,
    typer.Option(
        "--token",
        envvar=TOKEN,
        metavar="TOKEN",
        help="Token that clients must send; prefer the environment variable.",
    ),
]
Rate = Annotated[
    float,
    typer.Option(
        "--rate", min=0, help="Maximum requests per second of one address; 0 is no limit."
    ),
]
AllowUrls = Annotated[
    bool,
    typer.Option(
        "--allow-urls",
        help="Let clients name query pictures by a public URL, which the server fetches.",
    ),
]
AllowOrigins = Annotated[
    list[str] | None,
    typer.Option(
        "--allow-origin",
        metavar="ORIGIN",
        help="Let web pages of this origin (https://host:port) send requests, such as "
        "clip-retrieval's front end; may be repeated.",
    ),
]
RemovalLag = Annotated[
    float,
    typer.Option(
        "--removal-lag",
        min=0,
        metavar="SECONDS",
        help="With a ROOT in a store: maximum age of the cached removal log; "
        "0 checks it on every query.",
    ),
]
Replicas = Annotated[
    int | None,
    typer.Option(
        "--replicas",
        min=1,
        max=1000,
        help="Serve from this many processes on Ray Serve; by default from this process.",
    ),
]
ReplicaAddress = Annotated[
    str | None,
    typer.Option(
        "--address",
        metavar="RAY",
        help="Ray cluster for the replicas; by default a small local one is started.",
    ),
]


@dataclass(frozen=True)
class ListenOptions:
    """Where the server listens, and the token that clients must send."""

    host: Host = "127.0.0.1"
    port: Port = 8080
    token: Token = None


@dataclass(frozen=True)
class QueryOptions:
    """What clients may ask, and how fresh an answer is."""

    rate: Rate = 50
    allow_urls: AllowUrls = False
    allow_origins: AllowOrigins = None
    removal_lag_s: RemovalLag = 0


@dataclass(frozen=True)
class ReplicaOptions:
    """How many processes serve, and the Ray cluster that they run on."""

    replicas: Replicas = None
    address: ReplicaAddress = None


@option_groups
def serve(
    listen: ListenOptions = ListenOptions(),
    queries: QueryOptions = QueryOptions(),
    deployment: ReplicaOptions = ReplicaOptions(),
    root: RootUri = DEFAULT_ROOT,
    run: RunName = None,
) -> None:
    """Serve a run's index: a search page, an HTTP interface, and clip-retrieval's protocol.

    Without --run it serves the promoted run, or the last one if there is no gate. Removed samples
    are no longer returned from the next query on.
    """
    if listen.token is None and not is_loopback(listen.host):
        raise CallerError(
            f"--host {listen.host} can be reached from elsewhere: "
            f"set {TOKEN} to a secret of at least 16 characters"
        )
    check_token(listen.token)
    origins = tuple(as_origin(origin) for origin in queries.allow_origins or ())
    opened = open_for(root, for_writing=False)
    settings = Replicated(
        root=opened.uri,
        run=run,
        replicas=deployment.replicas or 2,
        rate=queries.rate,
        allow_urls=queries.allow_urls,
        is_open=listen.token is None,
        allow_origins=origins,
        removal_lag_s=queries.removal_lag_s,
    )
    if deployment.replicas or deployment.address:
        serve_replicas(opened, settings, listen, deployment.address)
    else:
        raise typer.Exit(serve_here(settings, listen))


def serve_here(settings: Replicated, listen: ListenOptions) -> int:
    """Serve from a process of this machine until interrupted; return its exit code.

    The process is started again after a crash. Meanwhile clients wait, because the address stays
    open here.
    """
    with _bound(listen.host, listen.port) as listener:
        work = Work(settings=settings, host=listen.host, token=listen.token, fd=listener.fileno())
        return Supervisor(partial(_start_worker, work), say).run()


def _bound(host: str, port: int) -> socket.socket:
    """Return a socket that listens. Raises UnclipError."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=BACKLOG)
    except OSError as error:
        reason = str(error.strerror or error).partition(" (")[0]
        raise UnclipError(
            f"--host {host} --port {port}: {reason}: give another address or port, or end the "
            "process that has it"
        ) from error


def _start_worker(work: "Work") -> "subprocess.Popen[bytes]":
    """Start `serve_worker` in a process group of its own: the supervisor passes Ctrl-C on."""
    debug = ["--debug"] if "--debug" in sys.argv else []
    worker = subprocess.Popen(
        [sys.executable, "-P", "-c", START_WORKER, str(PACKAGES), "serve-worker", *debug],
        stdin=subprocess.PIPE,
        pass_fds=(work.fd,),
        process_group=0,
    )
    assert worker.stdin is not None
    with suppress(BrokenPipeError):  # it has crashed already
        worker.stdin.write(work.model_dump_json().encode() + b"\n")
        worker.stdin.flush()
    return worker


def serve_worker() -> None:
    """Serve from this process; `unclip serve` starts it, and sends a line of Work to its stdin."""
    from indexing.service.app import run as run_service
    from indexing.service.state import ServeConfig, Service

    work = Work.model_validate_json(sys.stdin.buffer.readline())
    end_with(sys.stdin.fileno())
    settings = work.settings
    opened = open_for(settings.root, for_writing=False)
    service = Service(parts_of(opened, settings.run, settings.allow_urls, say))
    version = service.current()
    config = ServeConfig(
        host=work.host,
        token=work.token,
        rate=settings.rate,
        burst=max(1, 4 * settings.rate),
        allow_origins=settings.allow_origins,
        removal_lag_s=settings.removal_lag_s,
    )
    run_service(
        service,
        config,
        lambda address: say(f"{version.view.count:,} pictures of run {version.name} at {address}"),
        listener=socket.socket(fileno=work.fd),
    )


def serve_replicas(
    opened: Root, settings: Replicated, listen: ListenOptions, address: str | None
) -> None:
    """Deploy the replicas on Ray and serve until interrupted.

    A Ray cluster started here passes on the token; the nodes of another cluster must have it.
    """
    from flows.live_index.lineage import lineage

    name = lineage(opened, settings.run).record["name"]  # reports a missing run before Ray starts
    if listen.token is not None and not address:
        os.environ[TOKEN] = listen.token
    # With fewer cores than replicas Ray would wait forever to start the last ones.
    cores = max(len(os.sched_getaffinity(0)), settings.replicas)
    cluster = Cluster(ClusterConfig(address=address or "", num_cpus=None if address else cores))
    with (
        quiet_terminal(Path(tempfile.gettempdir()) / f"unclip-serve-{os.getpid()}.log") as log,
        cluster,
    ):
        cluster.start()
        from indexing.service.ray_serve import run as run_replicas

        host, port = listen.host, listen.port or free_port(listen.host)
        url = f"http://{f'[{host}]' if ':' in host else host}:{port}"
        message = f"{settings.replicas} replicas serve run {name} at {url}; Ray's log is {log}"
        with suppress(KeyboardInterrupt), terminated():  # after Ray, which sets its own handler
            run_replicas(application(settings), host, port, lambda: say(message))


def application(settings: Replicated) -> Any:
    """Return the service of a run as a Ray Serve application.

    In a Serve config, its `args` are the fields of Replicated.
    """
    from indexing.service.ray_serve import application as replicated

    return replicated(partial(open_replica, settings), settings.replicas, settings.cpus)


def open_replica(settings: Replicated) -> "tuple[Service, ServeConfig]":
    """Open the service in a replica.

    Raises CallerError if a token is required and the node's environment has none.
    """
    from indexing.service.state import ServeConfig, Service

    token = None if settings.is_open else os.environ.get(TOKEN)
    if token is None and not settings.is_open:
        raise CallerError(
            f"{TOKEN} is not in the environment of the Ray node that a replica started on: "
            "set it on every node"
        )
    check_token(token)
    service = Service(
        parts_of(open_for(settings.root, for_writing=False), settings.run, settings.allow_urls, say)
    )
    share = settings.rate / settings.replicas
    burst = max(1, 4 * share)
    return service, ServeConfig(
        token=token,
        rate=share,
        burst=burst,
        allow_origins=settings.allow_origins,
        removal_lag_s=settings.removal_lag_s,
    )


def as_origin(text: str) -> str:
    """Return an origin as browsers send it.

    Raises CallerError for anything else, such as a URL with a path, a wildcard or another scheme.
    """
    parts = urlsplit(text.lower().removesuffix("/"))
    try:
        port = parts.port
    except ValueError:
        port = -1
    usual = {"http": 80, "https": 443}
    rest = (parts.path, parts.query, parts.fragment, parts.username)
    if parts.scheme not in usual or not parts.hostname or any(rest) or port == -1:
        raise CallerError(
            f"--allow-origin {text}: give scheme, host and port alone, "
            "such as https://search.example.org"
        )
    host = f"[{parts.hostname}]" if ":" in parts.hostname else parts.hostname
    return f"{parts.scheme}://{host}" + (f":{port}" if port and port != usual[parts.scheme] else "")


def check_token(token: str | None) -> None:
    """Raise CallerError for a token that is too short or not valid in an HTTP header."""
    if token is not None and (
        len(token) < 16
        or not token.isascii()
        or not token.isprintable()
        or set(token) & set(' ";,\\')
    ):
        raise CallerError(
            f"{TOKEN}: use at least 16 letters, digits, dashes or underscores, "
            "such as `openssl rand -hex 16` prints"
        )


def free_port(host: str) -> int:
    """Return a port of the address that is free now."""
    with socket.create_server(
        (host, 0), family=socket.AF_INET6 if ":" in host else socket.AF_INET
    ) as probe:
        return int(probe.getsockname()[1])


def parts_of(
    root: Root, run: str | None, allow_urls: bool, report: Callable[[str], None]
) -> "Parts":
    """Return the parts of a run that the service uses.

    Without a run name it is always the run that `find_run` returns at that time.
    """
    from flows.live_index.lineage import RemovalLog, SegmentsStamp
    from indexing.service.state import Parts

    log = RemovalLog(root)
    return Parts(
        removals_stamp=log.stamp,
        read_removals=log.read,
        segments_stamp=SegmentsStamp(root, run),
        open_segments=Opener(root, run, report),
        fetch=fetch_query if allow_urls else None,
        report=report,
        check_removals=log.check if root.folder is None else None,
    )


class Opener:
    """Opens a run's segments and CLIP on every call; those that have not changed stay open."""

    def __init__(self, root: Root, run: str | None, report: Callable[[str], None]) -> None:
        self.root, self.run, self.report = root, run, report
        self._segments: dict[str, Segment] = {}
        self._encoders: Encoders | None = None
        self._told: set[str] = set()

    def __call__(self) -> "Opened":
        """Open the run's current segments and CLIP.

        Raises CallerError if there is no such run or it has no index, and DataError if an index
        cannot be opened.
        """
        from flows.live_index.lineage import lineage, open_segments, warnings
        from indexing.service.state import Opened

        run_lineage = lineage(self.root, self.run)
        segments = open_segments(run_lineage, self._segments)
        if self._encoders is None or self._encoders.clip != run_lineage.fingerprint:
            self._encoders = load_encoders(run_lineage)
        self._segments = {segment.name: segment for segment in segments}
        for line in warnings(run_lineage):
            if line not in self._told:
                self.report(line)
        self._told = set(warnings(run_lineage))
        return Opened(run_lineage.record["name"], segments, self._encoders)


def load_encoders(run_lineage: "Lineage") -> "Encoders":
    """Load the CLIP that embedded an index."""
    from indexing.service.state import Encoders
    from training.data.image_reader import as_square
    from training.jobs import embed

    with run_lineage.clip.files.local_copy() as clip:
        texts, images, image_px = embed.encoders(clip)
        look = embed.read_look(clip)
    return Encoders(
        run_lineage.fingerprint,
        texts,
        images,
        image_px,
        partial(as_square, look=look),
    )


def fetch_query(url: str) -> bytes:
    """Fetch an image from a public URL.

    Raises ValueError, whose message reveals nothing of a private address's response.
    """
    from flows.ingest.http_fetch import FetchError, Rules, fetch_image

    try:
        return fetch_image(url, Rules(**QUERY_RULES))
    except FetchError as error:
        raise ValueError(f"image_url: it could not be fetched ({error.reason})") from None


def is_loopback(host: str) -> bool:
    """Return whether only this machine can reach a listening address."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def say(line: str) -> None:
    """Print a message to stderr."""
    write_lines(sys.stderr, [f"unclip: {line}"])
