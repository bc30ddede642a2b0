"""The house holds: imports run down between floors, rooms do not import each other in circles,
third parties live in one place.
"""

import ast
from collections.abc import Iterator, Mapping
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
    "prefect": ("flows.scheduling", "flows.pipeline", "flows.cli"),
    "img2dataset": ("flows.ingest",),
    "typer": ("flows.cli",),
    "resvg_py": ("flows.demo",),
    "torch": ("training",),
    "ray.train": ("training.jobs",),
    "ray.serve": ("indexing.service", "flows.cli.serve"),
    "faiss": ("indexing",),
    "fastapi": ("indexing.service",),
    "jinja2": ("indexing.report",),
    "s3fs": ("infra.storage",),
    "ray.job_submission": ("infra.compute",),
}
"""Third parties and the rooms or floors that may import them."""
MAX_FILES = 18
"""Files in one room."""
FILES = [path for floor in FLOORS for path in sorted((ROOT / floor).rglob("*.py"))]


def module_name(path: Path) -> str:
    """Return the dotted name of a source file."""
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


MODULES = {module_name(path) for path in FILES if path.name != "__init__.py"}


def imported_names(tree: ast.AST) -> Iterator[str]:
    """Yield the dotted names that a module imports, in functions too."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative imports hide the floor"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def is_below(name: str, package: str) -> bool:
    """Say whether a dotted name is a package or lies in it."""
    return f"{name}.".startswith(f"{package}.")


def trespasses(module: str, source: str) -> list[str]:
    """Return the imports that do not belong in a module."""
    floor, names = module.partition(".")[0], set(imported_names(ast.parse(source)))
    tops = {*FLOORS, "tests"}
    upwards = [
        name
        for name in names
        if (top := name.partition(".")[0]) in tops and top not in FLOORS[floor]
    ]
    strangers = [
        name
        for name in names
        for guest, homes in HOMES.items()
        if is_below(name, guest) and not any(is_below(module, home) for home in homes)
    ]
    return upwards + strangers


def room_of(module: str) -> str:
    """Return the package that a module lies in."""
    return module.rpartition(".")[0]


def imported_modules(source: str) -> set[str]:
    """Return our modules that a source imports when it runs: what is imported for its types alone
    does not count.
    """
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            node.body = []
    names = set(imported_names(tree))
    return {name for name in names | {room_of(name) for name in names} if name in MODULES}


def find_circle(graph: Mapping[str, set[str]]) -> list[str]:
    """Return the nodes of one circle of a graph in order, or none."""
    done: set[str] = set()

    def walk(node: str, path: list[str]) -> list[str]:
        if node in path:
            return [*path[path.index(node) :], node]
        if node not in done:
            for following in sorted(graph.get(node, ())):
                if circle := walk(following, [*path, node]):
                    return circle
            done.add(node)
        return []

    return next((circle for node in sorted(graph) if (circle := walk(node, []))), [])


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_run_down_and_third_parties_stay_at_home(path: Path) -> None:
    assert trespasses(module_name(path), path.read_text()) == []


def test_no_rooms_import_each_other_in_a_circle() -> None:
    rooms: dict[str, set[str]] = {}
    for path in FILES:
        module = module_name(path)
        room = room_of(module) if path.name != "__init__.py" else module
        rooms.setdefault(room, set()).update(
            room_of(name) for name in imported_modules(path.read_text())
        )
    assert find_circle({room: others - {room} for room, others in rooms.items()}) == []


def test_rooms_are_small_and_no_name_stands_twice_on_a_floor() -> None:
    for floor in FLOORS:
        names = [path.stem for path in (ROOT / floor).rglob("*.py") if path.name != "__init__.py"]
        assert sorted(names) == sorted(set(names)), floor
        for room in {path.parent for path in (ROOT / floor).rglob("*.py")}:
            assert len(list(room.glob("[!_]*.py"))) <= MAX_FILES, room


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("training.models.clip", "from indexing.ann.index import Index"),
        ("infra.storage.store", "def f():\n    import flows.pipeline"),
        ("indexing.ann.index", "import torch.nn as nn"),
        ("infra.compute.cluster", "from ray import train"),
        ("training.models.clip", "from ray import train"),
        ("training.jobs.train", "from prefect import flow"),
        ("flows.runs.records", "import typer"),
        ("flows.pipeline", "from tests.helpers import fake_stages"),
    ],
)
def test_a_trespass_is_seen(module: str, source: str) -> None:
    assert len(trespasses(module, source)) == 1


def test_a_circle_is_seen() -> None:
    assert find_circle({"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": set()}) == ["a", "b", "c", "a"]
