"""Option groups: typer sees a group's fields as options, and the command gets the dataclass."""

import inspect
from dataclasses import dataclass
from typing import Annotated

import pytest
import typer
from typer.testing import CliRunner

from flows.cli.option_groups import option_groups


@dataclass(frozen=True)
class Colour:
    name: Annotated[str, typer.Option("--name", envvar="COLOUR_NAME", help="Its name.")]
    depth: Annotated[int, typer.Option("--depth", min=1, max=8, help="Bits.")] = 8


@dataclass(frozen=True)
class PrintedColour(Colour):
    inks: Annotated[list[str] | None, typer.Option("--ink", help="May be repeated.")] = None


calls: list[tuple[str, PrintedColour, bool]] = []


@option_groups
def paint(
    surface: Annotated[str, typer.Argument(metavar="SURFACE")],
    colour: PrintedColour,
    is_dry: Annotated[bool, typer.Option("--dry")] = False,
) -> None:
    """Paint a surface."""
    calls.append((surface, colour, is_dry))


def plain(
    surface: Annotated[str, typer.Argument(metavar="SURFACE")],
    name: Annotated[str, typer.Option("--name", envvar="COLOUR_NAME", help="Its name.")],
    depth: Annotated[int, typer.Option("--depth", min=1, max=8, help="Bits.")] = 8,
    inks: Annotated[list[str] | None, typer.Option("--ink", help="May be repeated.")] = None,
    is_dry: Annotated[bool, typer.Option("--dry")] = False,
) -> None:
    """Paint a surface."""


def run(command: object, *arguments: str) -> tuple[int, str]:
    app = typer.Typer(add_completion=False, rich_markup_mode=None)
    app.command("paint")(command)  # type: ignore[type-var]
    result = CliRunner().invoke(app, list(arguments), prog_name="paint")
    return result.exit_code, result.output


@pytest.mark.parametrize(
    "arguments",
    [
        ["--help"],
        [],
        ["wall"],
        ["wall", "--name", "red", "--depth", "9"],
        ["wall", "--name", "red", "--bogus"],
    ],
)
def test_help_and_complaints_are_those_of_a_command_without_groups(arguments: list[str]) -> None:
    assert run(paint, *arguments) == run(plain, *arguments)


def test_a_command_gets_the_dataclass_with_the_options_and_the_defaults(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    calls.clear()
    options = ["wall", "--name", "red", "--depth", "2", "--ink", "a", "--ink", "b", "--dry"]
    assert run(paint, *options) == (0, "")
    monkeypatch.setenv("COLOUR_NAME", "blue")
    assert run(paint, "door") == (0, "")
    assert calls == [
        ("wall", PrintedColour("red", 2, ["a", "b"]), True),
        ("door", PrintedColour("blue", 8, None), False),
    ]


def test_the_signature_keeps_the_order_the_defaults_and_the_documentation() -> None:
    signature = inspect.signature(paint)
    assert list(signature.parameters) == ["surface", "name", "depth", "inks", "is_dry"]
    assert signature.parameters["name"].default is inspect.Parameter.empty
    assert signature.parameters["depth"].default == 8
    assert (paint.__name__, paint.__doc__) == ("paint", "Paint a surface.")


def test_two_options_of_one_name_are_refused() -> None:
    def mix(first: Colour, depth: int = 3) -> None: ...

    with pytest.raises(TypeError, match="mix: depth is a parameter more than once"):
        option_groups(mix)
