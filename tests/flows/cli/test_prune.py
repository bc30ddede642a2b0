"""What no run needs is listed and, when told to, removed; what is named, newest, young, being read
or behind those stays.
"""

import json
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from flows.cli.main import main
from flows.cli.prune import discard, unused
from flows.orchestration.ray_job import claim_name
from flows.runs.record_schema import CURRENT
from infra.storage import commits, manifests, store
from infra.storage.locks import reader_lock, reading_file
from infra.storage.store import Root
from tests.helpers.manifest_facts import FACTS, RECORD

LATER = datetime.now(UTC) + timedelta(days=1)
INPUTS = {
    "ingest": (),
    "curate": ("ingest",),
    "clip": ("ingest", "curate"),
    "embed": ("ingest", "curate", "clip"),
    "index": ("embed",),
}


@pytest.fixture
def root(tmp_path: Path) -> Root:
    """Four nights under one name: only the last is named by a run, night 2 is promoted."""
    root = store.open_root(str(tmp_path / "root"))
    for night in (1, 2, 3, 4):
        for stage, inputs in INPUTS.items():
            commit(root, stage, night, inputs)
    store.write_json(root, "runs/nightly.json", RECORD | {"stages": {"index": "night4"}})
    store.write_json(root, CURRENT, RECORD | {"stages": {"clip": "night2"}})
    return root


def commit(root: Root, stage: str, night: int, inputs: tuple[str, ...]) -> None:
    out = root.scratch / "aside" / f"{stage}{night}"
    out.mkdir(parents=True)
    (out / "a.bin").write_bytes(bytes(1000 * night))
    commits.commit(
        root,
        stage,
        f"night{night}",
        out,
        FACTS | {"inputs": dict.fromkeys(inputs, f"night{night}")},
    )


def names(root: Root, before: datetime = LATER) -> set[str]:
    return {f"{each.stage}/{each.key}" for each in unused(root, before)}


def test_what_no_run_names_is_unused_and_what_a_named_folder_was_made_from_is_not(
    root: Root,
) -> None:
    old = {f"{stage}/night{night}" for stage in INPUTS for night in (1, 3)}
    assert names(root) == old | {"embed/night2", "index/night2"}


def test_the_newest_of_a_stage_stays_though_no_run_names_it_along_with_what_it_was_made_from(
    root: Root,
) -> None:
    store.remove(root, "runs/nightly.json")
    store.remove(root, CURRENT)
    assert {name for name in names(root) if name.endswith("night4")} == set() and len(
        names(root)
    ) == 15
    commit(root, "embed", 5, ("ingest", "curate", "clip"))
    assert "index/night4" not in names(root) and "embed/night4" not in names(root), (
        "the newest index is over it"
    )


def test_what_a_job_has_claimed_or_reads_and_what_is_young_stays(root: Root) -> None:
    store.write_json(
        root,
        claim_name("embed", "night9"),
        {"attempt": 1, "config": {}, "inputs": {"clip": "night1"}},
    )
    assert not {"clip/night1", "curate/night1", "ingest/night1"} & names(
        root
    ) and "embed/night1" in names(root)
    assert names(root, datetime.now(UTC) - timedelta(days=7)) == set()


def test_what_is_being_read_or_named_meanwhile_is_not_removed(root: Root) -> None:
    (folder,) = [
        each for each in unused(root, LATER) if (each.stage, each.key) == ("curate", "night1")
    ]
    with reader_lock(reading_file(root.scratch, "curate", "night1"), "curate", print):
        assert discard(root, folder).startswith("is being read by another run (process ")
    store.write_json(root, "runs/again.json", RECORD | {"stages": {"curate": "night1"}})
    assert discard(root, folder) == "a run names it now" and manifests.find(
        root, "curate", "night1"
    )


def test_the_command_lists_and_only_when_told_removes(
    root: Root, capsys: pytest.CaptureFixture[str]
) -> None:
    def prune(*arguments: str) -> Any:
        with pytest.raises(SystemExit) as left:
            main(["prune", "--root", root.uri, *arguments])
        assert left.value.code == 0
        return capsys.readouterr().out

    assert prune() == "nothing is unused\n", "all of it is young"
    listed = json.loads(prune("--older-than", "0", "--json"))["folders"]
    assert (
        {each["state"] for each in listed} == {"unused"}
        and len(listed) == 12
        and len(names(root)) == 12
    )
    assert prune("--older-than", "0").endswith("MB would be freed: --delete removes them\n")
    removed = json.loads(prune("--older-than", "0", "--delete", "--json"))["folders"]
    assert {each["state"] for each in removed} == {"removed"} and next(
        each["stage"] for each in removed
    ) == "index"
    assert names(root) == set() and not (Path(root.uri) / "clip" / "night1").exists()
    assert manifests.verify(manifests.find(root, "clip", "night2")) == []  # type: ignore[arg-type]
