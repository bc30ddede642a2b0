"""A file of the index that is cut under the running service is an error of the queries, not the end
of the service; a crash makes clients wait.
"""

import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest

from infra.storage.store import Root
from tests.helpers.committed_root import committed, write_root

QUERY = {"text": "colour 5", "k": 3}


class Served:
    """`unclip serve` in its own process, its address, and the lines of its log."""

    def __init__(self, root: Root) -> None:
        command = [sys.executable, "-m", "tests.helpers.drawn_service", "--port", "0"]
        self.process = subprocess.Popen(
            [*command, "--rate", "0", "--root", root.uri], stderr=subprocess.PIPE, text=True
        )
        self.lines: list[str] = []
        threading.Thread(target=self._read, daemon=True).start()
        wait_for(lambda: "pictures of run drawn at" in self.log())
        match = re.search(r"at (http://\S+)", self.log())
        assert match
        self.address = match[1]

    def _read(self) -> None:
        assert self.process.stderr
        self.lines.extend(iter(self.process.stderr.readline, ""))

    def log(self) -> str:
        return "".join(list(self.lines))

    def search(self) -> httpx.Response:
        return httpx.post(f"{self.address}/search", json=QUERY, timeout=60)

    def worker(self) -> int:
        """Return the id of the process that answers."""
        pid = self.process.pid
        return int(Path(f"/proc/{pid}/task/{pid}/children").read_text().split()[0])


def wait_for(is_true: Callable[[], bool]) -> None:
    end_s = time.monotonic() + 60
    while not is_true():
        assert time.monotonic() < end_s
        time.sleep(0.02)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Root:
    return write_root(tmp_path_factory.mktemp("drawn"))


@pytest.fixture(scope="module")
def served(root: Root) -> Iterator[Served]:
    served = Served(root)
    yield served
    served.process.terminate()
    assert served.process.wait(30) == -signal.SIGTERM


@pytest.mark.slow
@pytest.mark.parametrize("name", ["image.index", "metadata.arrow"])
def test_a_cut_file_is_an_error_until_it_is_restored(
    root: Root, served: Served, tmp_path: Path, name: str
) -> None:
    worker, results = served.worker(), served.search().json()["results"]
    file = committed(root, "index").local_folder / name
    whole = shutil.copy(file, tmp_path / name)
    os.truncate(file, 0)
    answer = served.search()
    assert answer.status_code == 503 and "a file of the index was cut" in answer.json()["detail"]
    assert httpx.get(f"{served.address}/healthz").status_code == 503
    size_bytes = Path(whole).stat().st_size
    wait_for(lambda: f"{file} has 0 bytes, not {size_bytes:,}: restore the file" in served.log())
    Path(whole).rename(file)
    wait_for(lambda: served.search().status_code == 200)
    assert served.search().json()["results"] == results and served.worker() == worker


@pytest.mark.slow
def test_after_a_crash_the_same_address_answers_again(served: Served) -> None:
    worker, results = served.worker(), served.search().json()["results"]
    os.kill(worker, signal.SIGBUS)
    assert served.search().json()["results"] == results
    assert served.worker() != worker and "crashed (SIGBUS" in served.log()
