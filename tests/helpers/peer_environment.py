"""Peers in environments of their own: their Python, or why it is not there (skipped, or failed
where it must be), and their processes.
"""

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest

PEERS = Path(__file__).parents[2] / ".peers"
SCRIPTS = Path(__file__).parents[1] / "peers"
REQUIRED = "PEERS_REQUIRED"
"""Variable with the names of peers, parted by spaces, whose absence is a failure: `make test`
sets it to those that it could build.
"""


def interpreter_of(name: str) -> Path:
    """Return a peer's Python; ends the test where it is not installed."""
    python = PEERS / name / "bin" / "python"
    if not python.exists():
        why = f"{name} is not installed beside us: make .peers/{name}/ready"
        if name in os.environ.get(REQUIRED, "").split():
            pytest.fail(f"{why} (it was built: {REQUIRED} names it)")
        pytest.skip(why)
    return python


class Peer:
    """A peer's process, running a script of tests/peers, asked and answering in lines of JSON; its
    errors go to `log` or are shown.
    """

    def __init__(self, python: Path, script: str, log: Path | None = None) -> None:
        self.log = log
        errors = log.open("w") if log else None
        self.process = subprocess.Popen(
            [str(python), str(SCRIPTS / script)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
        )
        if errors:
            errors.close()

    def __call__(self, *told: Any) -> Any:
        """Ask for a function of the script by name, with what it takes."""
        return self.ask(told)

    def ask(self, told: Any) -> Any:
        """Tell the process one thing and return its answer."""
        assert self.process.stdin
        self.process.stdin.write(json.dumps(told) + "\n")
        self.process.stdin.flush()
        return self.answer()

    def answer(self) -> Any:
        """Return what the process says next; raises RuntimeError where it has ended."""
        assert self.process.stdout
        line = self.process.stdout.readline()
        if not line:
            said = self.log.read_text()[-2000:] if self.log else "its error stands above"
            raise RuntimeError(f"{self.process.args[1]} ended with {self.process.wait()}: {said}")
        return json.loads(line)

    def stop(self) -> None:
        """End the process."""
        self.process.kill()
        self.process.wait()
