"""Which version a request is answered from: one without anything that was taken down before the
request came.

Where the log lies in a store a look at it is a round trip: it is made in a thread, once for all
requests that wait for one, and no request is content with a look that began before it came, unless
the service may answer from an older one. Belongs to one event loop.
"""

import asyncio
import time
from collections.abc import Callable
from typing import Any

from anyio import CapacityLimiter, to_thread

from indexing.service.state import Service, Version

WAIT_S = 2.0
"""A store that has not answered by then does not stop the search: what is known answers, and the
look goes on."""


class Freshness:
    """Brings a service up to date with the removal log before it answers, off the event loop."""

    def __init__(self, service: Service, lag_s: float) -> None:
        """`lag_s` is how old what is known of the log may be, where a look is a round trip."""
        self.service, self.lag_s = service, lag_s
        self._look: asyncio.Task[None] | None = None
        self._known_at = float("-inf")
        self._complaint = ""
        self._applying = asyncio.Lock()
        self._threads = CapacityLimiter(
            2
        )  # a look that hangs, and the change that another one found

    async def version(self) -> Version:
        """Return the version to answer from. Raises DataError where the log cannot be read: what it
        names must not be shown.
        """
        if self.service.parts.look_at_removals and time.monotonic() - self._known_at > self.lag_s:
            await self._have_looked()
        if not self.service.is_current():
            async with self._applying:
                await self._in_thread(self.service.current)
        return self.service.version

    async def _have_looked(self) -> None:
        """Wait for a look that begins from now on."""
        before = self._look
        try:
            async with asyncio.timeout(WAIT_S):
                if before is not None and not before.done():
                    await asyncio.wait({before})
                if self._look is before:
                    self._look = asyncio.create_task(self._do_look())
                assert self._look is not None
                await asyncio.shield(self._look)
        except TimeoutError:
            self._complain(
                f"the store has not shown the removal log for {WAIT_S:.0f} s: answers go by what "
                "is known of it"
            )

    async def _do_look(self) -> None:
        began = time.monotonic()
        assert self.service.parts.look_at_removals is not None
        try:
            await self._in_thread(self.service.parts.look_at_removals)
            self._known_at, self._complaint = began, ""
        except (
            Exception
        ) as error:  # the store's, of whatever kind: it does not stop the search either
            self._complain(
                "the removal log could not be looked at, answers go by what is known of it: "
                f"{type(error).__name__}: {error}"
            )

    def _complain(self, line: str) -> None:
        """Report a fault once, until a look has gone well again or fails otherwise."""
        if line != self._complaint:
            self.service.parts.report(line)
        self._complaint = line

    async def _in_thread(self, do: Callable[[], Any]) -> None:
        await to_thread.run_sync(do, limiter=self._threads)
