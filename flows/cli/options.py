"""Options and helpers that the commands share: loading a recipe, naming a run and printing.

The option --root reads `UNCLIP_ROOT` from the environment. Reads recipes and writes no files.
"""

import hashlib
import json
import os
import re
import sys
import unicodedata
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from infra.errors import CallerError

if TYPE_CHECKING:  # its sections import torch and faiss
    from flows.config.run_config import RunConfig

Recipe = Annotated[
    str,
    typer.Argument(
        metavar="RECIPE", help="A TOML recipe, or the name of a built-in one (quickstart)."
    ),
]
RootUri = Annotated[
    str,
    typer.Option(
        "--root",
        envvar="UNCLIP_ROOT",
        metavar="URI",
        help="Where everything is stored: a folder or a URL such as s3://bucket/prefix.",
    ),
]
Name = Annotated[
    str | None,
    typer.Option("--name", metavar="NAME", help="Name of the run; by default the recipe's."),
]
Overrides = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="A.B=C",
        help="Override one key of the recipe, e.g. clip.width=256; may be repeated.",
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.")]
Address = Annotated[
    str | None,
    typer.Option(
        "--address",
        metavar="RAY",
        help="Ray cluster to join; by default a small Ray is started for the run.",
    ),
]
RunName = Annotated[
    str | None,
    typer.Option(
        "--run", metavar="NAME", help="Which run's models and index; by default the last one's."
    ),
]
DEFAULT_ROOT = "unclip-data"


@dataclass(frozen=True)
class RunOptions:
    """Options of every command that runs stages of a recipe."""

    root: RootUri = DEFAULT_ROOT
    name: Name = None
    overrides: Overrides = None
    address: Address = None


@dataclass(frozen=True)
class RunRequest:
    """Which recipe to run, into which ROOT and under which name, as given on the command line."""

    recipe: str
    root: str
    name: str | None
    overrides: list[str] | None
    targets: list[str]
    """Stages to run, with what they need; empty for all."""

    @property
    def run_name(self) -> str:
        """The run's name, by default the recipe's. Raises CallerError for an invalid name."""
        return run_name(self.recipe, self.name)


def load_config(
    recipe: str, overrides: list[str] | None, address: str | None = None
) -> "tuple[RunConfig, list[str]]":
    """Return the recipe with all overrides applied, and the overrides."""
    from flows.config.recipe_file import find_recipe

    find_recipe(recipe)  # reports a missing recipe before the slow import of the sections
    from flows.config.run_config import load_recipe

    assignments = [*(overrides or []), *([f"cluster.address={address}"] if address else [])]
    return load_recipe(recipe, assignments), assignments


NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")


def run_name(recipe: str, name: str | None) -> str:
    """Return the run's name, by default the recipe's. Raises CallerError for an invalid name.

    A recipe's name with other characters is written in ASCII, with a hash of it at the end, so that
    no two recipes share one.
    """
    chosen = name or Path(recipe).stem
    if not name and not NAME.fullmatch(chosen):
        letters = unicodedata.normalize("NFKD", chosen.replace("ß", "ss"))
        ascii_name = re.sub(r"[^A-Za-z0-9._]+", "-", letters.encode("ascii", "ignore").decode())
        digest = hashlib.sha256(os.fsencode(chosen)).hexdigest()[:6]
        chosen = "-".join(filter(None, (ascii_name.strip("-._")[:80], digest)))
    if not NAME.fullmatch(chosen):
        raise CallerError(f"--name {chosen}: use letters, digits, dots, dashes and underscores")
    return chosen


def say(line: str) -> None:
    """Print a message to stderr; stdout holds only the result."""
    print(line, file=sys.stderr, flush=True)


def print_json(result: Any) -> None:
    """Print the result of `--json` as one JSON object."""
    json.dump(result, sys.stdout, indent=1, ensure_ascii=False)
    sys.stdout.write("\n")
