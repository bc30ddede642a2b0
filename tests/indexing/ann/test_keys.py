"""Hashes depend on the bytes of a text alone, however Arrow stores it."""

import numpy as np
import pyarrow as pa

from indexing.ann.keys import hashes_of


def test_hashes_of_texts_of_every_length_equal_those_of_plain_python() -> None:
    rng = np.random.default_rng(0)
    texts = [
        "",
        "k",
        "déjà vu",
        "a" * 8 + "b",
        "\0" * 8,
        *("".join(map(chr, rng.integers(97, 123, size))) for size in range(1, 70)),
    ]
    table = pa.chunked_array([texts[:9], texts[9:]], pa.string())

    def slowly(text: str) -> int:
        value, data = 0, text.encode()
        for start in range(0, len(data), 8):
            word = int.from_bytes(data[start : start + 8].ljust(8, b"\0"), "little")
            if word:
                value = ((value ^ word) + 0x9E3779B97F4A7C15) % 2**64
                value = (value ^ (value >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
                value = (value ^ (value >> 27)) * 0x94D049BB133111EB % 2**64
                value ^= value >> 31
        return value

    assert hashes_of(table).tolist() == [slowly(text) for text in texts]
    assert hashes_of(table.slice(5, 20)).tolist() == [slowly(text) for text in texts[5:25]]
