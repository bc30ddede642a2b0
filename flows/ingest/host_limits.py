"""Limits per host: robots.txt (RFC 9309) and the number of simultaneous connections.

Each process remembers the rules and failures of the hosts that it used most recently. Contains no
HTTP code: the caller passes the function that reads robots.txt.
"""

import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field

from flows.ingest.robots import Robots, parse

ROBOTS_BYTES = 512 << 10
"""RFC 9309, 2.5: a crawler must read at least 500 kibibytes."""
ROBOTS_S = 86_400
"""RFC 9309, 2.4: a copy older than a day should not be used."""
FAILURE_S = 60
"""Seconds before a host that did not answer gets another request."""
MAX_FAILED_CONNECTIONS = 6
"""Failed connections in a row after which a host gets no requests for FAILURE_S."""
MAX_HOSTS, MAX_BYTES = 10_000, 64 << 20
"""Maximum hosts and bytes of robots.txt rules that one process remembers."""

Origin = tuple[str, str, int]


class RecentFailureError(Exception):
    """A host failed less than FAILURE_S ago; `original` is the error of that failure."""

    def __init__(self, original: Exception) -> None:
        super().__init__(str(original))
        self.original = original


@dataclass
class Host:
    """State of one host: its rules, recent failure and connection slots."""

    robots_lock: threading.Lock = field(default_factory=threading.Lock)
    robots: Robots | None = None
    robots_until_s: float = 0.0
    failure: Exception | None = None
    """Why its robots.txt could not be read."""
    failed_connections: int = 0
    """Number of connections that failed in a row."""
    paused_until_s: float = 0.0
    """Until then (time.monotonic) neither robots.txt nor a connection is tried."""
    slots: dict[int, threading.BoundedSemaphore] = field(default_factory=dict)
    users: int = 0


class Hosts:
    """State of all hosts that one process uses; safe to share between threads.

    At most `max_hosts` hosts and `max_bytes` of robots.txt rules are kept; the least recently used
    hosts are removed first.
    """

    def __init__(self, max_hosts: int = MAX_HOSTS, max_bytes: int = MAX_BYTES) -> None:
        self.max_hosts, self.max_bytes = max_hosts, max_bytes
        self.guard = threading.Lock()
        self.hosts_by_origin: OrderedDict[Origin, Host] = OrderedDict()
        self.rules_bytes = 0
        self.finished = 0
        """Number of requests that ended, successful or not. While requests are made, it grows at
        least once per time limit of one request."""

    def allows(self, origin: Origin, target: str, read: Callable[[], str]) -> bool:
        """Return whether the host's robots.txt allows a request for `target`.

        `read` fetches robots.txt, or raises; it is called once per host and ROBOTS_S. Its error is
        remembered: for FAILURE_S, later calls raise RecentFailureError without calling `read`, so
        that a host that does not answer delays only one request.
        """
        with self._requesting(origin) as host:
            with host.robots_lock:
                now = time.monotonic()
                if host.failure and now < host.paused_until_s:
                    raise RecentFailureError(host.failure)
                if host.robots is None or now >= host.robots_until_s:
                    try:
                        robots = parse(read())
                    except Exception as error:
                        host.failure, host.paused_until_s = error, time.monotonic() + FAILURE_S
                        raise
                    with self.guard:
                        self.rules_bytes += robots.size_bytes - (
                            host.robots.size_bytes if host.robots else 0
                        )
                        host.robots, host.robots_until_s, host.failure = (
                            robots,
                            time.monotonic() + ROBOTS_S,
                            None,
                        )
                robots = host.robots
            return robots.allows(target)

    @contextmanager
    def slot(self, origin: Origin, at_once: int) -> Iterator[None]:
        """Hold one of the host's `at_once` request slots while the block runs; 0 sets no limit."""
        with self._requesting(origin) as host:
            with self.guard:
                slots = (
                    host.slots.setdefault(at_once, threading.BoundedSemaphore(at_once))
                    if at_once
                    else nullcontext()
                )
            with slots:
                try:
                    yield
                finally:
                    with self.guard:
                        self.finished += 1

    def is_paused(self, origin: Origin) -> bool:
        """Return whether the host gets no requests now, because MAX_FAILED_CONNECTIONS in a row
        failed.
        """
        with self.guard:
            host = self.hosts_by_origin.get(origin)
            return (
                host is not None
                and host.failed_connections >= MAX_FAILED_CONNECTIONS
                and time.monotonic() < host.paused_until_s
            )

    def record_connection(self, origin: Origin, is_connected: bool) -> None:
        """Record whether a connection to a host succeeded."""
        with self.guard:
            host = self.hosts_by_origin.get(origin)
            if host is not None:
                host.failed_connections = 0 if is_connected else host.failed_connections + 1
                if host.failed_connections >= MAX_FAILED_CONNECTIONS:
                    host.paused_until_s = time.monotonic() + FAILURE_S

    def forget_failures(self) -> None:
        """Forget all failures, so that the next pass tries every host again."""
        with self.guard:
            for host in self.hosts_by_origin.values():
                host.failure, host.failed_connections, host.paused_until_s = None, 0, 0.0

    @contextmanager
    def _requesting(self, origin: Origin) -> Iterator[Host]:
        with self.guard:
            host = self.hosts_by_origin.setdefault(origin, Host())
            self.hosts_by_origin.move_to_end(origin)
            host.users += 1
        try:
            yield host
        finally:
            with self.guard:
                host.users -= 1
                self._evict()

    def _evict(self) -> None:
        """Remove the least recently used hosts until the bounds hold; hosts in use stay.

        The caller holds the guard.
        """
        if len(self.hosts_by_origin) <= self.max_hosts and self.rules_bytes <= self.max_bytes:
            return
        for origin, host in list(self.hosts_by_origin.items()):
            if len(self.hosts_by_origin) <= self.max_hosts and self.rules_bytes <= self.max_bytes:
                break
            if not host.users:
                del self.hosts_by_origin[origin]
                self.rules_bytes -= host.robots.size_bytes if host.robots else 0
