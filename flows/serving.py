"""The command `unclip serve`: opens a run's living index and its CLIP, and hands them to the service as plain callables."""

import ipaddress
import sys
from collections.abc import Callable, Hashable
from typing import TYPE_CHECKING, Annotated

import typer

from flows.fetch import FetchError, Rules, fetch_image
from flows.options import DEFAULT_ROOT, RootUri, open_for
from flows.using import RunName
from infra.errors import CallerError
from infra.storage import Root

if TYPE_CHECKING:
    from flows.living import Lineage
    from indexing.service import Encoders, Parts
    from indexing.view import Segment

QUERY_RULES = Rules(timeout_s=10, retries=0, max_bytes=8 << 20, max_pixels=32 << 20, allow_private=False)


def serve(
    host: Annotated[
        str, typer.Option("--host", metavar="ADDRESS", help="Address to listen on; any but loopback needs a token.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option("--port", min=0, max=65_535, help="0 takes a free one.")] = 8080,
    token: Annotated[
        str | None,
        typer.Option("--token", envvar="UNCLIP_TOKEN", metavar="TOKEN", help="What clients must present; better in the environment."),
    ] = None,
    rate: Annotated[float, typer.Option("--rate", min=0, help="Requests a second that one address may make; 0 sets no limit.")] = 50,
    allow_urls: Annotated[
        bool, typer.Option("--allow-urls", help="Fetch query pictures from public addresses when a client names an URL.")
    ] = False,
    root: RootUri = DEFAULT_ROOT,
    run: RunName = None,
) -> None:
    """Serve a run's index: a search page, an HTTP interface, and clip-retrieval's protocol."""
    if token is None and not is_loopback(host):
        raise CallerError(f"--host {host} can be reached from elsewhere: set UNCLIP_TOKEN to a secret of at least 16 characters")
    if token is not None and (len(token) < 16 or not token.isascii() or not token.isprintable() or set(token) & set(' ";,\\')):
        raise CallerError("--token: use at least 16 letters, digits, dashes or underscores, such as `openssl rand -hex 16` prints")
    opened = open_for(root, for_writing=False)
    from indexing.app import run as run_service
    from indexing.service import ServeConfig, Service

    service = Service(parts_of(opened, run, allow_urls, say))
    samples = service.current().view.count
    config = ServeConfig(host=host, port=port, token=token, rate=rate, burst=max(1, 4 * rate))
    run_service(service, config, lambda address: say(f"{samples:,} pictures of run {service.parts.name} at {address}"))


def parts_of(root: Root, run: str | None, allow_urls: bool, report: Callable[[str], None]) -> "Parts":
    """Return what the service needs of a run, by default of the one that finished last."""
    from flows import living
    from indexing.service import Parts
    from infra.removals import read_removals

    name = living.lineage(root, run).record["name"]
    removals_stamp = living.RemovalsStamp(root)

    def segments_stamp() -> Hashable:
        removals_stamp.look()
        return living.segments_stamp(root, name)

    def open_segments() -> "tuple[list[Segment], Encoders]":
        known = living.lineage(root, name)
        return living.open_segments(known), load_encoders(known)

    return Parts(
        name=name,
        removals_stamp=removals_stamp,
        read_removals=lambda: read_removals(root),
        segments_stamp=segments_stamp,
        open_segments=open_segments,
        fetch=fetch_query if allow_urls else None,
        report=report,
    )


def load_encoders(known: "Lineage") -> "Encoders":
    """Load the CLIP that made an index."""
    from indexing.service import Encoders
    from training import embed

    texts, images, image_px = embed.encoders(known.clip.local())
    return Encoders(known.fingerprint, texts, images, image_px)


def fetch_query(url: str) -> bytes:
    """Return the picture behind an URL of the open internet. Raises ValueError that does not tell what a private address answered."""
    try:
        return fetch_image(url, QUERY_RULES)
    except FetchError as error:
        raise ValueError(f"image_url: it could not be fetched ({error.reason})") from None


def is_loopback(host: str) -> bool:
    """Say whether only this machine can reach an address that is listened on."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def say(line: str) -> None:
    """Print a line for people beside the log."""
    print(f"unclip: {line}", file=sys.stderr, flush=True)
