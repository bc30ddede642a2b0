"""The command `recipe`: print a resolved recipe with the meaning and allowed values of every key.

The output is TOML and again a valid recipe. Descriptions and bounds come from the section classes.
"""

import textwrap
from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Literal, get_args, get_origin

import typer
from pydantic.fields import FieldInfo

from flows.cli.options import Json, Overrides, Recipe, load_config, print_json
from infra.errors import CallerError
from infra.settings import Section
from infra.toml_text import toml_value

WIDTH = 120


def recipe(
    recipe: Recipe,
    section: Annotated[
        str | None,
        typer.Option("--section", metavar="NAME", help="Only this section, such as clip."),
    ] = None,
    overrides: Overrides = None,
    as_json: Json = False,
) -> None:
    """Show a complete recipe: every key with its meaning, its allowed values and its value here."""
    config, _ = load_config(recipe, overrides)
    if section is not None and section not in type(config).model_fields:
        raise CallerError(f"--section {section}: there are {', '.join(type(config).model_fields)}")
    if as_json:
        whole = config.model_dump(mode="json")
        print_json(whole if section is None else {section: whole[section]})
    else:
        print("\n".join(_lines(type(config), dict(config), "", section)).strip())


def _lines(
    section: type[Section], values: Mapping[str, Any], path: str, only: str | None = None
) -> Iterator[str]:
    """Yield a section's lines: first its own keys, then its subsections."""
    fields = section.model_fields
    below = {
        name
        for name, field in fields.items()
        if _sections(field) and not isinstance(values[name], Mapping)
    }
    for name, field in fields.items():
        if name not in below:
            yield from _sentences(" ".join(filter(None, (field.description, _allowed(field)))))
            yield f"# {name} =" if values[name] is None else f"{name} = {toml_value(values[name])}"
    for name, field in fields.items():
        if name in below and only in (None, name):
            yield from _section(f"{path}{name}", field, values[name])


def _section(path: str, field: FieldInfo, value: Any) -> Iterator[str]:
    """Yield the lines of one section, or of a list of sections; alternatives become comments."""
    is_list = isinstance(value, tuple)
    there = value if is_list else () if value is None else (value,)
    head = f"[[{path}]]" if is_list else f"[{path}]"
    about = field.description or ""
    for present in there:
        yield ""
        yield from _sentences(
            f"{about} {_first_line(type(present))}"
            if is_list
            else about or _first_line(type(present))
        )
        yield head
        yield from _lines(type(present), dict(present), f"{path}.")
        about = ""
    for section in _sections(field) if is_list or not there else ():
        if section not in map(type, there):
            yield ""
            yield from _sentences(f"{about} Not in this recipe: {_first_line(section)}")
            lines = (head, *_lines(section, _defaults(section), f"{path}."))
            yield from (line if line.startswith("#") or not line else f"# {line}" for line in lines)


def _defaults(section: type[Section]) -> dict[str, Any]:
    """Return a section's defaults by key, None for a required key."""
    leaves = {}
    for name, field in section.model_fields.items():
        choices = _choices(field)
        required = choices[0] if len(choices) == 1 else None
        leaves[name] = (
            required if field.is_required() else field.get_default(call_default_factory=True)
        )
    return leaves


def _sections(field: FieldInfo) -> list[type[Section]]:
    """Return the section classes that a field may hold."""
    return [
        part
        for part in _parts(field.annotation)
        if isinstance(part, type) and issubclass(part, Section)
    ]


def _parts(annotation: Any) -> Iterator[Any]:
    """Yield a type and, recursively, its type arguments."""
    yield annotation
    for argument in get_args(annotation) if get_origin(annotation) is not Literal else ():
        yield from _parts(argument)


def _allowed(field: FieldInfo) -> str:
    """Describe a field's choices or bounds; "" if it has none."""
    choices = _choices(field)
    if len(choices) > 1:
        return f"One of {', '.join(toml_value(choice) for choice in choices)}."
    low, above, high, below = (_bound(field, name) for name in ("ge", "gt", "le", "lt"))
    if low and high:
        return f"({low} to {high})"
    said = ((low, "at least"), (above, "more than"), (high, "at most"), (below, "less than"))
    bounds = ", ".join(f"{word} {bound}" for bound, word in said if bound)
    return f"({bounds})" if bounds else ""


def _choices(field: FieldInfo) -> list[Any]:
    return [
        argument
        for part in _parts(field.annotation)
        if get_origin(part) is Literal
        for argument in get_args(part)
    ]


def _bound(field: FieldInfo, name: str) -> str:
    return next(
        (f"{getattr(bound, name):,}" for bound in field.metadata if hasattr(bound, name)), ""
    )


def _first_line(section: type[Section]) -> str:
    return (section.__doc__ or "").strip().partition("\n")[0]


def _sentences(text: str) -> list[str]:
    return textwrap.wrap(" ".join(text.split()), WIDTH, initial_indent="# ", subsequent_indent="# ")
