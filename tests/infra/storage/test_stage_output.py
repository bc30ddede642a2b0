"""Outputs are put file by file, parts are recorded, and what one process began another goes on."""

import pickle
from pathlib import Path

import pytest

from infra.storage import commits, stage_output, store
from infra.storage.manifest_schema import FileEntry
from infra.storage.stage_output import StageOutput, open_output
from tests.helpers.manifest_facts import FACTS


@pytest.fixture
def output(tmp_path: Path) -> StageOutput:
    return open_output(store.open_root(str(tmp_path / "root")), "embed", "k")


def written(output: StageOutput, text: str) -> Path:
    with output.temporary_folder() as folder:
        file = folder.parent / "file"
        file.write_text(text)
    return file


def test_a_file_that_was_put_is_in_the_output_under_its_name_alone(output: StageOutput) -> None:
    entry = output.put(written(output, "one"), "img_emb/0000.npy")
    assert entry == {
        "path": "img_emb/0000.npy",
        "bytes": 3,
        "sha256": "7692c3ad3540bb803c020b3aee66cd8887123234ea0c6e7143c0add73ff431ed",
    }
    assert (output.folder / entry["path"]).read_text() == "one"
    output.put(written(output, "two"), "img_emb/0000.npy")
    assert (output.folder / entry["path"]).read_text() == "two"
    assert [path.name for path in output.folder.rglob("*") if path.is_file()] == ["0000.npy"]


def test_a_tree_keeps_its_names(output: StageOutput, tmp_path: Path) -> None:
    (tmp_path / "tree" / "deep").mkdir(parents=True)
    (tmp_path / "tree" / "a").write_text("a")
    (tmp_path / "tree" / "deep" / "b").write_text("b")
    entries = output.put_tree(tmp_path / "tree")
    assert [entry["path"] for entry in entries] == ["a", "deep/b"]
    assert (output.folder / "deep" / "b").read_text() == "b"


def test_another_process_finds_what_was_recorded_and_only_that(output: StageOutput) -> None:
    files = [output.put(written(output, "x"), "0.npy")]
    output.record("0000", files, {"rows": 7})
    output.put(written(output, "y"), "1.npy")  # killed before it was recorded
    again = open_output(output.root, "embed", "k")
    assert again.attempt == output.attempt
    assert again.finished_parts() == {"0000": {"files": files, "facts": {"rows": 7}}}
    again.forget("0000")
    assert again.finished_parts() == {}


def test_a_part_whose_file_is_gone_or_cut_is_made_again(output: StageOutput) -> None:
    for part in ("0", "1"):
        output.record(part, [output.put(written(output, "long"), f"{part}.npy")], {})
    assert output.finished_parts().keys() == {"0", "1"}
    (output.folder / "0.npy").write_text("cut")
    assert output.finished_parts().keys() == {"1"}
    (output.folder / "1.npy").unlink()
    assert output.finished_parts() == {}


def test_an_output_travels_between_processes_as_an_address(output: StageOutput) -> None:
    data = pickle.dumps(output)
    assert len(data) < 1000
    arrived = pickle.loads(data)
    arrived.put(written(output, "x"), "0.npy")
    assert (output.folder / "0.npy").exists()


@pytest.mark.parametrize("is_local", [True, False])
def test_a_committed_file_is_copied_without_its_bytes_passing_through_here(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_local: bool
) -> None:
    uri = str(tmp_path / "root") if is_local else f"memory://copied-{tmp_path.name}"
    root = store.open_root(uri, None if is_local else tmp_path / "scratch")
    store.write_bytes(root, "embed/old/a/0.npy", b"old")
    file: FileEntry = {"path": "0.npy", "bytes": 3, "sha256": "of the old manifest"}
    output = open_output(root, "embed", "k")
    with monkeypatch.context() as patch:
        for name in ("upload", "download", "read_bytes"):
            patch.setattr(store, name, None)
        entry = output.copy("embed/old/a/0.npy", file)
    assert {name: entry[name] for name in file} == file  # type: ignore[literal-required]
    with output.open("0.npy") as opened:
        assert opened.read() == b"old"
    if is_local:
        assert (output.folder / "0.npy").samefile(tmp_path / "root" / "embed/old/a/0.npy")
    with pytest.raises(FileNotFoundError):
        output.open("1.npy")


def test_a_closed_output_leaves_nothing(output: StageOutput) -> None:
    output.record("0", [output.put(written(output, "x"), "0")], {})
    stage_output.close_output(output)
    assert not (output.folder.parent).exists()


def test_a_temporary_folder_goes_with_its_block(output: StageOutput) -> None:
    with output.temporary_folder() as folder:
        (folder / "half").write_text("half")
    assert not folder.exists()


def test_an_attempt_in_a_store_knows_when_it_is_committed(tmp_path: Path) -> None:
    root = store.open_root(f"memory://committed-{tmp_path.name}", tmp_path / "scratch")
    output = open_output(root, "embed", "k")
    assert not output.is_committed()
    (tmp_path / "out").mkdir()
    other = commits.commit(root, "embed", "k", tmp_path / "out", FACTS)
    assert not output.is_committed()
    ours = {**other.manifest, "attempt": output.attempt}
    store.write_json(root, "embed/k/manifest.json", ours)
    assert output.is_committed()


@pytest.fixture
def store_output(tmp_path: Path) -> StageOutput:
    root = store.open_root(f"memory://output-{tmp_path.name}", tmp_path / "scratch")
    return open_output(root, "embed", "k")


def test_a_commit_to_a_store_holds_its_files_and_no_others(store_output: StageOutput) -> None:
    files = [store_output.put(written(store_output, "x"), "0.npy")]
    store_output.put(written(store_output, "a picture"), "forgotten.npy")
    commits.commit_output(store_output, files, FACTS)
    names = set(store.file_sizes(store_output.root, ""))
    assert names == {"embed/k/manifest.json", f"{store_output.path}/0.npy"}


def test_an_attempt_that_is_committed_is_not_continued(
    store_output: StageOutput, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = [store_output.put(written(store_output, "x"), "0.npy")]
    store_output.record("0", files, {})
    monkeypatch.setattr(commits, "close_output", lambda output: None)  # killed before it
    commits.commit_output(store_output, files, FACTS)
    again = open_output(store_output.root, "embed", "k")
    assert again.attempt != store_output.attempt and again.finished_parts() == {}
    assert open_output(again.root, "embed", "k").attempt == again.attempt
