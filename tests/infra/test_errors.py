"""Messages of errors are one line, whatever strangers have written into it."""

import pickle

import pytest

from infra.errors import CallerError, DataError, StorageAwayError, UnclipError


@pytest.mark.parametrize("kind", [UnclipError, CallerError, DataError, StorageAwayError])
def test_what_is_not_printable_is_escaped(kind: type[UnclipError]) -> None:
    error = kind("the column 'a\n\x1b[2J\u202eb\ud800' of Bücher 🙂")
    assert str(error) == r"the column 'a\n\x1b[2J\u202eb\ud800' of Bücher 🙂"
    assert str(pickle.loads(pickle.dumps(error))) == str(error)
