"""Chooses the version that answers a request: one without anything that was removed before the
request came.

Checking a removal log in a store takes a round trip. It runs in a thread, once for all requests
that wait for it. A request accepts no check that began before it came, except within `lag_s`. New
versions are made in a thread too. Neither delays a request by more than WAIT_S: a log that does not
answer is taken as it was last read, and removals that are not yet applied refuse the request.
Belongs to one event loop.
"""

import asyncio
import time
from collections.abc import Callable

from anyio import CapacityLimiter, to_thread

from indexing.service.state import Service, Version
from infra.errors import UnclipError

WAIT_S = 2.0
"""Maximum seconds that a request waits for the store, or for a new version; both go on after it."""


class LateRenewalError(UnclipError):
    """Removals are known but not applied yet: no version may answer."""


class Freshness:
    """Updates a service from the removal log before it answers, off the event loop."""

    def __init__(self, service: Service, lag_s: float) -> None:
        """`lag_s` is the maximum age in seconds of the last check of a log in a store."""
        self.service, self.lag_s = service, lag_s
        self._check: asyncio.Task[None] | None = None
        self._checked_at_s = float("-inf")
        self._complaint = ""
        self._renewal: asyncio.Task[None] | None = None
        self._renewal_began_s = 0.0
        self._late_renewal: asyncio.Task[None] | None = None
        """The last renewal that was reported as late."""
        self._threads = CapacityLimiter(2)  # a check that hangs, and a renewal

    async def version(self) -> Version:
        """Return the version to answer from.

        Raises DataError if the log cannot be read and LateRenewalError if it is not applied in
        time, because removed samples must not be shown.
        """
        age_s = time.monotonic() - self._checked_at_s
        if self.service.parts.check_removals and age_s > self.lag_s:
            await self._await_check()
        if not self.service.is_current():
            await self._have_renewed()
        return self.service.version

    async def _have_renewed(self) -> None:
        """Wait at most WAIT_S for a renewal that begins from now on; do not wait if the one in
        progress is late already. Raises LateRenewalError.
        """
        late = LateRenewalError("take-downs are being applied: try again in a few seconds")
        before = self._renewal
        if before is not None and not before.done() and self._is_late():
            raise late
        try:
            async with asyncio.timeout(WAIT_S):
                if before is not None and not before.done():
                    await asyncio.wait({before})
                if self._renewal is before:
                    self._renewal_began_s = time.monotonic()
                    self._renewal = asyncio.create_task(self._in_thread(self.service.current))
                    self._renewal.add_done_callback(_retrieve)
                assert self._renewal is not None
                await asyncio.shield(self._renewal)
        except TimeoutError:
            if self._late_renewal is not self._renewal:
                self._late_renewal = self._renewal
                self.service.report(
                    f"the removals took more than {WAIT_S:.0f} s to apply: requests are refused "
                    "until then"
                )
            raise late from None

    def _is_late(self) -> bool:
        return time.monotonic() - self._renewal_began_s > WAIT_S

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
            self._checked_at_s, self._complaint = began, ""
        except Exception as error:  # an error of the store does not stop the search either
            self._complain(
                "the removal log could not be checked, answers use its last known entries: "
                f"{type(error).__name__}: {error}"
            )

    def _complain(self, line: str) -> None:
        """Report a fault once, until a check succeeds or fails for another reason."""
        if line != self._complaint:
            self.service.report(line)
        self._complaint = line

    async def _in_thread(self, do: Callable[[], object]) -> None:
        await to_thread.run_sync(do, limiter=self._threads)


def _retrieve(task: asyncio.Task[None]) -> None:
    """Take the error of a task that nobody may wait for any more."""
    if not task.cancelled():
        task.exception()
