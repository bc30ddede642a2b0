"""Generates the list of modules in `docs/architecture.md` from the docstrings of the code.

A room's line is its package's docstring, and a file's line is the first paragraph of its module
docstring. The rest of the page is written by hand.
"""

import ast
from pathlib import Path

REPOSITORY = Path(__file__).parents[2]
PAGE = REPOSITORY / "docs" / "architecture.md"
FLOORS = ("flows", "training", "indexing", "infra")
START = "<!-- Generated from the docstrings by `make docs`: do not edit below. -->"
END = "<!-- End of the generated list. -->"


def with_module_list(page: str) -> str:
    """Return the page with the current list between its marks."""
    before, _, rest = page.partition(START)
    _, _, after = rest.partition(END)
    return f"{before}{START}\n\n{module_list()}\n{END}{after}"


def module_list() -> str:
    """Return a heading for every room, what it holds, and a line for each of its modules."""
    lines = []
    for floor in FLOORS:
        for package in sorted((REPOSITORY / floor).rglob("__init__.py")):
            modules = sorted(set(package.parent.glob("*.py")) - {package})
            if modules:
                folder = package.parent.relative_to(REPOSITORY)
                lines += [f"### `{folder}/`", "", first_paragraph(package), ""]
                lines += [f"- `{path.name}`: {first_paragraph(path)}" for path in modules]
                lines.append("")
    return "\n".join(lines)


def first_paragraph(path: Path) -> str:
    """Return the first paragraph of a module's docstring on one line.

    Raises ValueError if the module has no docstring.
    """
    docstring = ast.get_docstring(ast.parse(path.read_text()))
    if not docstring:
        raise ValueError(f"{path.relative_to(REPOSITORY)} needs a docstring")
    return " ".join(docstring.split("\n\n")[0].split())
