"""README and docs: their commands exist, their links lead somewhere, generated pages are current,
examples run.
"""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import typer

from flows.cli.main import app
from tests.helpers.committed_root import write_root
from tests.helpers.module_list import FLOORS, with_module_list
from tests.helpers.module_list import PAGE as ARCHITECTURE
from tests.helpers.reference_pages import BUILDERS, PAGES

HERE = Path(__file__).parents[1]
TEXTS = [
    HERE / "README.md",
    HERE / "CONTRIBUTING.md",
    HERE / "SECURITY.md",
    *sorted((HERE / "docs").rglob("*.md")),
]
GENERATED = {PAGES / name for name in BUILDERS}


def commands_in(text: str) -> list[str]:
    """Return the `unclip` commands of a page: in indented or fenced blocks, and between
    backticks.
    """
    lines = [
        line.split("#")[0].strip().rstrip("\\")
        for line in text.splitlines()
        if line.startswith(("    ", "\t"))
    ]
    spans = re.findall(r"`([^`\n]+)`", text)
    found = []
    for line in [*lines, *spans]:
        match = re.match(r"(?:[A-Z_]+=\S+ )*(?:\.venv/bin/)?unclip ([a-z][^|&;]*)", line)
        if match:
            found.append(match[1].replace("…", "").strip())
    return found


COMMANDS = sorted(
    {
        (path.name, command)
        for path in TEXTS
        if path not in GENERATED
        for command in commands_in(path.read_text())
    }
)


@pytest.mark.parametrize(("page", "command"), COMMANDS)
def test_a_command_of_the_docs_exists_with_its_options(page: str, command: str) -> None:
    node = typer.main.get_command(app)
    words = shlex.split(command.replace("|", " "))
    while words and hasattr(node, "commands"):
        if words[0] not in node.commands and getattr(node, "name", "") == "index":
            node = node.commands["build"]  # `unclip index RECIPE` is short for it
            break
        assert words[0] in node.commands, f"{page}: unclip {command}"
        node = node.commands[words.pop(0)]
    options = {name for parameter in getattr(node, "params", []) for name in parameter.opts} | {
        "--help",
        "--debug",
        "--install-completion",
    }
    assert {word for word in words if word.startswith("--")} <= options, f"{page}: unclip {command}"


def test_commands_are_found_in_the_docs() -> None:
    assert len(COMMANDS) > 40


@pytest.mark.parametrize(
    "path",
    [path for path in TEXTS if path not in GENERATED],
    ids=lambda path: str(path.relative_to(HERE)),
)
def test_links_and_pictures_lead_to_files(path: Path) -> None:
    for target in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", path.read_text()):
        if "://" not in target:
            assert (path.parent / target).exists(), f"{path.name}: {target}"


def test_the_readme_is_read_in_three_minutes() -> None:
    lines = (HERE / "README.md").read_text().splitlines()
    assert 80 <= len(lines) <= 120


def test_sections_of_the_changelog_are_short() -> None:
    sections = re.split(r"^## ", (HERE / "CHANGELOG.md").read_text(), flags=re.MULTILINE)[1:]
    assert len(sections) >= 2 and all(len(section.splitlines()) <= 60 for section in sections)


@pytest.mark.parametrize("name", BUILDERS)
def test_a_generated_page_is_that_of_the_code(name: str) -> None:
    assert (PAGES / name).read_text() == BUILDERS[name](), "run `make docs`"


def test_the_list_of_modules_is_that_of_the_docstrings() -> None:
    page = ARCHITECTURE.read_text()
    assert page == with_module_list(page), "run `make docs`"
    for floor in FLOORS:
        for path in (HERE / floor).rglob("*.py"):
            if path.name != "__init__.py":
                room = page.partition(f"### `{path.parent.relative_to(HERE)}/`\n")[2]
                assert f"- `{path.name}`: " in room.partition("\n### ")[0], path


def test_the_architecture_names_the_files_that_are_not_python() -> None:
    page = ARCHITECTURE.read_text()
    for floor in FLOORS:
        for path in (HERE / floor).rglob("*"):
            if path.is_file() and path.suffix not in (".py", ".pyc", ".typed"):
                assert f"`{path.name}`" in page, path


def test_every_environment_variable_of_the_code_is_on_the_operations_page() -> None:
    page = (HERE / "docs" / "operations.md").read_text()
    variable = re.compile(
        r'"((?:UNCLIP|AWS|RAY|PREFECT|GRPC|GOMP|OMP|OPENBLAS|OPENCV|NO)_[A-Z_]+|DO_NOT_TRACK)"'
    )
    names = {
        name
        for floor in FLOORS
        for path in (HERE / floor).rglob("*.py")
        for name in variable.findall(path.read_text())
    }
    assert len(names) > 20
    assert [name for name in sorted(names) if f"`{name}" not in page] == []


def test_the_site_builds_strictly(tmp_path: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "mkdocs",
        "build",
        "--strict",
        "--quiet",
        "--site-dir",
        str(tmp_path / "site"),
    ]
    done = subprocess.run(command, cwd=HERE, capture_output=True, text=True)
    assert done.returncode == 0 and (tmp_path / "site" / "index.html").is_file(), done.stderr


def run_example(name: str, *arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, str(HERE / "examples" / name), *arguments],
        cwd=HERE,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_examples_read_and_search_a_root(tmp_path: Path) -> None:
    root = write_root(tmp_path)
    printed = run_example("read_root.py", root.uri)
    assert (
        "pairs are kept" in printed and "00000.tar begins with" in printed and "(0, 1.0)" in printed
    )
    view_key = re.search(r"begins with (\S+):", printed)
    assert view_key
    import pyarrow.parquet as pq

    key = pq.read_table(next((tmp_path / "root" / "curate").rglob("keep.parquet")))["key"][
        0
    ].as_py()
    lines = run_example("search_from_python.py", root.uri, key).splitlines()
    assert len(lines) == 5 and any(line.startswith(f"1.000  {key}") for line in lines)


@pytest.mark.slow
def test_the_example_trains_a_diffusion_model(tmp_path: Path) -> None:
    printed = run_example("train_diffusion.py", str(tmp_path), "60")
    assert "energy distance" in printed and list(tmp_path.rglob("*.png"))
