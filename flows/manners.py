"""What a downloader owes a host: its robots.txt (RFC 9309), and no more connections at a time than agreed.

Each download process keeps what it learned of a host as long as it lives. Knows nothing of HTTP: who asks brings the reading.
"""

import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

AGENT = "unclip"
ROBOTS_BYTES = 512 << 10
"""RFC 9309, 2.5: a crawler must read at least 500 kibibytes."""

Origin = tuple[str, str, int]


@dataclass(frozen=True)
class Robots:
    """The rules for us in one robots.txt: pattern and whether it allows, as they stand there."""

    rules: tuple[tuple[str, bool], ...] = ()

    def allows(self, target: str) -> bool:
        """Say whether a path with its query may be asked: the longest pattern that matches decides, a tie allows (RFC 9309, 2.2.2)."""
        found = [(len(pattern), allowed) for pattern, allowed in self.rules if matches(pattern, target)]
        return max(found)[1] if found else True


def parse(text: str) -> Robots:
    """Read a robots.txt: the groups that name us, else those for everybody, merged."""
    mine: list[tuple[str, bool]] = []
    everybodys: list[tuple[str, bool]] = []
    is_named, in_agents, agents = False, False, set[str]()
    for line in text.removeprefix("\ufeff").splitlines():
        field, colon, value = line.partition("#")[0].partition(":")
        field, value = field.strip().lower(), value.strip()
        if not colon:
            continue
        if field == "user-agent":
            agents = agents if in_agents else set()
            agents.add(value.lower())
            in_agents = True
            is_named = is_named or value.lower() == AGENT
        elif field in ("allow", "disallow"):
            in_agents = False
            if value:  # an empty Disallow forbids nothing
                if AGENT in agents:
                    mine.append((value, field == "allow"))
                if "*" in agents:
                    everybodys.append((value, field == "allow"))
    return Robots(tuple(mine if is_named else everybodys))


def matches(pattern: str, target: str) -> bool:
    """Say whether a pattern with `*` and a final `$` matches the start of a path."""
    ends = pattern.endswith("$")
    parts = [re.escape(part) for part in pattern.removesuffix("$").split("*")]
    return re.match(".*".join(parts) + ("$" if ends else ""), target) is not None


class Hosts:
    """What one process knows of the hosts it asks; threads share it."""

    def __init__(self) -> None:
        self.guard = threading.Lock()
        self.robots: dict[Origin, Robots] = {}
        self.reading: dict[Origin, threading.Lock] = {}
        self.places: dict[tuple[Origin, int], threading.BoundedSemaphore] = {}

    def allows(self, origin: Origin, target: str, read: Callable[[], str]) -> bool:
        """Say whether the host lets us ask for `target`; `read` fetches its robots.txt, once for all, and raises where it cannot."""
        with self.guard:
            lock = self.reading.setdefault(origin, threading.Lock())
        with lock:
            if origin not in self.robots:
                self.robots[origin] = parse(read())
        return self.robots[origin].allows(target)

    @contextmanager
    def place(self, origin: Origin, at_once: int) -> Iterator[None]:
        """Hold one of the host's `at_once` places while the block runs; 0 sets no limit."""
        if not at_once:
            yield
            return
        with self.guard:
            places = self.places.setdefault((origin, at_once), threading.BoundedSemaphore(at_once))
        with places:
            yield
