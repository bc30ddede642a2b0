"""A packaged set is written once and agrees with its package; a hostile pickle is refused."""

import io
import pickle
from pathlib import Path

import cv2
import numpy as np
import pytest

from flows.demo import packaged_sets
from indexing.data.labelled_sets import open_set
from infra.errors import CallerError, DataError


def test_a_packaged_set_is_made_once_and_agrees_with_its_package(tmp_path: Path) -> None:
    from sklearn.datasets import load_digits

    path = packaged_sets.set_path("digits", tmp_path)
    found, theirs = open_set(path), load_digits()
    assert (
        len(found) == 1797
        and (found.labels == theirs.target).all()
        and found.names[3] == "three"
        and len(found.templates) == 3
    )
    first = cv2.imdecode(np.frombuffer(found.encoded[0], np.uint8), cv2.IMREAD_GRAYSCALE)
    assert np.allclose(255 - first, theirs.images[0] * 255 / 16, atol=1)
    stamp = path.stat().st_mtime_ns
    assert packaged_sets.set_path("digits", tmp_path).stat().st_mtime_ns == stamp


def test_a_pickle_that_would_run_code_is_refused() -> None:
    class Evil:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return (print, ("ran",))

    arrays = packaged_sets._ArraysOnly(io.BytesIO(pickle.dumps(np.arange(3)))).load()
    assert arrays.tolist() == [0, 1, 2]
    with pytest.raises(DataError, match="only numpy arrays are read"):
        packaged_sets._ArraysOnly(io.BytesIO(pickle.dumps(Evil()))).load()


def test_a_set_that_is_no_path_and_not_packaged_is_named(tmp_path: Path) -> None:
    with pytest.raises(CallerError, match="neither a path nor a packaged set"):
        packaged_sets.set_path("imaginary", tmp_path)
