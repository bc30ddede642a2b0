"""The exceptions that cross a floor, as one tree.

    UnclipError            a failure: exit code 1
    ├── CallerError        a caller's mistake (recipe, argument, path): exit code 2
    ├── StorageError       a ROOT that cannot be read or written, a full disk
    │   └── StorageAwayError   a store that was unavailable for longer than we wait: try again
    └── DataError          broken input (a damaged shard, no sample left)
        └── CutFileError       a file that became shorter while it was open

Every message is one line that names the cause and the fix; the command line prints it without a
traceback.
"""


class UnclipError(Exception):
    """A failure that the user can act on; the message is one line.

    Texts of strangers in it (names of columns, files, keys) cannot break the line or control a
    terminal: what is not printable is escaped.
    """

    exit_code = 1

    def __str__(self) -> str:
        return "".join(
            character
            if character.isprintable()
            else character.encode("unicode_escape").decode("ascii")
            for character in super().__str__()
        )


class CallerError(UnclipError, ValueError):
    """A mistake in a recipe, an argument or a path."""

    exit_code = 2


class StorageError(UnclipError, OSError):
    """A root that cannot be read or written, or has no space left."""


class StorageAwayError(StorageError):
    """A store with a temporary failure that lasted longer than `infra/storage/retry.py` waits."""


class DataError(UnclipError):
    """Broken input data."""


class CutFileError(DataError):
    """A file that became shorter while it was open."""


PERMANENT = (
    CallerError,
    DataError,
    AssertionError,
    AttributeError,
    ImportError,
    NameError,
    NotImplementedError,
    TypeError,
)
"""Errors that come again wherever and whenever the same call is tried: a caller's mistake, broken
data, a bug in the code. Any other error may pass on another machine or at another time."""
