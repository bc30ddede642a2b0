"""Fuzzes for some minutes: `python -m tests.fuzz MINUTES`, by `make fuzz`.

Repeats the tests of this folder with other random examples until the time is over, prints a line
for each round, and ends with 1 at the first round that fails.
"""

import subprocess
import sys
import time
from pathlib import Path

COMMAND = (sys.executable, "-m", "pytest", "-q", "--no-header", "--hypothesis-profile=long")


def main() -> int:
    """Fuzz, and return the exit code."""
    end_s = time.monotonic() + 60 * float(sys.argv[1])
    rounds = 0
    while time.monotonic() < end_s:
        rounds += 1
        print(f"round {rounds}, {(end_s - time.monotonic()) / 60:.0f} min left", flush=True)
        if subprocess.run([*COMMAND, "--timeout=1800", str(Path(__file__).parent)]).returncode:
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
