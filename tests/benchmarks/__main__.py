"""Runs every benchmark of this folder in turn, each in a process of its own: `make bench`.

Ends with exit code 1 when one of them fails, after the others have had their turn.
"""

import subprocess
import sys
from pathlib import Path


def main() -> int:
    """Run them all and return the exit code."""
    failed = []
    for script in sorted(Path(__file__).parent.glob("[!_]*.py")):
        print(f"== {script.stem}", flush=True)
        if subprocess.run([sys.executable, "-m", f"tests.benchmarks.{script.stem}"]).returncode:
            failed.append(script.stem)
    if failed:
        print(f"failed: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
