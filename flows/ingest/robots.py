"""Parser and matcher for robots.txt (RFC 9309)."""

import re
from dataclasses import dataclass

from infra.canonical_url import PATH_SAFE, QUERY_SAFE, escaped

AGENT = "unclip"
PRODUCT_TOKEN = re.compile(r"[a-z_-]+|\*(?!\S)")
"""What a User-agent line begins with; a version or comment after it is ignored (2.2.1)."""

RULE_BYTES = 150
"""Approximate memory of a rule in bytes, without its text."""


@dataclass(frozen=True)
class Robots:
    """The rules of one robots.txt that apply to us: (pattern, is allowed), in file order."""

    rules: tuple[tuple[str, bool], ...] = ()

    @property
    def size_bytes(self) -> int:
        """Approximate memory in bytes."""
        return sum(RULE_BYTES + len(pattern) for pattern, _ in self.rules)

    def allows(self, target: str) -> bool:
        """Return whether the path with its query of a canonical URL may be requested.

        The longest matching pattern decides; if two are equally long, allow wins (RFC 9309, 2.2.2).
        """
        decisions = [
            (len(pattern), allowed) for pattern, allowed in self.rules if matches(pattern, target)
        ]
        return max(decisions)[1] if decisions else True


def parse(text: str) -> Robots:
    """Parse a robots.txt: merge the groups for AGENT if there are any, else those for `*`."""
    own_rules: list[tuple[str, bool]] = []
    common_rules: list[tuple[str, bool]] = []
    is_named, in_agents, agents = False, False, set[str]()
    for line in text.removeprefix("\ufeff").splitlines():
        field, colon, value = line.partition("#")[0].partition(":")
        field, value = field.strip().lower(), value.strip()
        if not colon:
            continue
        if field == "user-agent":
            agents = agents if in_agents else set()
            token = PRODUCT_TOKEN.match(value.lower())
            agents |= {token[0]} if token else set()
            in_agents = True
            is_named = is_named or AGENT in agents
        elif field in ("allow", "disallow"):
            in_agents = False
            if value:  # an empty Disallow forbids nothing
                value = canonical_pattern(value)
                if AGENT in agents:
                    own_rules.append((value, field == "allow"))
                if "*" in agents:
                    common_rules.append((value, field == "allow"))
    return Robots(tuple(own_rules if is_named else common_rules))


def canonical_pattern(pattern: str) -> str:
    """Return a pattern with escapes as in a canonical URL, with which it is compared (2.2.2)."""
    path, question, query = pattern.partition("?")
    return escaped(path, PATH_SAFE) + question + escaped(query, QUERY_SAFE)


def matches(pattern: str, target: str) -> bool:
    """Return whether a pattern with `*` and an optional final `$` matches the start of a path.

    The time is linear in both, because the pattern comes from an untrusted host.
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
