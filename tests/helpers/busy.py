"""Runs a command beside processes that keep the cores busy: `python -m tests.helpers.busy COUNT
COMMAND…`; ends with the command's exit
code.
"""

import os
import subprocess
import sys
from contextlib import ExitStack

SPIN = "import os, sys\nwhile os.getppid() == int(sys.argv[1]): sum(range(100_000))"
"""Ends by itself when its parent has gone."""


def main() -> int:
    count, command = int(sys.argv[1]), sys.argv[2:]
    with ExitStack() as stack:
        for _ in range(count):
            spinning = subprocess.Popen([sys.executable, "-c", SPIN, str(os.getpid())])
            stack.callback(spinning.wait)
            stack.callback(spinning.kill)
        return subprocess.run(command, check=False).returncode


if __name__ == "__main__":
    raise SystemExit(main())
