"""Retries of storage and network operations that failed for a temporary reason.

Every client library has its own exceptions for the same few events, and some are wrapped in
OSError. They are recognised by type name, so that no client has to be imported for a local ROOT.
"""

import errno
import time
from collections.abc import Callable
from typing import TypeVar

TRIES = 6
FIRST_PAUSE_S = 0.25
FINAL = (FileNotFoundError, FileExistsError, PermissionError, NotImplementedError)
NUMBERS = (
    errno.EBUSY,
    errno.EIO,
    errno.ECONNRESET,
    errno.ECONNREFUSED,
    errno.EPIPE,
    errno.ETIMEDOUT,
)
NAMES = (
    *(
        "FlexibleChecksumError",
        "HTTPClientError",
        "ResponseParserError",
        "ConnectionError",
        "ConnectionClosedError",
    ),
    *(
        "EndpointConnectionError",
        "ReadTimeoutError",
        "ConnectTimeoutError",
        "ClientPayloadError",
        "ServerDisconnectedError",
    ),
)
WORDS = ("did not match what we received", "IncompleteBody", "RequestTimeout", "SlowDown")

Answer = TypeVar("Answer")


def retry(action: Callable[[], Answer]) -> Answer:
    """Call an action that may be repeated; retry while it fails for a temporary reason.

    The pauses double and take 8 s together. Raises the last error.
    """
    for number in range(TRIES):
        try:
            return action()
        except Exception as error:
            if number == TRIES - 1 or not is_passing(error):
                raise
            time.sleep(FIRST_PAUSE_S * 2**number)
    raise AssertionError("the last try returns or raises")


def is_passing(error: BaseException) -> bool:
    """Return whether a failure is temporary.

    Temporary are failures of the network, an overloaded store and a flipped byte; lasting are those
    of rights, names and space.
    """
    if isinstance(error, FINAL):
        return False
    if (
        isinstance(error, TimeoutError)
        or type(error).__name__ in NAMES
        or any(words in str(error) for words in WORDS)
    ):
        return True
    return isinstance(error, OSError) and error.errno in NUMBERS
