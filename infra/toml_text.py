"""Writes values as TOML, which the standard library only reads."""

import json
from collections.abc import Mapping
from typing import Any

from infra.settings import Section


def toml_value(value: Any) -> str:
    """Return a value on one line; a mapping and a section become an inline table.

    Fields of a section that are None are left out: TOML has no null.
    """
    if isinstance(value, Section):
        fields = value.model_dump(mode="json")
        return toml_value({name: field for name, field in fields.items() if field is not None})
    if isinstance(value, Mapping):
        entries = [f"{json.dumps(name)} = {toml_value(entry)}" for name, entry in value.items()]
        return f"{{ {', '.join(entries)} }}" if entries else "{}"
    if isinstance(value, tuple | list):
        return f"[{', '.join(map(toml_value, value))}]"
    # TOML writes scalars as JSON does, but escapes DEL too
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
