"""The node's cache never takes more than its bound, and never removes what a process uses."""

import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from infra.errors import StorageError
from infra.storage import node_cache
from infra.storage.node_cache import NodeCache, used_bytes


class Source:
    """Files of a store: their contents, and how often they were downloaded."""

    def __init__(self, sizes: dict[str, int]) -> None:
        self.contents = {name: os.urandom(size) for name, size in sizes.items()}
        self.downloads: list[str] = []

    def read(self, cache: NodeCache, name: str) -> bytes:
        def download(path: Path) -> None:
            self.downloads.append(name)
            path.write_bytes(self.contents[name])

        with cache.open(name, len(self.contents[name]), download) as file:
            return file.read()


def test_a_copy_is_downloaded_once_and_has_the_bytes_of_its_file(tmp_path: Path) -> None:
    cache, source = NodeCache(tmp_path, 1000), Source({"a/1.tar": 300, "b/2.tar": 300})
    for _ in range(2):
        for name, content in source.contents.items():
            assert source.read(cache, name) == content
    assert source.downloads == ["a/1.tar", "b/2.tar"]


def test_a_copy_that_was_cut_is_downloaded_again(tmp_path: Path) -> None:
    cache, source = NodeCache(tmp_path, 1000), Source({"a": 300})
    source.read(cache, "a")
    with cache.open("a", 300, lambda path: None):  # a reader has it open
        os.truncate(tmp_path / "cache" / "a", 100)
        assert source.read(cache, "a") == source.contents["a"]
    assert source.downloads == ["a", "a"]


def test_the_least_recently_used_copy_goes_first(tmp_path: Path) -> None:
    cache, source = NodeCache(tmp_path, 1000), Source(dict.fromkeys("abcd", 300))
    for name in ("a", "b", "c", "a", "d"):
        source.read(cache, name)
        time.sleep(0.01)
    for name in ("a", "c", "d"):
        source.read(cache, name)
    assert source.downloads == ["a", "b", "c", "d"]
    source.read(cache, "b")
    assert source.downloads[4:] == ["b"]


def test_the_bound_holds_whatever_is_read_in_whatever_order(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    sizes = {str(number): int(generator.integers(1, 400)) for number in range(50)}
    cache, source = NodeCache(tmp_path, 1000), Source(sizes)
    for number in generator.integers(50, size=500):
        assert source.read(cache, str(number)) == source.contents[str(number)]
        assert used_bytes(tmp_path) <= 1000


def test_other_files_of_the_scratch_folder_count_and_stay(tmp_path: Path) -> None:
    cache, source = NodeCache(tmp_path, 1000), Source(dict.fromkeys("ab", 300))
    source.read(cache, "a")
    (tmp_path / "work").mkdir()
    (tmp_path / "work" / "state").write_bytes(bytes(600))
    source.read(cache, "b")
    assert used_bytes(tmp_path) <= 1000 and (tmp_path / "work" / "state").exists()
    assert not (tmp_path / "cache" / "a").exists()


def test_a_copy_in_use_stays_and_its_release_makes_room(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache, source = NodeCache(tmp_path, 1000), Source(dict.fromkeys("ab", 600))
    source.read(cache, "a")
    file = cache.open("a", 600, lambda path: None)
    monkeypatch.setattr(node_cache, "WAIT_S", 0.2)
    with pytest.raises(StorageError, match="UNCLIP_SCRATCH_BYTES to at least"):
        source.read(cache, "b")
    assert (tmp_path / "cache" / "a").exists() and not list(tmp_path.rglob("*.part-*"))
    monkeypatch.setattr(node_cache, "WAIT_S", 60)
    threading.Timer(0.3, file.close).start()
    assert source.read(cache, "b") == source.contents["b"]


def test_what_a_process_uses_stays_until_it_ends(tmp_path: Path) -> None:
    cache, source = NodeCache(tmp_path, 1000), Source(dict.fromkeys("ab", 600))
    source.read(cache, "a")
    code = (
        "import sys; from pathlib import Path; from infra.storage.node_cache import NodeCache\n"
        "file = NodeCache(Path(sys.argv[1]), 1000).open('a', 600, None)\n"
        "print('open', flush=True); sys.stdin.read()"
    )
    user = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert user.stdout and user.stdout.readline() == "open\n"
        reader = threading.Thread(target=source.read, args=(cache, "b"))
        reader.start()
        time.sleep(0.3)
        assert reader.is_alive() and (tmp_path / "cache" / "a").exists()
    finally:
        user.kill()
        user.wait()
    reader.join(timeout=30)
    assert source.downloads == ["a", "b"]


def test_several_threads_download_a_file_once(tmp_path: Path) -> None:
    cache, source = NodeCache(tmp_path, 1000), Source({"a": 500})
    results: list[bytes] = []
    threads = [
        threading.Thread(target=lambda: results.append(source.read(cache, "a"))) for _ in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [source.contents["a"]] * 8 and source.downloads == ["a"]


def test_a_download_that_fails_leaves_nothing_and_its_error_is_raised(tmp_path: Path) -> None:
    cache = NodeCache(tmp_path, 1000)

    def fail(path: Path) -> None:
        path.write_bytes(b"half")
        raise ConnectionError("cut")

    with pytest.raises(ConnectionError):
        cache.open("a", 500, fail)
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == [node_cache.GUARD]


def test_what_a_killed_download_left_goes_when_room_is_needed(tmp_path: Path) -> None:
    cache, source = NodeCache(tmp_path, 1000), Source({"a": 600})
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "old.part-900").write_bytes(bytes(10))
    (tmp_path / "cache" / "old.part-900").chmod(node_cache.GRANTED)
    assert source.read(cache, "a") == source.contents["a"]
    assert not (tmp_path / "cache" / "old.part-900").exists()


def test_states_that_nobody_works_on_go_after_a_day(tmp_path: Path) -> None:
    cache, source = NodeCache(tmp_path, 1000), Source({"a": 600})
    for name, age_s in (("old", 90_000), ("new", 3_000)):
        state = tmp_path / "work" / "clip" / name / "state.pt"
        state.parent.mkdir(parents=True)
        state.write_bytes(bytes(300))
        os.utime(state, (time.time() - age_s,) * 2)
    assert source.read(cache, "a") == source.contents["a"]
    assert [path.parent.name for path in tmp_path.rglob("state.pt")] == ["new"]


def test_a_reservation_makes_room_and_ends_with_its_block(tmp_path: Path) -> None:
    cache, source = NodeCache(tmp_path, 1000), Source(dict.fromkeys("abc", 300))
    for name in "abc":
        source.read(cache, name)
    with cache.reserve(500):
        assert len([path for path in tmp_path.rglob("?") if path.is_file()]) == 1
        source.read(cache, "b")
        source.read(cache, "c")
        assert used_bytes(tmp_path) <= 500
    assert not list(tmp_path.rglob("*.part-*"))


def test_two_that_need_room_at_the_same_time_get_it_one_after_the_other(tmp_path: Path) -> None:
    cache, held = NodeCache(tmp_path, 1000), threading.Barrier(2)

    def hold() -> None:
        held.wait()
        with cache.reserve(700):
            time.sleep(0.2)

    threads = [threading.Thread(target=hold) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=30)
    assert not any(thread.is_alive() for thread in threads)


def test_a_copy_that_was_finished_after_one_looked_is_not_downloaded_again(tmp_path: Path) -> None:
    cache, source = NodeCache(tmp_path, 1000), Source({"a": 300})
    source.read(cache, "a")
    cache._make(tmp_path / "cache" / "a", 300, lambda path: pytest.fail("downloaded again"))
    assert source.read(cache, "a") == source.contents["a"] and source.downloads == ["a"]
    assert not list(tmp_path.rglob("*.part-*"))


def test_who_waits_for_a_download_gets_it_though_its_first_reader_keeps_it_open(
    tmp_path: Path,
) -> None:
    cache, content, results = NodeCache(tmp_path, 1000), b"a" * 300, []

    def read_second() -> None:
        with cache.open("a", 300, lambda _: pytest.fail("downloaded twice")) as file:
            results.append(file.read())

    second = threading.Thread(target=read_second, daemon=True)

    def download(part: Path) -> None:
        second.start()
        while sum(os.path.realpath(fd) == str(part) for fd in Path("/proc/self/fd").iterdir()) < 2:
            time.sleep(0.01)
        time.sleep(0.05)  # until it waits for the lock
        part.write_bytes(content)

    with cache.open("a", 300, download) as file:
        second.join(timeout=30)
        assert results == [content] == [file.read()]
