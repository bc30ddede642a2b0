"""The fields of manifests and of run records in tests that are about other things."""

from flows.runs.record_schema import RunRecord
from infra.storage.manifest_schema import StageFacts

FACTS: StageFacts = {
    "stage_version": 1,
    "sections": {},
    "inputs": {},
    "input_digests": {},
    "config": {},
    "counts": {"in": 1, "out": 1, "dropped": {}},
    "started": "2026-11-23T10:00:00.000000Z",
}
RECORD: RunRecord = {
    "name": "nightly",
    "recipe": "nightly.toml",
    "started": "2026-11-23T10:00:00.000000Z",
    "finished": "2026-11-23T11:00:00.000000Z",
    "stages": {},
    "report": None,
    "gated": False,
}
