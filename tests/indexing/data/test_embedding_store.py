"""Vectors and metadata of an embed folder must agree with its facts."""

from pathlib import Path

import numpy as np
import pytest

from indexing.data.embedding_store import unit
from indexing.data.held_out import open_embedded
from infra.errors import DataError
from tests.helpers.evaluation_run import DIM, usual_rows, write_run


def test_vectors_without_their_metadata_are_refused(tmp_path: Path) -> None:
    write_run(tmp_path, usual_rows())
    np.save(tmp_path / "embed" / "img_emb" / "img_emb_0000.npy", np.ones((3, DIM), np.float16))
    with pytest.raises(DataError, match=r"facts\.json"):
        open_embedded(tmp_path / "embed")


def test_unit_leaves_zeros() -> None:
    assert unit(np.array([[0.0, 0.0], [3.0, 4.0]], np.float32)).tolist() == [
        [0, 0],
        pytest.approx([0.6, 0.8]),
    ]
