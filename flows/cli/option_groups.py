"""Option groups: a frozen dataclass whose annotated fields are arguments and options of a command.

Several commands share a group, so its options are written once. Typer knows no groups: it reads a
command's signature. The decorator `option_groups` shows typer a signature in which the fields of
a group stand at the place of the parameter, and builds the dataclass when typer calls the command.
"""

import functools
import inspect
from collections.abc import Callable
from dataclasses import MISSING, fields, is_dataclass
from inspect import Parameter
from typing import Any


def option_groups(command: Callable[..., None]) -> Callable[..., None]:
    """Return the command with every parameter that is a dataclass replaced by its fields.

    The fields keep their order, annotations and defaults. The result takes keyword arguments only,
    which is how typer calls a command. Raises TypeError if two parameters have one name.
    """
    groups: dict[str, Any] = {}
    parameters: list[Parameter] = []
    for parameter in inspect.signature(command).parameters.values():
        if is_dataclass(parameter.annotation):
            groups[parameter.name] = parameter.annotation
            parameters += _parameters_of(parameter.annotation)
        else:
            parameters.append(parameter.replace(kind=Parameter.KEYWORD_ONLY))
    names = [parameter.name for parameter in parameters]
    repeated = sorted({name for name in names if names.count(name) > 1})
    if repeated:
        raise TypeError(f"{command.__name__}: {repeated[0]} is a parameter more than once")

    @functools.wraps(command)
    def expanded(**values: Any) -> None:
        for name, group in groups.items():
            values[name] = group(**{field.name: values.pop(field.name) for field in fields(group)})
        command(**values)

    # Typer reads both.
    expanded.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    expanded.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return expanded


def _parameters_of(group: Any) -> list[Parameter]:
    """Return the fields of a dataclass as keyword parameters."""
    return [
        Parameter(
            field.name,
            Parameter.KEYWORD_ONLY,
            default=Parameter.empty if field.default is MISSING else field.default,
            annotation=field.type,
        )
        for field in fields(group)
    ]
