"""Chooses the version that answers a request: one without anything that was removed before the
request came.

Checking a removal log in a store takes a round trip. It runs in a thread, once for all requests
that wait for it. A request accepts no check that began before it came, except within `lag_s`.
Belongs to one event loop.
"""

import asyncio
import time
from collections.abc import Callable

from anyio import CapacityLimiter, to_thread

from indexing.service.state import Service, Version

WAIT_S = 2.0
"""Maximum seconds that a request waits for the store. After that the last known log counts, and the
check goes on."""


class Freshness:
    """Updates a service from the removal log before it answers, off the event loop."""

    def __init__(self, service: Service, lag_s: float) -> None:
        """`lag_s` is the maximum age in seconds of the last check of a log in a store."""
        self.service, self.lag_s = service, lag_s
        self._check: asyncio.Task[None] | None = None
        self._known_at = float("-inf")
        self._complaint = ""
        self._applying = asyncio.Lock()
        self._threads = CapacityLimiter(2)  # a check that hangs, and a renewal

    async def version(self) -> Version:
        """Return the version to answer from. Raises DataError if the log cannot be read, because
        removed samples must not be shown.
        """
        if self.service.parts.check_removals and time.monotonic() - self._known_at > self.lag_s:
            await self._await_check()
        if not self.service.is_current():
            async with self._applying:
                await self._in_thread(self.service.current)
        return self.service.version

    async def _await_check(self) -> None:
        """Wait for a check that begins from now on."""
        before = self._check
        try:
            async with asyncio.timeout(WAIT_S):
                if before is not None and not before.done():
                    await asyncio.wait({before})
                if self._check is before:
                    self._check = asyncio.create_task(self._check_log())
                assert self._check is not None
                await asyncio.shield(self._check)
        except TimeoutError:
            self._complain(
                f"the store has not returned the removal log for {WAIT_S:.0f} s: answers use its "
                "last known entries"
            )

    async def _check_log(self) -> None:
        began = time.monotonic()
        assert self.service.parts.check_removals is not None
        try:
            await self._in_thread(self.service.parts.check_removals)
            self._known_at, self._complaint = began, ""
        except Exception as error:  # an error of the store does not stop the search either
            self._complain(
                "the removal log could not be checked, answers use its last known entries: "
                f"{type(error).__name__}: {error}"
            )

    def _complain(self, line: str) -> None:
        """Report a fault once, until a check succeeds or fails for another reason."""
        if line != self._complaint:
            self.service.parts.report(line)
        self._complaint = line

    async def _in_thread(self, do: Callable[[], object]) -> None:
        await to_thread.run_sync(do, limiter=self._threads)
