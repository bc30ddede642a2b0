"""How a benchmark says that a figure falls short of what was promised: one line each on stderr, and
exit code 1.
"""

import sys
from collections.abc import Sequence


def told(missed: Sequence[str]) -> int:
    """Print what was missed and return the exit code."""
    for each in missed:
        print(f"missed: {each}", file=sys.stderr)
    return 1 if missed else 0
