"""The view is renewed beside queries: none waits for long, and the news is answered from once it is
there.
"""

import asyncio
import threading
from pathlib import Path

import pytest

from indexing.service.freshness import Freshness
from infra.errors import DataError
from tests.helpers.search_service import Fake


def test_a_slow_renewal_does_not_stop_queries(
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
        answers = [await freshness.version() for _ in range(20)]
        assert {version.view.count for version in answers} == {48} and reading == [1]
        go_on.set()
        while (await freshness.version()).view.count == 48:
            await asyncio.sleep(0.01)
        assert (await freshness.version()).view.count == 47

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
