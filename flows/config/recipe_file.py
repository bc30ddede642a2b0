"""Reads a TOML recipe into a tree, applies `--set` overrides, and says in one line what a section's
model refuses.

`flows/config/run_config.py` brings the model. A relative path of a source or an opt-out list is
relative to the recipe that names it, in `--set` to the working directory. Reads recipe files only.
"""

import difflib
import json
import re
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar, get_args

from pydantic import BaseModel, ValidationError

from flows.sources.caption_text import NotTextError, decode_text
from infra.errors import CallerError

Model = TypeVar("Model", bound=BaseModel)
SECRET = re.compile(
    r"://[^/?#\s]*@|[?&](x-(amz|goog)-(signature|credential|security-token)|awsaccesskeyid|signature|sig|(access_)?token|api_?key|password)=",
    re.IGNORECASE,
)
"""An URL with a name and a password in it, or a signed one."""
BUILT_IN = Path(__file__).parents[1] / "recipes"


def find_recipe(name: str) -> Path:
    """Return the file of a recipe: a path, or the name of one that comes with us (`quickstart`).
    Raises CallerError.
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
    """Return the recipe's sections as a tree, its `extends` resolved and the overrides
    (`clip.width=256`) applied.

    Raises CallerError, also for an URL that carries credentials: a recipe is kept in every
    manifest, in jobs and in Prefect's parameters.
    """
    tree = _read(path, ())
    for override in overrides:
        _apply(tree, override)
    for section, value in tree.items():
        secret_key = _secret_in(value, "")
        if secret_key is not None:
            raise CallerError(
                f"{path.name}: [{section}] {secret_key.lstrip('.')} holds credentials (a user, a "
                "password or a signature in an URL): "
                "a recipe is recorded, give them in the environment"
            )
    return tree


def _secret_in(value: Any, key_path: str) -> str | None:
    """Return where in a value the first URL with credentials is, or None; the URL itself is not to
    be shown.
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
        raise CallerError(f"{path.name}: extends = {extends!r}: must be the name of a recipe")
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
    """Return the tree as `model`, types strict as in TOML.

    Raises CallerError: one line that names `source`, section, key, value and what is allowed.
    """
    try:
        # As JSON, because there the strict mode lets an array stand for a tuple but no text for a
        # number.
        return model.model_validate_json(json.dumps(tree, default=str), strict=True)
    except ValidationError as error:
        # A key that does not exist is often why another one is missing: name it first.
        faults = sorted(
            error.errors(include_url=False), key=lambda fault: fault["type"] != "extra_forbidden"
        )
    more = f" (and {len(faults) - 1} more)" if len(faults) > 1 else ""
    raise CallerError(f"{source}: {_complaint(faults[0], tree, model)}{more}")


def _complaint(error: Any, tree: Mapping[str, Any], model: type[BaseModel]) -> str:
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
    """Return the location as the recipe has it, without the tags that pydantic puts in for the
    alternatives of a union.
    """
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


def _nearest(name: str, candidates: Iterable[str], form: str) -> str:
    names = list(candidates)
    near = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    if near:
        return f", did you mean {form.format(near[0])}?"
    return (
        f"; there are {', '.join(form.format(candidate) for candidate in names)}" if names else ""
    )


def _fields(model: type[BaseModel], path: Sequence[str | int]) -> list[str]:
    """Return the field names of the sections that may stand at `path`."""
    models = [model]
    for name in path:
        if isinstance(name, str):
            fields = [model.model_fields[name] for model in models if name in model.model_fields]
            models = [nested for field in fields for nested in _models(field.annotation)]
    return list(dict.fromkeys(name for model in models for name in model.model_fields))


def _models(annotation: Any) -> list[type[BaseModel]]:
    """Return the sections named anywhere in a type: through `X | None`, tuples and unions."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [nested for argument in get_args(annotation) for nested in _models(argument)]
