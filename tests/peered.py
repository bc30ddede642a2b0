"""Finds the environment of a peer that a test compares with, or says why it is not there: skipped, or failed where it must be."""

import os
from pathlib import Path

import pytest

PEERS = Path(__file__).parent.parent / ".peers"
REQUIRED = "PEERS_REQUIRED"
"""Variable with the names of peers, parted by spaces, whose absence is a failure: `make test` sets it to those that it could build."""


def interpreter_of(name: str) -> Path:
    """Return a peer's Python; ends the test where it is not installed."""
    python = PEERS / name / "bin" / "python"
    if not python.exists():
        why = f"{name} is not installed beside us: make .peers/{name}/ready"
        if name in os.environ.get(REQUIRED, "").split():
            pytest.fail(f"{why} (it was built: {REQUIRED} names it)")
        pytest.skip(why)
    return python
