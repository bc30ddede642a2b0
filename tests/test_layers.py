"""The floors hold: imports run downwards only, sisters do not know each other, and each third party lives on one floor."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FLOORS = {
    "flows": {"flows", "training", "indexing", "infra"},
    "training": {"training", "infra"},
    "indexing": {"indexing", "infra"},
    "infra": {"infra"},
}
HOMES = {
    "prefect": "flows",
    "img2dataset": "flows",
    "typer": "flows",
    "torch": "training",
    "ray.train": "training",
    "ray.serve": "indexing",
    "faiss": "indexing",
    "fastapi": "indexing",
}
FILES = [path for floor in FLOORS for path in sorted((ROOT / floor).rglob("*.py"))]


def imported(source: str) -> set[str]:
    """Return the dotted names that a source imports, in functions too."""
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative imports hide the floor"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def trespasses(floor: str, source: str) -> list[str]:
    """Return the imports that do not belong on that floor."""
    names = imported(source)
    upwards = [name for name in names if (top := name.partition(".")[0]) in {*FLOORS, "tests"} and top not in FLOORS[floor]]
    strangers = [name for name in names for guest, home in HOMES.items() if f"{name}.".startswith(f"{guest}.") and floor != home]
    return upwards + strangers


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_run_downwards(path: Path) -> None:
    assert trespasses(path.relative_to(ROOT).parts[0], path.read_text()) == []


@pytest.mark.parametrize(
    ("floor", "source"),
    [
        ("training", "from indexing.ann.index import Index"),
        ("infra", "def f():\n    import flows.orchestration.stages"),
        ("indexing", "import torch.nn as nn"),
        ("infra", "from ray import train"),
        ("training", "from prefect import flow"),
        ("flows", "from tests import fakes"),
    ],
)
def test_a_trespass_is_seen(floor: str, source: str) -> None:
    assert len(trespasses(floor, source)) == 1
