"""What is current is skipped, what is stale says why, and a run that is killed or has no space
loses nothing committed.
"""

import hashlib
import os
import pickle
import random
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import pytest

from flows.orchestration.run_stage import run_stage
from flows.runs.planning import plan, with_needs
from flows.runs.stage import Stage, StageJob, inputs_of, key_of
from infra.compute.cluster import Cluster, ClusterConfig
from infra.errors import CallerError, StorageError
from infra.storage import commits, manifests, store
from infra.storage.locks import is_being_read, reading_file
from infra.storage.stage_files import FolderFiles, StageFiles, pinned_copy
from infra.storage.store import Root
from tests.helpers import fake_stages, forked_processes
from tests.helpers.fake_stages import FAKES, FakeConfig, FakeSection, run_all, write_chunks
from tests.helpers.manifest_facts import FACTS
from tests.infra.storage.test_store import full_disk  # noqa: F401

HERE = Path(__file__).parents[3]


@pytest.fixture
def root(tmp_path: Path) -> Root:
    """An empty local ROOT."""
    return store.open_root(str(tmp_path / "root"))


def states(
    root: Root, config: FakeConfig, stages: tuple[Stage, ...] = FAKES
) -> dict[str, tuple[str, str]]:
    """Return state and reason of every stage."""
    return {each.stage.name: (each.state, each.why) for each in plan(root, config, stages)}


def file_hashes(folder: Path) -> dict[str, str]:
    """Return the checksum of every file below a folder, unfinished work left out."""
    kept = (
        path
        for path in folder.rglob("*")
        if path.is_file() and path.relative_to(folder).parts[0] not in ("work", "logs", "runs")
    )
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in kept
    }


def test_a_second_run_does_nothing(root: Root) -> None:
    assert {state for state, _ in states(root, FakeConfig()).values()} == {"missing"}
    first = run_all(root, FakeConfig())
    before = file_hashes(Path(root.uri))
    second = run_all(root, FakeConfig())
    assert {each.state for each in first.values()} == {"ran"} and {
        each.state for each in second.values()
    } == {"current"}
    assert file_hashes(Path(root.uri)) == before and {
        state for state, _ in states(root, FakeConfig()).values()
    } == {"current"}


def test_a_changed_key_makes_its_stage_and_all_behind_it_stale_and_says_why(root: Root) -> None:
    run_all(root, FakeConfig())
    changed = FakeConfig(clip=FakeSection(word="b"))
    assert states(root, changed) == {
        "data": ("current", ""),
        "clip": ("stale", "[clip] word: 'a' -> 'b'"),
        "embed": ("stale", "clip changed"),
        "prior": ("stale", "embed changed"),
    }
    results = run_all(root, changed)
    assert [results[name].state for name in ("data", "clip", "embed", "prior")] == [
        "current",
        "ran",
        "ran",
        "ran",
    ]
    assert {state for state, _ in states(root, FakeConfig()).values()} == {
        "current"
    }  # the old keys are still there


def test_a_key_outside_the_content_key_makes_nothing_stale(root: Root) -> None:
    run_all(root, FakeConfig())
    slower = FakeConfig(clip=FakeSection(seconds=0.1), cluster=ClusterConfig(num_cpus=7))
    assert {state for state, _ in states(root, slower).values()} == {"current"}


def test_a_raised_code_version_makes_its_stage_stale(root: Root) -> None:
    run_all(root, FakeConfig())
    newer = (FAKES[0], replace(FAKES[1], version=2), *FAKES[2:])
    assert states(root, FakeConfig(), newer)["clip"] == ("stale", "code version 1 -> 2")


def test_a_file_that_is_gone_or_cut_makes_the_stage_again_under_the_same_key(root: Root) -> None:
    first = run_all(root, FakeConfig())
    file = pinned_copy(first["clip"].committed.files) / "parts" / "03.bin"
    for harm in (file.unlink, lambda: os.truncate(file, 10)):
        harm()
        why = states(root, FakeConfig())["clip"][1]
        assert why in ("parts/03.bin is missing", "parts/03.bin has 10 bytes, not 96,000")
        again = run_all(root, FakeConfig())
        assert again["clip"].key == first["clip"].key and again["clip"].state == "ran"
        assert manifests.verify(again["clip"].committed) == []
        # It came out the same, so what was made from it still stands.
        assert again["embed"].state == again["prior"].state == "current"


def test_a_stage_keeps_compaction_away_from_its_inputs_and_from_what_it_takes_over_and_sees_them_as_they_are(  # noqa: E501
    root: Root,
) -> None:
    first = run_all(root, FakeConfig())
    seen: list[tuple[bool, ...]] = []

    def look(job: StageJob) -> dict[str, object]:
        assert job.previous
        read = (*job.inputs.values(), job.previous)
        seen.append(
            tuple(is_being_read(reading_file(root.scratch, each.stage, each.key)) for each in read)
        )
        seen.append(
            tuple(
                each.manifest == manifests.find(root, each.stage, each.key).manifest
                for each in read
            )
        )  # type: ignore[union-attr]
        return write_chunks(job)

    name = f"clip/{first['clip'].key}/manifest.json"
    store.write_json(
        root, name, {**first["clip"].committed.manifest, "compacted": "since the run has begun"}
    )
    stages = {stage.name: stage for stage in FAKES}
    inputs = {name: first[name].committed for name in ("data", "clip")}
    run_stage(
        replace(stages["embed"], version=2, run=look),
        root,
        FakeConfig(),
        inputs,
        Cluster(ClusterConfig()),
        print,
    )
    assert seen == [(True,) * 3] * 2
    assert not any(
        is_being_read(reading_file(root.scratch, each.stage, each.key)) for each in inputs.values()
    )


def test_a_stage_made_again_with_another_result_makes_those_behind_it_again(root: Root) -> None:
    run_all(root, FakeConfig())
    before = file_hashes(Path(root.uri) / "embed")
    store.remove(root, "clip")

    def other_weights(job: StageJob) -> dict[str, object]:
        counts = write_chunks(job)
        (job.out / "parts" / "00.bin").write_bytes(b"trained again, came out otherwise")
        return counts

    stages = (FAKES[0], replace(FAKES[1], run=other_weights), *FAKES[2:])
    assert states(root, FakeConfig(), stages)["embed"] == ("stale", "clip will be made again")
    results = run_all(root, FakeConfig(), stages)
    assert [results[name].state for name in ("data", "clip", "embed", "prior")] == [
        "current",
        "ran",
        "ran",
        "ran",
    ]
    assert (
        file_hashes(Path(root.uri) / "embed").keys() == before.keys()
        and file_hashes(Path(root.uri) / "embed") != before
    )
    assert {state for state, _ in states(root, FakeConfig(), stages).values()} == {"current"}


def test_a_stage_runs_with_what_it_needs_and_an_unknown_one_is_named() -> None:
    assert [stage.name for stage in with_needs(["embed"], FAKES)] == ["data", "clip", "embed"]
    with pytest.raises(
        CallerError, match="there is no stage embbed: choose from data, clip, embed, prior"
    ):
        with_needs(["embbed"], FAKES)


def test_a_stage_that_fails_commits_nothing_and_goes_on_from_its_work_folder(root: Root) -> None:
    def fails(job: StageJob) -> dict[str, object]:
        write_chunks(job)
        raise RuntimeError("the cable was pulled")

    with pytest.raises(RuntimeError, match="cable"):
        run_all(root, FakeConfig(), (replace(FAKES[0], run=fails),))
    assert states(root, FakeConfig())["data"] == ("missing", "")
    result = run_all(root, FakeConfig())["data"]
    assert result.committed.manifest["counts"]["resumed"] == 12
    assert (
        not (root.scratch / "data" / result.key).exists()
        and list((root.scratch / "aside").iterdir()) == []
    )


@pytest.mark.parametrize("is_local", [True, False])
def test_parts_that_a_killed_attempt_recorded_are_committed_with_what_the_next_one_makes(
    tmp_path: Path, is_local: bool
) -> None:
    uri = str(tmp_path / "root") if is_local else f"memory://parts-{tmp_path.name}"
    root = store.open_root(uri, None if is_local else tmp_path / "scratch")
    made: list[str] = []

    def in_parts(job: StageJob) -> dict[str, object]:
        output = pickle.loads(pickle.dumps(job.output))  # as a task on another node gets it
        for part in sorted({"0", "1", "2"} - output.finished_parts().keys()):
            with output.temporary_folder() as folder:
                (folder / "file").write_text(f"part {part}")
                entry = output.put(folder / "file", f"shards/{part}")
                output.put(written(folder / "log", "of no part"), f"logs/{part}")
            output.record(part, [entry], {"rows": 1})
            made.append(part)
            if made == ["0", "1"]:
                raise ConnectionResetError("the node is gone")
        (job.out / "urls").write_text("all")
        return {"in": 3, "out": 3, "dropped": {}}

    stage = Stage("parts", (), (), 1, in_parts)
    with pytest.raises(ConnectionResetError):
        run_all(root, FakeConfig(), (stage,))
    assert states(root, FakeConfig(), (stage,))["parts"] == ("missing", "")
    committed = run_all(root, FakeConfig(), (stage,))["parts"].committed
    assert made == ["0", "1", "2"]
    assert committed.files.names() == ["shards/0", "shards/1", "shards/2", "urls"] or is_local
    assert {file["path"] for file in committed.manifest["files"]} == {
        "shards/0",
        "shards/1",
        "shards/2",
        "urls",
    }
    assert manifests.verify(committed) == []
    with committed.files.open("shards/1") as file:
        assert file.read() == b"part 1"
    assert store.list_names(root, "work/parts") == []


def written(file: Path, text: str) -> Path:
    file.write_text(text)
    return file


def test_a_manifest_holds_what_lineage_needs(root: Root) -> None:
    manifest = run_all(root, FakeConfig())["embed"].committed.manifest
    assert (
        manifest["inputs"].keys() == {"data", "clip"} and manifest["config"]["clip"]["word"] == "a"
    )
    assert (
        manifest["counts"] == {"in": 12, "out": 12, "dropped": {}, "resumed": 0}
        and manifest["stage_version"] == 1
    )
    assert manifest["started"] < manifest["finished"] and manifest["packages"].keys() >= {
        "python",
        "numpy",
        "torch",
    }
    assert all(file.keys() == {"path", "bytes", "sha256"} for file in manifest["files"])


def test_stages_run_the_same_on_an_object_store(tmp_path: Path) -> None:
    root = store.open_root(f"memory://bucket-{tmp_path.name}", tmp_path / "scratch")
    local = store.open_root(str(tmp_path / "root"))
    there, here = run_all(root, FakeConfig()), run_all(local, FakeConfig())
    assert [there[name].committed.digest for name in there] == [
        here[name].committed.digest for name in here
    ]
    assert {each.state for each in run_all(root, FakeConfig()).values()} == {"current"}


def test_a_full_disk_is_one_line_and_nothing_committed_is_lost(full_disk: Path) -> None:  # noqa: F811
    root = store.open_root(str(full_disk))
    seen = {}

    def fills(job: StageJob) -> dict[str, object]:
        seen["before"] = file_hashes(full_disk)
        for index in range(100):
            (job.out / f"{index}.bin").write_bytes(b"x" * 100_000)
        return {"in": 0, "out": 0, "dropped": {}}

    def writes_one(job: StageJob) -> dict[str, object]:
        (job.out / "a").write_bytes(b"x")
        return {"in": 1, "out": 1, "dropped": {}}

    small = Stage("small", (), (), 1, writes_one)
    big = Stage("big", ("small",), (), 1, fills)
    with pytest.raises(
        StorageError,
        match=r"no space left to write .*/aside/big-.*free some space and run the same command "
        r"again",
    ):
        run_all(root, FakeConfig(), (small, big))
    assert file_hashes(full_disk) == seen["before"]
    assert states(root, FakeConfig(), (small, big)) == {
        "small": ("current", ""),
        "big": ("missing", ""),
    }
    freed = replace(big, run=small.run)
    assert (
        run_all(root, FakeConfig(), (small, freed))["big"].state == "ran"
    )  # what the full disk left aside is gone first


def fake_run(folder: Path, *more: str) -> int | None:
    """Run the fake stages in a process of their own and return its exit code, -9 when it was
    killed.
    """
    return forked_processes.alone(fake_stages.main, folder, 0.0, list(more))


def assert_whole(folder: Path) -> dict[str, str]:
    """Check that every committed folder is whole and return the checksums of what is committed."""
    root = store.open_root(str(folder), for_writing=False)
    hashes = file_hashes(folder)
    for name in hashes:
        stage, key = name.split("/")[:2]
        committed = manifests.find(root, stage, key)
        assert committed and manifests.verify(committed) == [], f"{stage}/{key} is half a folder"
    return hashes


@pytest.mark.slow
def test_a_run_killed_at_any_file_operation_loses_nothing_and_mixes_nothing(tmp_path: Path) -> None:
    whole = store.open_root(str(tmp_path / "whole"))
    assert fake_run(tmp_path / "whole", "--count") == 0
    operations = int((tmp_path / "whole" / "operations").read_text())
    assert operations > 150
    chance, committed_at_kill = random.Random(0), set()
    for number in sorted(chance.sample(range(1, operations), 18)):
        folder = tmp_path / f"killed-{number}"
        assert fake_run(folder, "--kill-at", str(number)) == -signal.SIGKILL
        kept = assert_whole(folder)
        committed_at_kill.add(len(kept) // 13)
        assert fake_run(folder, "--kill-at", str(chance.randrange(1, operations))) in (
            0,
            -signal.SIGKILL,
        )  # and once more
        assert kept.items() <= assert_whole(folder).items()  # nothing committed has changed or gone
        assert fake_run(folder) == 0
        assert kept.items() <= assert_whole(folder).items()
        root = store.open_root(str(folder))
        for stage in FAKES:
            ours, theirs = manifests.newest(root, stage.name), manifests.newest(whole, stage.name)
            assert ours and theirs and (ours.key, ours.digest) == (theirs.key, theirs.digest)
        assert list((folder / "work" / "aside").iterdir()) == []
        for stage in FAKES:
            assert list((folder / "work" / stage.name).iterdir()) == []
    assert committed_at_kill == {0, 1, 2, 3, 4} or committed_at_kill == {
        0,
        1,
        2,
        3,
    }  # the moments lay all over the run


def test_two_runs_at_once_make_each_folder_once(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tests.helpers.fake_stages", str(tmp_path / "root"), "0.5"]
    runs = [
        subprocess.Popen(command, cwd=HERE, stdout=subprocess.PIPE, text=True) for _ in range(3)
    ]
    said = [run.communicate()[0] for run in runs]
    assert [run.returncode for run in runs] == [0, 0, 0]
    assert any("is being made by another run" in each for each in said)
    root = store.open_root(str(tmp_path / "root"))
    for stage in FAKES:
        assert len(store.list_names(root, stage.name)) == 1
        committed = manifests.newest(root, stage.name)
        assert (
            committed
            and committed.manifest["counts"]["resumed"] == 0
            and manifests.verify(committed) == []
        )
    assert list((root.scratch / "aside").iterdir()) == []


def test_a_committed_stage_is_left_when_another_writer_commits_first(root: Root) -> None:
    def slow(job: StageJob) -> dict[str, object]:
        counts = write_chunks(job)
        other = root.scratch / "aside" / "other-machine"
        other.mkdir(parents=True)
        (other / "a").write_text("first")
        commits.commit(root, job.stage, job.key, other, FACTS | {"counts": counts})
        return counts

    with Cluster(ClusterConfig()) as cluster:
        result = run_stage(replace(FAKES[0], run=slow), root, FakeConfig(), {}, cluster, print)
    assert (pinned_copy(result.committed.files) / "a").read_text() == "first" and manifests.verify(
        result.committed
    ) == []


def test_a_wanted_stage_is_an_input_where_the_recipe_has_it_and_changes_no_key_where_not() -> None:
    wanting = Stage("prior", ("embed",), (), 1, writes_nothing, ("dedup",))
    plain = Stage("prior", ("embed",), (), 1, writes_nothing)
    embed, dedup = (
        Stage("embed", (), (), 1, writes_nothing),
        Stage("dedup", ("embed",), (), 1, writes_nothing),
    )
    assert inputs_of(wanting, ("embed",)) == ["embed"] and inputs_of(
        wanting, ("embed", "dedup")
    ) == ["embed", "dedup"]
    assert key_of(wanting, None, {"embed": "e"}) == key_of(plain, None, {"embed": "e"})
    assert [stage.name for stage in with_needs(["prior"], (embed, dedup, wanting))] == [
        "embed",
        "dedup",
        "prior",
    ]
    assert [stage.name for stage in with_needs(["prior"], (embed, wanting))] == ["embed", "prior"]


def writes_nothing(_: StageJob) -> dict[str, Any]:
    return {"in": 0, "out": 0, "dropped": {}}


@pytest.mark.parametrize("stages", [("ingest", "curate"), ("ingest", "curate", "dedup")])
def test_up_samplers_train_on_what_dedup_kept_where_it_is_there(
    stages: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    from flows.evaluation import upsampler_comparison
    from flows.orchestration.stages import STAGES, UPSAMPLERS
    from training.jobs import train

    seen: list[StageFiles] = []
    monkeypatch.setattr(
        train,
        "train_upsampler",
        lambda section, cluster, folders: seen.append(folders.inputs["curate"]) or {},
    )
    monkeypatch.setattr(
        upsampler_comparison,
        "compare",
        lambda stage, output, out, shards, kept: seen.append(kept) or {},
    )
    inputs = {name: SimpleNamespace(files=FolderFiles(Path(name))) for name in stages}
    for stage in (each for each in STAGES if each.name in UPSAMPLERS):
        assert inputs_of(stage, stages) == list(stages)
        config = SimpleNamespace(cluster=None, **dict.fromkeys(UPSAMPLERS))
        stage.run(
            SimpleNamespace(
                stage=stage.name,
                config=config,
                inputs=inputs,
                cluster=MagicMock(),
                out=Path(),
                output=None,
                state=None,
                input_files=lambda name: {name: inputs[name].files},
            )
        )  # type: ignore[arg-type]
    assert seen == [FolderFiles(Path(stages[-1]))] * 4


def test_many_vectors_in_several_files_are_indexed_on_ray_and_few_without(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from flows.orchestration.stages import run_index
    from indexing.ann import index
    from tests.helpers.embed_folders import write_embed

    given: list[Any] = []
    monkeypatch.setattr(index, "SPREAD_FROM", 20)
    monkeypatch.setattr(
        index, "build", lambda config, embed, out, grown_from, spread: given.append(spread) or {}
    )
    for name, count, parts, is_spread in (
        ("few", 19, 2, False),
        ("one", 20, 1, False),
        ("many", 20, 2, True),
    ):
        write_embed(tmp_path / name, count, 8, parts)
        cluster, config = MagicMock(), SimpleNamespace(index=None, cluster="the section")
        inputs = {"embed": SimpleNamespace(files=FolderFiles(tmp_path / name))}
        run_index(
            SimpleNamespace(
                config=config,
                inputs=inputs,
                out=tmp_path,
                cluster=cluster,
                previous=None,
                local_copy=lambda committed: committed.files.folder,
            )
        )  # type: ignore[arg-type]
        assert (given[-1] is not None) == is_spread == cluster.start.called
    assert given[-1].args == ("the section",)
