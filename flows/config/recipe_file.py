"""Recipe files: reads TOML, resolves `extends`, applies `--set` overrides and reports mistakes.

A mistake is one line that names the section and the key. The model of the sections is an argument
(`flows/config/run_config.py` has the real one). A relative path of a source or an opt-out list is
relative to the recipe that names it, in `--set` to the working directory. Reads only recipe files.
"""

import difflib
import json
import re
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar, get_args

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from flows.sources.caption_text import NotTextError, decode_text
from infra.errors import CallerError

Model = TypeVar("Model", bound=BaseModel)
SECRET = re.compile(
    r"://[^/?#\s]*@|[?&](x-(amz|goog)-(signature|credential|security-token)|awsaccesskeyid"
    r"|signature|sig|(access_)?token|api_?key|password)=",
    re.IGNORECASE,
)
"""A URL that holds a user and a password, or a signature."""
BUILT_IN = Path(__file__).parents[1] / "recipes"


def find_recipe(name: str) -> Path:
    """Return the file of a recipe, by its path or by the name of a built-in one (`quickstart`).

    Raises CallerError if there is none.
    """
    file = Path(name)
    if file.is_file():
        return file
    built_in = BUILT_IN / f"{file.stem}.toml"
    if str(file) in (file.stem, built_in.name) and built_in.is_file():
        return built_in
    bundled = sorted(path.stem for path in BUILT_IN.glob("*.toml"))
    raise CallerError(f"there is no recipe {name}: give a TOML file or one of {', '.join(bundled)}")


def read_recipe(path: Path, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """Return the sections of a recipe as nested dicts.

    Resolves `extends` and applies the overrides, such as `clip.width=256`. Raises CallerError for
    a mistake and for a URL with credentials, because recipes are stored in manifests, jobs and
    Prefect's parameters.
    """
    tree = _read(path, ())
    for override in overrides:
        _apply(tree, override)
    for section, value in tree.items():
        secret_key = _secret_in(value, "")
        if secret_key is not None:
            raise CallerError(
                f"{path.name}: [{section}] {secret_key.lstrip('.')} holds credentials (a user, a "
                "password or a signature in a URL): "
                "recipes are recorded, so give credentials in the environment"
            )
    return tree


def _secret_in(value: Any, key_path: str) -> str | None:
    """Return the key path of the first URL with credentials in a value, or None.

    The URL itself must not be printed.
    """
    if isinstance(value, str):
        return key_path if SECRET.search(value) else None
    parts = (
        [(f".{name}", child) for name, child in value.items()] if isinstance(value, dict) else []
    )
    parts += (
        [(f"[{number}]", child) for number, child in enumerate(value)]
        if isinstance(value, list)
        else []
    )
    secrets = (_secret_in(child, key_path + part) for part, child in parts)
    return next((secret for secret in secrets if secret is not None), None)


def _read(path: Path, below: tuple[Path, ...]) -> dict[str, Any]:
    if path.resolve() in below:
        raise CallerError(f"{path.name} extends itself")
    try:
        tree = tomllib.loads(decode_text(path.read_bytes()))
    except (tomllib.TOMLDecodeError, NotTextError) as error:
        raise CallerError(f"{path} is not TOML: {error}") from None
    except OSError as error:
        raise CallerError(f"cannot read {path}: {error.strerror}") from None
    if path.resolve().parent != BUILT_IN.resolve():
        _anchor(tree.get("data"), path.parent.resolve())
    extends = tree.pop("extends", None)
    if extends is None:
        return tree
    if not isinstance(extends, str):
        raise CallerError(f"{path.name}: extends = {extends!r}: it must be the name of a recipe")
    beside = path.parent / extends
    return _merged(
        _read(beside if beside.is_file() else find_recipe(extends), (*below, path.resolve())), tree
    )


def _anchor(data: Any, folder: Path) -> None:
    """Make the relative paths of the sources and opt-out lists in [data] relative to a folder."""
    if not isinstance(data, dict):
        return
    sources = data.get("sources")
    for source in sources if isinstance(sources, list) else ():
        if isinstance(source, dict) and "path" in source:
            source["path"] = _anchored(source["path"], folder)
    lists = data.get("opt_out")
    if isinstance(lists, list):
        data["opt_out"] = [_anchored(path, folder) for path in lists]


def _anchored(path: Any, folder: Path) -> Any:
    is_relative = isinstance(path, str) and path and not path.startswith(("/", "~"))
    return str(folder / path) if is_relative and "://" not in path and "::" not in path else path


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
    """Return the tree as an instance of `model`, with strict types as in TOML.

    Raises CallerError with one line that names `source`, section, key, value and what is allowed.
    """
    try:
        # In JSON the strict mode accepts an array for a tuple, and still no text for a number.
        return model.model_validate_json(json.dumps(tree, default=str), strict=True)
    except ValidationError as error:
        # Report an unknown key first: it is often the misspelled name of a missing one.
        faults = sorted(
            error.errors(include_url=False), key=lambda fault: fault["type"] != "extra_forbidden"
        )
    more = f" (and {len(faults) - 1} more)" if len(faults) > 1 else ""
    raise CallerError(f"{source}: {_complaint(faults[0], tree, model)}{more}")


def _complaint(error: ErrorDetails, tree: Mapping[str, Any], model: type[BaseModel]) -> str:
    section, *keys = _written(error["loc"], tree) or [""]
    dotted = "".join(f"[{key}]" if isinstance(key, int) else f".{key}" for key in keys).lstrip(".")
    kind, message = (
        error["type"],
        str(error["msg"]).removeprefix("Value error, ").removeprefix("Input "),
    )
    if kind == "extra_forbidden":
        if not keys:
            return (
                f"[{section}]: no such section{_nearest(str(section), model.model_fields, '[{}]')}"
            )
        return (
            f"[{section}] {dotted}: no such "
            f"key{_nearest(str(keys[-1]), _fields(model, [section, *keys[:-1]]), '{}')}"
        )
    if kind == "missing":
        return f"[{section}] {dotted}: must be given"
    if not keys:
        return f"[{section}]: {message}" if section else message
    rejected = json.dumps(error["input"], default=str)
    return (
        f"[{section}] {dotted} = {rejected if len(rejected) <= 80 else rejected[:77] + '...'}: "
        f"{message}"
    )


def _written(location: Sequence[str | int], tree: Any) -> list[str | int]:
    """Return an error's location as written in the recipe.

    Drops the tags that pydantic adds for the alternatives of a union.
    """
    written, node = [], tree
    for part in location:
        if isinstance(node, dict) and part not in node and part != location[-1]:
            continue
        written.append(part)
        if isinstance(node, list) and isinstance(part, int):
            node = node[part]
        else:
            node = node.get(part) if isinstance(node, dict) else None
    return written


def _nearest(name: str, candidates: Iterable[str], form: str) -> str:
    names = list(candidates)
    near = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    if near:
        return f", did you mean {form.format(near[0])}?"
    return (
        f"; there are {', '.join(form.format(candidate) for candidate in names)}" if names else ""
    )


def _fields(model: type[BaseModel], path: Sequence[str | int]) -> list[str]:
    """Return the field names of all sections that are possible at `path`."""
    models = [model]
    for name in path:
        if isinstance(name, str):
            fields = [model.model_fields[name] for model in models if name in model.model_fields]
            models = [nested for field in fields for nested in _models(field.annotation)]
    return list(dict.fromkeys(name for model in models for name in model.model_fields))


def _models(annotation: Any) -> list[type[BaseModel]]:
    """Return the sections in a type, also inside `X | None`, tuples and unions."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [nested for argument in get_args(annotation) for nested in _models(argument)]
