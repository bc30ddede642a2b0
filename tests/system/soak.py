"""A soak: two services and a living index under mixed load, for an hour by default.

    python -m tests.system.soak [--minutes 60]        by `make soak`

In turns, nothing else happens, the index changes, a service is killed, the writers are killed, and
the disk is full. All the time four clients ask, and every answer is judged. Prints a line a minute
and ends with 1 if an answer was wrong, a committed sample was lost, a taken-down one was answered
or left on disk, or the memory of the service that lives through it all grew. A full disk needs
root (a tmpfs); without, that turn is left out and the first line says so.
"""

import argparse
import itertools
import json
import os
import random
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import httpx
import numpy as np

from flows.live_index import additions, lineage, merge, takedown
from flows.live_index.compaction import compact
from infra.errors import UnclipError
from infra.storage import manifests
from infra.storage.removal_log import read_removals
from infra.storage.store import Root, open_root
from tests.benchmarks.search_load import KINDS, Answer, Asker, Connection, resident_mbytes, serve
from tests.helpers.search_changes import make_root, write_drawn

ROWS, DIM, ADDED = 20_000, 64, 20
CLIENTS = 4
DISK_BYTES = 512 << 20
TURNS = ("calm", "changes", "killed service", "killed writers", "full disk")
KILL_EVERY_S = (3.0, 9.0)
GROWTH, GROWTH_MBYTES = 1.2, 48
"""Memory may grow by this factor and this much from the second minute to the last."""


class Ledger:
    """What is known of the index's samples; the changes that `Asker` judges answers by."""

    def __init__(self) -> None:
        self.base = frozenset(f"drawn-{row}" for row in range(ROWS))
        self.adding: set[str] = set()
        self.added: set[str] = set()
        self.going: dict[str, float] = {}
        self.gone: dict[str, float] = {}
        self.done: Counter[str] = Counter()
        self.failures: list[str] = []

    def read(self, line: str) -> None:
        """Take in a line that a writer has printed."""
        try:
            time_s, what, *words = json.loads(line)
        except ValueError:
            return  # the writer was killed while it wrote the line
        if what in ("adding", "added"):
            getattr(self, what).update(f"{words[0]}{row}" for row in range(ADDED))
        elif what in ("going", "gone"):
            for key in words[0]:
                getattr(self, what).setdefault(key, time_s)
        elif what == "failed":
            self.failures.append(words[0])
        self.done[what] += 1

    def may_be_gone(self, key: str, answered: float) -> bool:
        """Return whether a sample's take-down had begun when an answer came."""
        return self.going.get(key, answered) < answered

    def is_gone(self, key: str, asked: float) -> bool:
        """Return whether a sample had been taken down before a question was asked."""
        return self.gone.get(key, asked) < asked

    def mixed(self, version: str, samples: int, keys: Sequence[str]) -> str:
        """Return what is wrong with the samples of an answer, or ""."""
        is_known = all(key in self.base or key in self.adding for key in keys)
        return "" if is_known else "a sample that nobody has added"


class Served:
    """A service in a process of its own."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.changed_s = 0.0
        """When it was last killed or started."""
        self.base = ""
        self.start()

    def start(self) -> None:
        """Start it and wait until it answers."""
        command = [sys.executable, "-m", "tests.system.soak", "--serve", str(self.root)]
        self.process = subprocess.Popen(
            command, stdout=subprocess.PIPE, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"}
        )
        assert self.process.stdout
        self.base = self.process.stdout.readline().strip()
        assert self.base, "the service did not start"
        self.changed_s = time.monotonic()

    def kill(self) -> None:
        """Kill it, as a power cut would."""
        self.base, self.changed_s = "", time.monotonic()
        self.process.kill()
        self.process.wait()


class Writer:
    """Processes that change ROOT, one after the other."""

    def __init__(self, root: Path, ledger: Ledger) -> None:
        self.root, self.ledger, self.starts = root, ledger, 0
        self.process: subprocess.Popen[str] | None = None

    def start(self) -> None:
        """Start a writer, unless one is running."""
        if self.process and self.process.poll() is None:
            return
        self.starts += 1
        command = [sys.executable, "-m", "tests.system.soak", "--write", str(self.root)]
        self.process = subprocess.Popen(
            [*command, str(self.starts)], stdout=subprocess.PIPE, text=True,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )  # fmt: skip
        self.reader = threading.Thread(target=self._read, args=(self.process,))
        self.reader.start()

    def kill(self) -> None:
        """Kill the writer wherever it is."""
        if self.process:
            self.process.kill()
            self.process.wait()
            self.reader.join()
            self.process = None

    def _read(self, process: "subprocess.Popen[str]") -> None:
        assert process.stdout
        for line in process.stdout:
            self.ledger.read(line)


class Clients:
    """Threads that ask both services all the time, and the answers of which nobody has judged."""

    def __init__(self, services: Sequence[Served], asker: Asker) -> None:
        self.services, self.asker = services, asker
        self.answers: list[Answer] = []
        self.waiting: list[Answer] = []
        self.lost: list[str] = []
        self.counts: Counter[str] = Counter()
        self.stop = threading.Event()
        self.threads = [threading.Thread(target=self._ask, args=(n,)) for n in range(CLIENTS)]

    def __enter__(self) -> "Clients":
        for thread in self.threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop.set()
        for thread in self.threads:
            thread.join()

    def _ask(self, number: int) -> None:
        rng, service = random.Random(number), self.services[number % len(self.services)]
        connection = None
        while not self.stop.is_set():
            kind = rng.choice(KINDS)
            question = self.asker.question(kind, rng)
            body = json.dumps(question).encode()
            asked = time.monotonic()
            try:
                connection = connection or Connection(service.base)
                status, answer = connection.ask(connection.request(body))
            except (OSError, ValueError) as error:  # ValueError: it has no address yet
                connection = None
                self.counts["refused"] += 1
                if service.base and service.changed_s < asked:
                    self.lost.append(f"{type(error).__name__}: {error}")
                self.stop.wait(0.1)
                continue
            self.answers.append(Answer(question, kind, status, answer, asked, time.monotonic()))

    def judge(self) -> tuple[list[float], list[str]]:
        """Return the times of the answers before the last call, and what is wrong with them.

        They are judged one call late, so that the writer's lines about them have been read.
        """
        answers, self.waiting, self.answers = self.waiting, self.answers, []
        problems, self.lost = [f"no answer ({error})" for error in self.lost], []
        for answer in answers:
            self.counts["queries"] += 1
            if answer.status == 503:  # documented: a take-down is being applied
                self.counts["busy"] += 1
            elif problem := self.asker.problem(answer):
                problems.append(problem)
        return [answer.answered - answer.asked for answer in answers], problems


class Soak:
    """The turns, the lines of the minutes and the verdict."""

    def __init__(self, folder: Path, minutes: float, can_fill: bool) -> None:
        self.folder, self.root_folder = folder, folder / "root"
        self.end_s = time.monotonic() + 60 * minutes
        self.turns = [turn for turn in TURNS if can_fill or turn != "full disk"]
        self.turn_s = min(60.0, 60 * minutes / len(self.turns))
        self.ledger, self.rng = Ledger(), random.Random(0)
        self.services = [Served(self.root_folder), Served(self.root_folder)]
        self.writer = Writer(self.root_folder, self.ledger)
        keys = sorted(self.ledger.base)[:: ROWS // 500]
        self.clients = Clients(self.services, Asker(KINDS, keys, DIM, FACETS, self.ledger))
        self.kills: Counter[str] = Counter()
        self.turns_done: Counter[str] = Counter()
        self.memory: list[float] = []
        self.problems: Counter[str] = Counter()
        self.times: list[float] = []
        self.minute_turns: list[str] = []
        self.next_line_s = time.monotonic() + 60

    def run(self) -> int:
        """Run all turns and return the exit code."""
        try:
            with self.clients:
                for turn in itertools.cycle(self.turns):
                    if time.monotonic() >= self.end_s:
                        break
                    self._turn(turn)
            self.writer.kill()
            for _ in range(2):
                self._judge()
            self._print_line()
            faults = [*self._faults(), *self.ledger.failures]
        finally:
            for process in (self.writer, *self.services):
                process.kill()
        faults += [f"{count} x {what}" for what, count in self.problems.items()]
        for fault in faults[:20]:
            print(f"FAULT {fault}", flush=True)
        print(f"{len(faults)} faults; {self._totals()}", flush=True)
        return 1 if faults else 0

    def _turn(self, turn: str) -> None:
        self.minute_turns.append(turn)
        if turn == "calm":
            self.writer.kill()
        else:
            self.writer.start()
        filler = self.folder / "filler"
        if turn == "full disk":
            fill(filler)
        turn_end_s = min(self.end_s, time.monotonic() + self.turn_s)
        kill_s = time.monotonic() + self.rng.uniform(*KILL_EVERY_S)
        while time.monotonic() < turn_end_s:
            time.sleep(0.5)
            self._judge()
            if time.monotonic() >= kill_s and turn.startswith("killed"):
                self._kill(turn)
                kill_s = time.monotonic() + self.rng.uniform(*KILL_EVERY_S)
            if time.monotonic() >= self.next_line_s:
                self._print_line()
        filler.unlink(missing_ok=True)
        self.turns_done[turn] += 1

    def _kill(self, turn: str) -> None:
        self.kills[turn] += 1
        victim = self.writer if turn == "killed writers" else self.services[1]
        victim.kill()
        victim.start()

    def _judge(self) -> None:
        for process in (self.writer.process, *(each.process for each in self.services)):
            if process and process.poll() is not None:
                raise RuntimeError(f"{process.args!r} ended by itself: {process.returncode}")
        times, problems = self.clients.judge()
        self.times += times
        self.problems.update(problems)

    def _print_line(self) -> None:
        self.next_line_s += 60
        self.memory.append(resident_mbytes(self.services[0].process.pid)["own"])
        p99_ms = float(np.percentile(self.times, 99)) * 1000 if self.times else 0
        print(
            f"minute {len(self.memory):3}  {', '.join(dict.fromkeys(self.minute_turns))}: "
            f"{len(self.times)} queries, {sum(self.problems.values())} wrong so far, "
            f"p99 {p99_ms:.0f} ms, {self.memory[-1]:.0f} MB",
            flush=True,
        )
        self.times, self.minute_turns = [], self.minute_turns[-1:]

    def _totals(self) -> str:
        counts, done = self.clients.counts, self.ledger.done
        return (
            f"{counts['queries']} queries, {counts['busy']} busy, {counts['refused']} refused by "
            f"killed services; {len(self.ledger.added)} samples added, {len(self.ledger.gone)} "
            f"taken down, {done['merged']} merges, {done['compacted']} compactions, "
            f"{done['refused']} changes refused by a full disk; kills: {dict(self.kills)}"
        )

    def _faults(self) -> list[str]:
        """Return what is wrong at the end."""
        root = open_root(str(self.root_folder))
        faults = [*self._wrong_samples(root), *self._wrong_files(root)]
        if len(self.memory) > 2 and self.memory[-1] > GROWTH * self.memory[1] + GROWTH_MBYTES:
            faults.append(f"memory grew from {self.memory[1]:.0f} to {self.memory[-1]:.0f} MB")
        if self.turns_done["full disk"] and not self.ledger.done["refused"]:
            faults.append("the disk was never full for a writer")
        return faults

    def _wrong_samples(self, root: Root) -> Iterator[str]:
        """Yield samples that are lost, and taken-down ones that are there."""
        ledger, removed = self.ledger, read_removals(root).keys
        view, _ = lineage.open_view(root, None)
        if missing := set(ledger.gone) - removed:
            yield f"{len(missing)} take-downs are lost, {min(missing)} first"
        if unasked := removed - set(ledger.going):
            yield f"{len(unasked)} samples were taken down unasked, {min(unasked)} first"
        if lost := [k for k in (ledger.base | ledger.added) - removed if not view.find_key(k)]:
            yield f"{len(lost)} samples are lost, {min(lost)} first"
        if still := [key for key in removed if view.find_key(key)]:
            yield f"{len(still)} taken-down samples are in the view, {min(still)} first"
        for key in random.Random(1).sample(sorted(removed), min(500, len(removed))):
            status = httpx.get(f"{self.services[0].base}/sample/{key}").status_code
            if status != 404:
                yield f"{key} was taken down, and the service answers {status}"

    def _wrong_files(self, root: Root) -> Iterator[str]:
        """Compact ROOT; yield damaged folders, and where taken-down samples are left."""
        compact(root, lambda _: None)
        for stage in ("embed", "index", "additions"):
            for committed in takedown.committed_folders(root, (stage,)):
                for wrong in manifests.verify(committed):
                    yield f"{stage}/{committed.key}: {wrong}"
        rows = [{"key": key, "origin": "", "sha256": ""} for key in self.ledger.gone]
        left = takedown.verify(root, rows)
        if any(left["found_in"].values()) or left["leftovers"] or left["unreadable"]:
            yield f"taken-down samples are left: {left}"


FACETS = {"licence": {"CC0": 1, "CC-BY": 1, "MIT": 1}}


def fill(filler: Path) -> None:
    """Write a file until the disk is full."""
    with filler.open("wb", buffering=0) as file:
        for block in (b"\0" * (1 << 20), b"\0" * 4096, b"\0"):
            try:
                while file.write(block) == len(block):
                    pass
            except OSError:
                continue


def write(folder: str, seed: int) -> None:
    """Change ROOT until killed: add, take down, merge and compact; print a line before and after
    each change.
    """
    root, rng = open_for_writing(folder), random.Random(seed)
    view, _ = lineage.open_view(root, None)
    keys = [key for each in view.segments for key in each.index.column("key").to_pylist()]
    keys = [key for key in keys if view.find_key(key)]
    del view
    actions: dict[str, Callable[[], None]] = {
        "take down": lambda: remove_some(root, keys, rng),
        "add": lambda: keys.extend(add_some(root, rng)),
        "merge": lambda: merge_all(root),
        "compact": lambda: compact_all(root),
    }
    while True:
        action = rng.choices(list(actions), (6, 2, 1, 1))[0]
        try:
            actions[action]()
        except UnclipError as error:
            report(error, action)
        except Exception as error:
            say("failed", f"{action}: {type(error).__name__}: {error}")
            time.sleep(1)


def open_for_writing(folder: str) -> Root:
    """Open ROOT, once its disk is no longer full."""
    while True:
        try:
            return open_root(folder)
        except UnclipError as error:
            report(error, "open")


def report(error: UnclipError, action: str) -> None:
    """Print that a change was refused by a full disk, or failed, and wait a moment."""
    is_full = str(error).startswith("no space left") and "\n" not in str(error)
    say("refused" if is_full else "failed", f"{action}: {error}")
    time.sleep(1)


def say(what: str, words: Any) -> None:
    """Print a line for the ledger."""
    print(json.dumps([time.monotonic(), what, words]), flush=True)


def remove_some(root: Root, keys: list[str], rng: random.Random) -> None:
    """Take a few samples down: as many as are added in the long run."""
    chosen = [keys.pop(rng.randrange(len(keys))) for _ in range(rng.randint(1, 12))]
    say("going", chosen)
    rows = takedown.find(root, takedown.by_values("key", chosen))
    takedown.take_down(root, rows, {"soak": True})
    say("gone", chosen)


def add_some(root: Root, rng: random.Random) -> list[str]:
    """Add samples and return their keys."""
    view, known = lineage.open_view(root, None)
    prefix = f"added-{time.time_ns()}-"
    with tempfile.TemporaryDirectory() as folder:
        seed = rng.getrandbits(30)
        keys = write_drawn(Path(folder), ADDED, DIM, prefix, known.fingerprint, seed)
        say("adding", prefix)
        additions.add(root, known, view, Path(folder), "")
    say("added", prefix)
    return keys


def merge_all(root: Root) -> None:
    merge.merge(root, None, lambda _: None)
    say("merged", "")


def compact_all(root: Root) -> None:
    compact(root, lambda _: None)
    say("compacted", "")


@contextmanager
def small_disk(folder: Path) -> Iterator[bool]:
    """Mount a small file system at a folder; yields whether that could be done."""
    command = ["mount", "-t", "tmpfs", "-o", f"size={DISK_BYTES}", "soak", str(folder)]
    is_mounted = os.geteuid() == 0 and not subprocess.run(command, capture_output=True).returncode
    try:
        yield is_mounted
    finally:
        if is_mounted:
            subprocess.run(["umount", "--lazy", str(folder)], check=True)


def main() -> int:
    """Run the soak and return the exit code."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--serve", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--write", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        serve(options.serve, Path(os.devnull))
        return 0
    if options.write:
        write(options.write[0], int(options.write[1]))
        return 0
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        can_fill = stack.enter_context(small_disk(folder))
        if not can_fill:
            print("no full disk: a small file system can be mounted only as root", flush=True)
        make_root(folder / "root", ROWS, DIM)
        return Soak(folder, options.minutes, can_fill).run()


if __name__ == "__main__":
    sys.exit(main())
