"""Changes this process's environment variables for the time of a block."""

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager


@contextmanager
def changed_environment(variables: Mapping[str, str], without: str | None = None) -> Iterator[None]:
    """Set environment variables while the block runs; unset others with the prefix `without`."""
    hidden = {
        name for name in os.environ if without and name.startswith(without)
    } - variables.keys()
    before = {name: os.environ.get(name) for name in hidden | variables.keys()}
    try:
        for name in hidden:
            del os.environ[name]
        os.environ.update(variables)
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
