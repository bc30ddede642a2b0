"""Limits per host: robots.txt (RFC 9309) and the number of simultaneous connections.

Each process remembers the rules and failures of the hosts that it asked most recently. Knows
nothing of HTTP: the caller passes the function that reads robots.txt.
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
"""Seconds during which a host that did not answer is not asked again."""
MAX_FAILED_CONNECTIONS = 6
"""Maximum failed connections in a row before a host is left alone."""
MAX_HOSTS, MAX_BYTES = 10_000, 64 << 20
"""Maximum hosts and bytes of robots.txt rules that one process remembers."""

Origin = tuple[str, str, int]


class RecentFailureError(Exception):
    """What a host failed with a short while ago; it is not asked again yet."""

    def __init__(self, first: Exception) -> None:
        super().__init__(str(first))
        self.first = first


@dataclass
class Host:
    """State of one host: its rules, recent failure and connection slots."""

    reading: threading.Lock = field(default_factory=threading.Lock)
    robots: Robots | None = None
    robots_until_s: float = 0.0
    failure: Exception | None = None
    """Why its robots.txt could not be read."""
    vain_connections: int = 0
    """That failed in a row."""
    silent_until_s: float = 0.0
    """Neither its robots.txt nor a connection is tried before."""
    slots: dict[int, threading.BoundedSemaphore] = field(default_factory=dict)
    users: int = 0


class Hosts:
    """What one process knows of the hosts it asks; threads share it. Bounded: hosts that were not
    asked for longest are forgotten.
    """

    def __init__(self, max_hosts: int = MAX_HOSTS, max_bytes: int = MAX_BYTES) -> None:
        self.most_hosts, self.most_bytes = max_hosts, max_bytes
        self.guard = threading.Lock()
        self.known: OrderedDict[Origin, Host] = OrderedDict()
        self.rules_bytes = 0
        self.finished = 0
        """Requests that came to an end, well or not: while any are made, this moves at least once
        in the time limit of one."""

    def allows(self, origin: Origin, target: str, read: Callable[[], str]) -> bool:
        """Say whether the host lets us ask for `target`; `read` fetches its robots.txt, once for
        all, and raises where it cannot.

        What it raises is remembered for `FAILURE_S`, and raised as RecentFailureError meanwhile: a
        host that does not answer costs one wait.
        """
        with self._requesting(origin) as host:
            with host.reading:
                now = time.monotonic()
                if host.failure and now < host.silent_until_s:
                    raise RecentFailureError(host.failure)
                if host.robots is None or now >= host.robots_until_s:
                    try:
                        robots = parse(read())
                    except Exception as error:
                        host.failure, host.silent_until_s = error, time.monotonic() + FAILURE_S
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
        """Hold one of the host's `at_once` places while the block runs; 0 sets no limit."""
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

    def is_silent(self, origin: Origin) -> bool:
        """Say whether so many connections to a host failed in a row that it is left alone for a
        while.
        """
        with self.guard:
            host = self.known.get(origin)
            return (
                host is not None
                and host.vain_connections >= MAX_FAILED_CONNECTIONS
                and time.monotonic() < host.silent_until_s
            )

    def connected(self, origin: Origin, is_good: bool) -> None:
        """Take note that a connection to a host came about, or did not."""
        with self.guard:
            host = self.known.get(origin)
            if host is not None:
                host.vain_connections = 0 if is_good else host.vain_connections + 1
                if host.vain_connections >= MAX_FAILED_CONNECTIONS:
                    host.silent_until_s = time.monotonic() + FAILURE_S

    def forgive(self) -> None:
        """Forget what failed: another pass asks everybody again."""
        with self.guard:
            for host in self.known.values():
                host.failure, host.vain_connections, host.silent_until_s = None, 0, 0.0

    @contextmanager
    def _requesting(self, origin: Origin) -> Iterator[Host]:
        with self.guard:
            host = self.known.setdefault(origin, Host())
            self.known.move_to_end(origin)
            host.users += 1
        try:
            yield host
        finally:
            with self.guard:
                host.users -= 1
                self._forget()

    def _forget(self) -> None:
        """Let go of the hosts that were not asked for longest, as far as the bounds ask it; one in
        use stays. Called under the guard.
        """
        if len(self.known) <= self.most_hosts and self.rules_bytes <= self.most_bytes:
            return
        for origin, host in list(self.known.items()):
            if len(self.known) <= self.most_hosts and self.rules_bytes <= self.most_bytes:
                break
            if not host.users:
                del self.known[origin]
                self.rules_bytes -= host.robots.size_bytes if host.robots else 0
