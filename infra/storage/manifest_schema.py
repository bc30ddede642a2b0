"""The content of `manifest.json`: its types, and how it is read.

The stage folders that the manifests describe are in `infra/storage/manifests.py`. On Python 3.11
pydantic reads only the TypedDict of typing_extensions; a type that joins one of these needs it too.
"""

from typing import Any, NotRequired

from pydantic import with_config
from typing_extensions import TypedDict

from infra.storage.store import REMOVE, Root
from infra.storage.typed_json import OPEN, JsonKind, Listed, Numbers, Sections, Texts

MANIFEST = "manifest.json"


@with_config(OPEN)
class FileEntry(TypedDict):
    """One file of a manifest."""

    path: str
    bytes: int
    sha256: str


SampleCounts = TypedDict("SampleCounts", {"in": int, "out": int, "dropped": Numbers})
"""How many samples a stage read, wrote and dropped by reason."""


class TrainingFigures(TypedDict, total=False):
    """Figures of a stage that trains a model; the first three are those of its last metrics row."""

    images_seen: int
    loss: float
    train_seconds: float
    parameters: int


@with_config(OPEN)
class StageCounts(SampleCounts, TrainingFigures):
    """The counts in a stage's manifest; stages may add figures of their own."""


class StageFacts(TypedDict):
    """The fields of a manifest that the stage's caller gives."""

    stage_version: int
    sections: Sections
    """The config fields that the key depends on, by section; None for a section that is absent."""
    inputs: Texts
    """Keys of the input folders by stage."""
    input_digests: Texts
    counts: StageCounts
    started: str
    config: NotRequired[dict[str, Any]]
    """The whole resolved recipe."""
    compacted_from: NotRequired[Listed[str]]
    """Digests of this folder before each compaction."""
    compacted: NotRequired[str]
    clip_digest: NotRequired[str]
    """Of an addition: digest of the CLIP that embedded it."""
    embeddings: NotRequired[bool]
    """Of an addition: whether it was added as embeddings, without images."""
    merged_from: NotRequired[Listed[str]]
    """Of a merged addition: digests of those that it replaces."""


@with_config(OPEN)
class Manifest(StageFacts):
    """The content of `manifest.json`."""

    stage: str
    key: str
    files: Listed[FileEntry]
    digest: str
    """SHA-256 over the list of files."""
    packages: Texts
    attempt: str
    """Random name of the commit."""
    prefix: str
    """Folder of the files below the manifest's in a store; "" if ROOT is local."""
    finished: str
    supersedes: NotRequired[Listed[str]]
    """Attempts in the store that this commit replaces, until they are removed."""


MANIFESTS = JsonKind(Manifest, "a manifest", f"restore it, or {REMOVE}", max_bytes=64 << 20)
"""The manifest of a stage with 100,000 shards has half of the largest size."""


def read_manifest(root: Root, stage: str, key: str) -> Manifest | None:
    """Return the manifest of a committed folder, or None. Raises StorageError if it is not one."""
    return MANIFESTS.read(root, f"{stage}/{key}/{MANIFEST}")
