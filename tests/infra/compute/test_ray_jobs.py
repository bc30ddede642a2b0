"""The log of a job is shown once and whole, also where its connection is cut at the end."""

from collections.abc import AsyncIterator

import pytest

from infra.compute.ray_jobs import _Tail

LOG = "one\ntwo\nunclip: three\nfour\n"


class Client:
    """Sends the first `pieces` of the log and then closes the connection, or cuts it."""

    def __init__(self, pieces: int, is_cut: bool) -> None:
        self.pieces, self.is_cut = pieces, is_cut

    async def tail_job_logs(self, _job: str) -> AsyncIterator[str]:
        for start in range(0, self.pieces, 5):
            yield LOG[start : min(start + 5, self.pieces)]
        if self.is_cut:
            raise RuntimeError("Connection was closed")


@pytest.mark.parametrize("pieces", range(len(LOG)))
def test_every_line_is_shown_once_wherever_the_connection_was_cut(pieces: int) -> None:
    shown: list[str] = []
    tail = _Tail(shown.append)
    tail.read(Client(pieces, is_cut=True), "job")
    assert not tail.is_complete
    tail.finish(LOG)
    tail.read(Client(len(LOG), is_cut=False), "job")  # a reader that was late
    assert shown == ["one", "two", "four"] and tail.last_word == "three"


def test_a_last_line_without_an_end_is_shown() -> None:
    shown: list[str] = []
    tail = _Tail(shown.append)
    tail.read(Client(len(LOG) - 1, is_cut=False), "job")
    assert shown == ["one", "two", "four"] and tail.is_complete
