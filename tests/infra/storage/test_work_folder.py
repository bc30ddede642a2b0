"""What one node publishes of its work another fetches, and nobody waits for the store."""

import pickle
import threading
from pathlib import Path

import pytest

from infra.errors import StorageError
from infra.storage import node_cache, store
from infra.storage.node_cache import used_bytes
from infra.storage.work_folder import Publisher, WorkFolder, local_work


@pytest.fixture
def nodes(tmp_path: Path) -> list[WorkFolder]:
    """Two nodes with scratch folders of their own and one store."""
    uri = f"memory://work-{tmp_path.name}"
    roots = [store.open_root(uri, tmp_path / name) for name in ("one", "two")]
    return [WorkFolder(root, "clip/k") for root in roots]


def test_what_one_node_publishes_the_other_fetches(nodes: list[WorkFolder]) -> None:
    one, two = nodes
    assert two.fetch("state.pt") is None
    for text in ("first", "second"):
        one.path("state.pt").write_text(text)
        one.publish("state.pt")
        fetched = two.fetch("state.pt")
        assert fetched and fetched.read_text() == text and fetched != one.path("state.pt")
    assert store.file_sizes(one.root, "work/clip/k") == {"state/state.pt": 6}
    with pytest.raises(FileNotFoundError, match=r"work/clip/k/state/other is missing"):
        two.fetched("other")


def test_in_a_local_root_all_processes_have_one_folder(tmp_path: Path) -> None:
    work = WorkFolder(store.open_root(str(tmp_path)), "clip/k")
    other: WorkFolder = pickle.loads(pickle.dumps(work))
    work.path("state.pt").write_text("x")
    assert other.fetched("state.pt") == tmp_path / "work" / "clip" / "k" / "state.pt"


def test_a_training_without_a_root_works_in_any_folder(tmp_path: Path) -> None:
    assert local_work(tmp_path).path("state.pt") == tmp_path / "state.pt"


def test_a_publisher_sends_the_newest_and_all_by_its_end(
    nodes: list[WorkFolder], monkeypatch: pytest.MonkeyPatch
) -> None:
    one, two = nodes
    sent, may_go, publish = [], threading.Event(), WorkFolder.publish

    def slow(work: WorkFolder, name: str) -> None:
        assert may_go.wait(30)
        sent.append(name)
        publish(work, name)

    monkeypatch.setattr(WorkFolder, "publish", slow)
    with Publisher(one) as publisher:
        for number in range(20):
            for name in ("a", "b"):
                one.path(name).write_text(str(number))
                publisher.publish(name)
        may_go.set()
    assert len(sent) <= 4
    assert [two.fetched(name).read_text() for name in ("a", "b")] == ["19", "19"]


def test_what_a_publisher_meets_is_raised_to_who_uses_it(
    nodes: list[WorkFolder], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(work: WorkFolder, name: str) -> None:
        raise StorageError("the store is full")

    monkeypatch.setattr(WorkFolder, "publish", fail)
    nodes[0].path("a").write_text("x")
    with pytest.raises(StorageError, match="full"), Publisher(nodes[0]) as publisher:
        publisher.publish("a")


def test_room_for_a_state_is_made_among_copies_of_other_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("UNCLIP_SCRATCH_BYTES", "1000")
    work = WorkFolder(store.open_root(f"memory://room-{tmp_path.name}", tmp_path), "clip/k")
    copies = tmp_path / "cache" / "ingest"
    copies.mkdir(parents=True)
    for number in range(9):
        (copies / f"{number}.tar").write_bytes(b"x" * 100)
    with work.room(500):
        assert used_bytes(tmp_path) <= 500
        work.path("state.pt").write_bytes(b"y" * 500)
    for number in range(4):
        (copies / f"{number}.tar").write_bytes(b"x" * 100)
    work.publish("state.pt")
    work.path("state.pt").unlink()
    for number in range(9):
        (copies / f"{number}.tar").write_bytes(b"x" * 100)
    fetched = work.fetch("state.pt")
    assert fetched and used_bytes(tmp_path) <= 1000
    monkeypatch.setattr(node_cache, "WAIT_S", 0)
    with pytest.raises(StorageError, match="UNCLIP_SCRATCH_BYTES"), work.room(600):
        pass
