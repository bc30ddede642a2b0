"""The content of `runs/<name>.json` and `current.json`: its types, and how it is read."""

from typing import NotRequired

from pydantic import with_config
from typing_extensions import TypedDict

from infra.storage.store import REMOVE, Root
from infra.storage.typed_json import OPEN, JsonKind, Listed, Texts

CURRENT = "current.json"
"""The record of the run that was promoted last, in ROOT."""


@with_config(OPEN)
class Verdict(TypedDict):
    """Whether a report meets one condition."""

    condition: str
    value: float
    limit: float | None
    """None if the condition refers to a current run that does not exist or lacks the figure."""
    holds: bool


@with_config(OPEN)
class RunRecord(TypedDict):
    """The content of `runs/<name>.json`."""

    name: str
    recipe: str
    started: str
    finished: str
    stages: Texts
    """Keys by stage."""
    report: str | None
    """URI of the report."""
    gated: bool
    """Whether the run is used by default only after its promotion."""
    promoted: NotRequired[bool]
    """This and the next two: in `current.json` only."""
    conditions: NotRequired[Listed[Verdict]]
    promoted_at: NotRequired[str]


RECORDS = JsonKind(RunRecord, "the record of a run", REMOVE, max_bytes=1 << 20)
POINTER = JsonKind(
    RunRecord,
    "the record of the promoted run",
    "remove it; the next run that passes its gate writes it again",
    max_bytes=1 << 20,
)


def read_record(root: Root, name: str) -> RunRecord | None:
    """Return the record of the run `name`, or None. Raises StorageError if it is not one."""
    return RECORDS.read(root, f"runs/{name}.json")


def read_current(root: Root) -> RunRecord | None:
    """Return the record of the promoted run, or None. Raises StorageError if it is not one."""
    return POINTER.read(root, CURRENT)
