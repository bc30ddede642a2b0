"""robots.txt (RFC 9309): parsing and matching."""

import string
from dataclasses import dataclass
from urllib.parse import quote

AGENT = "unclip"


RULE_BYTES = 150
"""Bytes of a rule in memory, beside its text."""


@dataclass(frozen=True)
class Robots:
    """The rules for us in one robots.txt: pattern and whether it allows, as they stand there."""

    rules: tuple[tuple[str, bool], ...] = ()

    @property
    def size_bytes(self) -> int:
        """Memory, roughly."""
        return sum(RULE_BYTES + len(pattern) for pattern, _ in self.rules)

    def allows(self, target: str) -> bool:
        """Say whether a path with its query may be asked: the longest pattern that matches decides,
        a tie allows (RFC 9309, 2.2.2).
        """
        decisions = [
            (len(pattern), allowed) for pattern, allowed in self.rules if matches(pattern, target)
        ]
        return max(decisions)[1] if decisions else True


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
                value = quote(
                    value, safe=string.printable
                )  # letters beyond ASCII as they stand in a request
                if AGENT in agents:
                    mine.append((value, field == "allow"))
                if "*" in agents:
                    everybodys.append((value, field == "allow"))
    return Robots(tuple(mine if is_named else everybodys))


def matches(pattern: str, target: str) -> bool:
    """Say whether a pattern with `*` and a final `$` matches the start of a path; the host wrote
    it, so the time is linear in both.
    """
    ends = pattern.endswith("$")
    first, *others = pattern.removesuffix("$").split("*")
    if not target.startswith(first):
        return False
    position = len(first)
    last = others.pop() if ends and others else None
    for part in others:
        offset = target.find(part, position)
        if offset < 0:
            return False
        position = offset + len(part)
    if last is not None:
        return len(target) - len(last) >= position and target.endswith(last)
    return not ends or position == len(target)
