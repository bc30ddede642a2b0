"""Rate limits by client network: one token bucket for an IPv4 address or an IPv6 /64."""

import ipaddress
from collections import OrderedDict

MAX_CLIENTS = 10_000


class Buckets:
    """Token buckets by client network; beyond MAX_CLIENTS, the least recently used are dropped."""

    def __init__(self, rate: float, burst: float) -> None:
        self.rate, self.burst = rate, burst
        self._level: OrderedDict[str, tuple[float, float]] = OrderedDict()

    def take(self, address: str, cost: float, now: float) -> float:
        """Take `cost` tokens of the client; return 0, or the seconds to wait if it has too few."""
        if self.rate == 0:
            return 0.0
        client = network_of(address)
        level, since = self._level.pop(client, (self.burst, now))
        level = min(self.burst, level + (now - since) * self.rate)
        is_allowed = level >= cost
        self._level[client] = (level - cost if is_allowed else level, now)
        while len(self._level) > MAX_CLIENTS:
            self._level.popitem(last=False)
        return 0.0 if is_allowed else (cost - level) / self.rate


def network_of(address: str) -> str:
    """Return the network that counts as one client: an IPv4 address, or an IPv6 /64, all of whose
    addresses one client usually has.
    """
    try:
        parsed = ipaddress.ip_address(address.partition("%")[0])
    except ValueError:
        return address
    if isinstance(parsed, ipaddress.IPv4Address):
        return str(parsed)
    return str(parsed.ipv4_mapped or ipaddress.ip_network((parsed, 64), strict=False))
