"""Reads a TOML recipe into a tree, applies `--set` overrides, and says in one line what a section's model refuses.

Knows no section: `flows/config/run_config.py` brings the model. Reads recipe files only.
"""

import difflib
import json
import re
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar, get_args

from pydantic import BaseModel, ValidationError

from infra.errors import CallerError

Model = TypeVar("Model", bound=BaseModel)
SECRET = re.compile(
    r"://[^/?#\s]*@|[?&](x-(amz|goog)-(signature|credential|security-token)|awsaccesskeyid|signature|sig|(access_)?token|api_?key|password)=",
    re.IGNORECASE,
)
"""An URL with a name and a password in it, or a signed one."""
BUILT_IN = Path(__file__).parents[1] / "recipes"


def find_recipe(name: str) -> Path:
    """Return the file of a recipe: a path, or the name of one that comes with us (`quickstart`). Raises CallerError."""
    given = Path(name)
    if given.is_file():
        return given
    built_in = BUILT_IN / f"{given.stem}.toml"
    if str(given) in (given.stem, built_in.name) and built_in.is_file():
        return built_in
    known = sorted(path.stem for path in BUILT_IN.glob("*.toml"))
    raise CallerError(f"there is no recipe {name}: give a TOML file or one of {', '.join(known)}")


def read_recipe(path: Path, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """Return the recipe's sections as a tree, its `extends` resolved and the overrides (`clip.width=256`) applied.

    Raises CallerError, also for an URL that carries credentials: a recipe is kept in every manifest, in jobs and in Prefect's parameters.
    """
    tree = _read(path, ())
    for override in overrides:
        _apply(tree, override)
    for section, value in tree.items():
        place = _secret_in(value, "")
        if place is not None:
            raise CallerError(
                f"{path.name}: [{section}] {place.lstrip('.')} holds credentials (a user, a password or a signature in an URL): "
                "a recipe is recorded, give them in the environment"
            )
    return tree


def _secret_in(value: Any, place: str) -> str | None:
    """Return where in a value the first URL with credentials is, or None; the URL itself is not to be shown."""
    if isinstance(value, str):
        return place if SECRET.search(value) else None
    parts = [(f".{name}", each) for name, each in value.items()] if isinstance(value, dict) else []
    parts += (
        [(f"[{number}]", each) for number, each in enumerate(value)]
        if isinstance(value, list)
        else []
    )
    found = (_secret_in(each, place + part) for part, each in parts)
    return next((each for each in found if each is not None), None)


def _read(path: Path, below: tuple[Path, ...]) -> dict[str, Any]:
    if path.resolve() in below:
        raise CallerError(f"{path.name} extends itself")
    try:
        tree = tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise CallerError(f"{path} is not TOML: {error}") from None
    except OSError as error:
        raise CallerError(f"cannot read {path}: {error.strerror}") from None
    extends = tree.pop("extends", None)
    if extends is None:
        return tree
    if not isinstance(extends, str):
        raise CallerError(f"{path.name}: extends = {extends!r}: must be the name of a recipe")
    beside = path.parent / extends
    return _merged(
        _read(beside if beside.is_file() else find_recipe(extends), (*below, path.resolve())), tree
    )


def _merged(under: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    tree = dict(under)
    for name, value in over.items():
        old = tree.get(name)
        tree[name] = (
            _merged(old, value) if isinstance(old, dict) and isinstance(value, dict) else value
        )
    return tree


def _apply(tree: dict[str, Any], override: str) -> None:
    name, equals, text = override.partition("=")
    parts = name.strip().split(".")
    if not equals or len(parts) < 2 or not all(parts):
        raise CallerError(f"--set {override}: must look like section.key=value")
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        value = text.strip()  # a bare word is a string
    node = tree
    for part in parts[:-1]:
        node = node.setdefault(part, {})
        if not isinstance(node, dict):
            raise CallerError(f"--set {override}: {part} is a value, not a section")
    node[parts[-1]] = value


def validated(tree: Mapping[str, Any], model: type[Model], source: str) -> Model:
    """Return the tree as `model`, types strict as in TOML.

    Raises CallerError: one line that names `source`, section, key, value and what is allowed.
    """
    try:
        # As JSON, because there the strict mode lets an array stand for a tuple but no text for a number.
        return model.model_validate_json(json.dumps(tree, default=str), strict=True)
    except ValidationError as error:
        # A key that does not exist is often why another one is missing: name it first.
        found = sorted(
            error.errors(include_url=False), key=lambda each: each["type"] != "extra_forbidden"
        )
    more = f" (and {len(found) - 1} more)" if len(found) > 1 else ""
    raise CallerError(f"{source}: {_complaint(found[0], tree, model)}{more}")


def _complaint(error: Any, tree: Mapping[str, Any], model: type[BaseModel]) -> str:
    section, *keys = _written(error["loc"], tree) or [""]
    place = "".join(f"[{key}]" if isinstance(key, int) else f".{key}" for key in keys).lstrip(".")
    kind, message = (
        error["type"],
        str(error["msg"]).removeprefix("Value error, ").removeprefix("Input "),
    )
    if kind == "extra_forbidden":
        if not keys:
            return (
                f"[{section}]: no such section{_nearest(str(section), model.model_fields, '[{}]')}"
            )
        return f"[{section}] {place}: no such key{_nearest(str(keys[-1]), _fields(model, [section, *keys[:-1]]), '{}')}"
    if kind == "missing":
        return f"[{section}] {place}: must be given"
    if not keys:
        return f"[{section}]: {message}" if section else message
    shown = json.dumps(error["input"], default=str)
    return f"[{section}] {place} = {shown if len(shown) <= 80 else shown[:77] + '...'}: {message}"


def _written(location: Sequence[str | int], tree: Any) -> list[str | int]:
    """Return the location as the recipe has it, without the tags that pydantic puts in for the alternatives of a union."""
    written, here = [], tree
    for part in location:
        if isinstance(here, dict) and part not in here and part != location[-1]:
            continue
        written.append(part)
        here = (
            here[part]
            if isinstance(here, list) and isinstance(part, int)
            else here.get(part)
            if isinstance(here, dict)
            else None
        )
    return written


def _nearest(name: str, known: Iterable[str], form: str) -> str:
    names = list(known)
    near = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    if near:
        return f", did you mean {form.format(near[0])}?"
    return f"; there are {', '.join(form.format(each) for each in names)}" if names else ""


def _fields(model: type[BaseModel], path: Sequence[str | int]) -> list[str]:
    """Return the field names of the sections that may stand at `path`."""
    models = [model]
    for name in path:
        if isinstance(name, str):
            fields = [each.model_fields[name] for each in models if name in each.model_fields]
            models = [found for field in fields for found in _models(field.annotation)]
    return list(dict.fromkeys(name for each in models for name in each.model_fields))


def _models(annotation: Any) -> list[type[BaseModel]]:
    """Return the sections named anywhere in a type: through `X | None`, tuples and unions."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [found for argument in get_args(annotation) for found in _models(argument)]
