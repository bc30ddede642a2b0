"""JSON files of ROOT that have a type: bounded in size, checked where they are read, or refused.

Somebody may have cut, replaced or hand-edited them. What does not fit its type is a StorageError of
one line with the file and the fix. Fields that the type does not know stay, because a newer version
may have written them.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Annotated, Any, Generic, TypeVar

from pydantic import ConfigDict, FailFast, PlainValidator, TypeAdapter, ValidationError

from infra.errors import StorageError
from infra.storage import store
from infra.storage.store import Root

Content = TypeVar("Content")
Item = TypeVar("Item")
OPEN = ConfigDict(extra="allow", strict=True)
"""Config of the types: unknown fields stay, and nothing is converted."""
Listed = Annotated[list[Item], FailFast()]
"""A list of which only the first fault is reported, not a million."""


def _check_texts(value: Any) -> dict[str, str]:
    return _check_values(value, str)


def _check_numbers(value: Any) -> dict[str, int]:
    return _check_values(value, int)


def _check_sections(value: Any) -> dict[str, dict[str, Any] | None]:
    return _check_values(value, dict, type(None))


def _check_values(value: Any, *kinds: type) -> dict[str, Any]:
    """Return an object all of whose values have one of these types. Raises ValueError."""
    names = " or ".join("null" if kind is type(None) else kind.__name__ for kind in kinds)
    if not isinstance(value, dict):
        raise ValueError(f"it is no object with values of type {names}")
    for name, item in value.items():
        if type(item) not in kinds:
            raise ValueError(f"{name[:40]!r} is not of type {names}")
    return value


# pydantic's own check of a dict lists all faults, and has no FailFast.
Texts = Annotated[dict[str, str], PlainValidator(_check_texts)]
Numbers = Annotated[dict[str, int], PlainValidator(_check_numbers)]
Sections = Annotated[dict[str, Any], PlainValidator(_check_sections)]
"""Objects of objects; a section may be null."""


@dataclass(frozen=True)
class JsonKind(Generic[Content]):
    """A kind of JSON file: its type, and what a person does about a file with another content."""

    content: type[Content]
    name: str
    """For messages, with its article: `a manifest`."""
    mend: str
    max_bytes: int

    @cached_property
    def _adapter(self) -> TypeAdapter[Content]:
        return TypeAdapter(self.content)  # at the first use: it takes milliseconds

    def parse(self, data: bytes, where: str) -> Content:
        """Return the content of a file at `where`. Raises StorageError."""
        if len(data) > self.max_bytes:
            raise StorageError(store.too_large(where, self.max_bytes, self.mend))
        try:
            return self._adapter.validate_json(data)
        except ValidationError as error:
            raise StorageError(self._line(error, where)) from None

    def read(self, root: Root, name: str) -> Content | None:
        """Return the content of a file, or None if there is none. Raises StorageError."""
        try:
            data = store.read_bounded(root, name, self.max_bytes, self.mend)
        except (FileNotFoundError, NotADirectoryError):
            return None
        return self.parse(data, store.uri_of(root, name))

    def _line(self, error: ValidationError, where: str) -> str:
        """Return the message for the first fault."""
        fault: Mapping[str, Any] = error.errors(include_url=False, include_input=False)[0]
        reason = str(fault["msg"]).removeprefix("Value error, ")[:200]
        if fault["type"] == "json_invalid":
            return store.not_json(where, reason, self.mend)
        field = ".".join(str(part)[:40] for part in fault["loc"])
        return f"{where} is not {self.name} ({field + ': ' if field else ''}{reason}): {self.mend}"
