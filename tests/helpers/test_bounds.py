"""A block that takes too much fails, whatever the code inside makes of it."""

import pytest

from tests.helpers.bounds import bounded


def test_a_small_block_passes_and_its_own_error_stays() -> None:
    with pytest.raises(ValueError, match="mine"), bounded():
        raise ValueError("mine")


def test_too_much_memory_is_seen_after_it_was_given_back() -> None:
    with pytest.raises(AssertionError, match="MiB"), bounded(memory_bytes=32 << 20):
        del (bytearray(64 << 20))[:]


def test_an_error_that_hides_a_lack_of_memory_is_no_excuse() -> None:
    with pytest.raises(AssertionError, match="memory"), bounded(memory_bytes=32 << 20):
        try:
            bytearray(1 << 40)
        except MemoryError as error:
            raise ValueError("it cannot be read") from error


def test_too_much_processor_time_is_seen_though_exceptions_are_swallowed() -> None:
    with pytest.raises(AssertionError, match="processor"), bounded(processor_s=0.05):
        while True:
            try:
                sum(range(1000))
            except Exception:
                continue
