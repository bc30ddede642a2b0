"""SECURITY.md: every test that a promise names exists, and no code is loaded from data."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

HERE = Path(__file__).parents[1]
SOURCES = [
    path
    for floor in ("flows", "training", "indexing", "infra")
    for path in sorted((HERE / floor).rglob("*.py"))
]
LOADERS = {"load", "loads", "Unpickler", "read_pickle"}
FROM_PARENT = {"flows/sources/parquet_reader.py": ["pickle.load(requests)"]}
"""A child process that reads what its parent, not a stranger, has pickled."""
MODULES = {"pickle", "cloudpickle", "dill", "joblib", "shelve", "marshal"}


def test_every_test_that_a_promise_names_exists() -> None:
    names = set(re.findall(r"`(test_\w+)`", (HERE / "SECURITY.md").read_text()))
    tests = "\n".join(path.read_text() for path in (HERE / "tests").rglob("test_*.py"))
    assert len(names) > 30
    assert names - set(re.findall(r"^def (test_\w+)", tests, flags=re.MULTILINE)) == set()


def unpickling(source: str) -> Iterator[str]:
    """Yield the calls of a module that would load code from data."""
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call):
            continue
        name = ast.unparse(node.func)
        module, _, function = name.rpartition(".")
        options = {each.arg: ast.unparse(each.value) for each in node.keywords}
        is_code = (
            (name == "torch.load" and options.get("weights_only") != "True")
            or (module in MODULES and function in LOADERS)
            or options.get("allow_pickle", "False") != "False"
        )
        if is_code:
            yield ast.unparse(node)


def test_nothing_is_unpickled_but_tensors_and_arrays() -> None:
    calls = {str(path.relative_to(HERE)): list(unpickling(path.read_text())) for path in SOURCES}
    assert len(calls) > 200
    assert {path: found for path, found in calls.items() if found} == FROM_PARENT


@pytest.mark.parametrize(
    "source", ["torch.load(file)", "pickle.loads(data)", "np.load(file, allow_pickle=True)"]
)
def test_unpickling_is_seen(source: str) -> None:
    assert list(unpickling(source)) == [source]
