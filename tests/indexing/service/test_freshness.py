"""The view is renewed beside queries: none waits for long, and the news is answered from once it is
there.
"""

import asyncio
import threading
from pathlib import Path

import pytest

from indexing.service.freshness import Freshness, LateRenewalError
from infra.errors import DataError
from tests.helpers.search_service import Fake


def test_a_slow_renewal_refuses_at_once_and_never_shows_what_was_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("indexing.service.state.POLL_S", 1000)
    monkeypatch.setattr("indexing.service.freshness.WAIT_S", 0.05)
    fake = Fake(tmp_path)
    service = fake.service()
    reading, go_on = [], threading.Event()

    def read() -> object:
        reading.append(1)
        go_on.wait()
        return fake.removals

    object.__setattr__(service.parts, "read_removals", read)

    async def ask() -> None:
        freshness = Freshness(service, 0)
        assert (await freshness.version()).view.count == 48
        fake.remove(keys={fake.rows[0]["key"]})
        for _ in range(20):
            with pytest.raises(LateRenewalError, match="take-downs are being applied"):
                await freshness.version()
        assert reading == [1]
        go_on.set()
        while True:
            try:
                assert (await freshness.version()).view.count == 47
                break
            except LateRenewalError:
                await asyncio.sleep(0.01)

    asyncio.run(ask())
    service.close()
    assert [line for line in fake.reported if "took more than" in line] == fake.reported
    assert len(fake.reported) == 1


def test_queries_that_come_together_share_a_renewal_and_its_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("indexing.service.state.POLL_S", 1000)
    monkeypatch.setattr("indexing.service.freshness.WAIT_S", 60)
    fake = Fake(tmp_path)
    service = fake.service()
    reading: list[int] = []

    def read() -> object:
        reading.append(1)
        raise DataError("an entry cannot be read")

    object.__setattr__(service.parts, "read_removals", read)

    async def ask() -> None:
        freshness = Freshness(service, 0)
        fake.remove(keys={fake.rows[0]["key"]})
        answers = [freshness.version() for _ in range(20)]
        errors = await asyncio.gather(*answers, return_exceptions=True)
        assert {str(error) for error in errors} == {"an entry cannot be read"}
        assert len(reading) <= 2

    asyncio.run(ask())
    service.close()
