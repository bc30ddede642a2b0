"""Parser of the conditions in `[evaluate] promote_if`.

A condition looks like `generation.own_prompt_first >= current - 0.05`.
"""

import re

NUMBER = r"[-+]?\d+(?:\.\d+)?(?:[eE][-+]?\d+)?"
CONDITION = re.compile(
    rf"\s*(\S+)\s*(>=|<=|>|<)\s*(?:({NUMBER})|current\s*(?:([-+*])\s*({NUMBER}))?)\s*"
)


def parsed(condition: str) -> tuple[str, str, str | None, str | None, str | None]:
    """Return path, comparison, number, and shift of `current` by a number. Raises ValueError for
    anything else.
    """
    match = CONDITION.fullmatch(condition)
    if not match:
        raise ValueError(
            f"{condition!r} must look like `figure >= 0.1` or `figure >= current - 0.05`"
        )
    path, test, number, shift, by = match.groups()
    return path, test, number, shift, by
