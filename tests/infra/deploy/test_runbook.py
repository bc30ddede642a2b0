"""The runbook speaks of commands, options, files and messages that there are."""

import re
import shlex
from pathlib import Path

import pytest
import typer

from flows.cli.main import app

HERE = Path(__file__).parents[3]
TEXT = (HERE / "docs" / "operations.md").read_text()
COMMANDS = sorted(set(re.findall(r"`(?:[A-Z_]+=\S+ )*unclip ([^`]+)`", TEXT)))
SOURCES = "".join(
    path.read_text()
    for folder in ("flows", "infra", "indexing")
    for path in (HERE / folder).rglob("*.py")
)


@pytest.mark.parametrize("command", COMMANDS)
def test_its_commands_exist_with_those_options(command: str) -> None:
    node = typer.main.get_command(app)
    words = shlex.split(command)
    while words and hasattr(node, "commands"):
        assert words[0] in node.commands, command
        node = node.commands[words.pop(0)]
    options = {name for parameter in node.params for name in parameter.opts}
    assert {word for word in words if word.startswith("--")} <= options, command


def test_its_files_exist() -> None:
    for name in set(re.findall(r"infra/deploy/[\w.]+", TEXT)):
        assert (HERE / name).is_file(), name


@pytest.mark.parametrize(
    "message",
    [
        *(
            "no space left to write",
            "is being made by",
            "is fenced off",
            "does not answer",
            "has another checksum",
            "not promoted",
        ),
        *("wants a password", "this server is asked at"),
    ],
)
def test_its_messages_are_the_codes_own(message: str) -> None:
    assert message in TEXT and message in SOURCES


def test_the_variables_that_it_asks_for_are_read_somewhere() -> None:
    read = SOURCES + "".join(
        path.read_text()
        for path in (HERE / "infra" / "deploy").iterdir()
        if path.suffix in (".yaml", ".env") or path.name == "Dockerfile"
    )
    for name in set(re.findall(r"`((?:UNCLIP|RAY|POSTGRES|AWS)_[A-Z_]+)", TEXT)):
        assert name in read, name
