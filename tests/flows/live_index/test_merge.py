"""Additions become one: found as before, with their pictures, at every moment, and compaction knows
the way on from there.
"""

import io
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from starlette.testclient import TestClient

from flows.cli import serve
from flows.cli.main import main
from flows.live_index import additions, lineage, merge
from flows.live_index.compaction import compact
from flows.live_index.takedown import by_values, find, take_down, verify
from indexing.data.images import read_picture
from indexing.service.app import make_app
from indexing.service.state import Encoders, ServeConfig, Service
from infra.storage import manifests, store
from infra.storage.store import Root
from tests.helpers import evaluation_run
from tests.helpers.committed_root import write_root
from tests.helpers.evaluation_run import direction, encode_images, encode_texts, row
from training.sections.preprocessing import WHOLE


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Root:
    """Return a ROOT with three additions: two of pictures, one of embeddings."""
    from training.jobs import embed

    monkeypatch.setattr(embed, "encoders", lambda _: (encode_texts, encode_images, 20))
    monkeypatch.setattr(embed, "read_look", lambda _: WHOLE)
    root = write_root(tmp_path)
    for numbers in ((2, 3), (4,)):
        add_pictures(root, tmp_path / f"pictures-{len(numbers)}", numbers)
    evaluation_run.write_run(
        tmp_path / "more", [row(number, "added", "train") for number in (5, 6)]
    )
    facts = tmp_path / "more" / "embed" / "facts.json"
    facts.write_text(facts.read_text().replace('"abc"', '"clip0123456789"'))
    add(root, tmp_path / "more" / "embed")
    return root


def add(root: Root, folder: Path) -> dict[str, int]:
    view, known = lineage.open_view(root, None)
    return additions.add(root, known, view, folder, "CC0")[1]


def add_pictures(root: Root, folder: Path, numbers: tuple[int, ...]) -> None:
    folder.mkdir()
    for number in numbers:
        picture = np.full((40, 30, 3), 250, np.uint8)
        picture[:, :, number % 3] = 7 * number
        cv2.imwrite(str(folder / f"{number}.png"), picture)
        (folder / f"{number}.txt").write_text(f"added colour {number}")
    assert add(root, folder)["added"] == len(numbers)


def found(root: Root) -> list[tuple[str, float]]:
    """Return what is found of an addition, with scores; each once."""
    view, _ = lineage.open_view(root, None)
    hits = [
        (hit.facts["key"], round(hit.score, 4))
        for hit in view.search(direction(2), view.count)
        if hit.segment
    ]
    assert len(hits) == len({key for key, _ in hits}) == view.count - 48
    return sorted(hits)


def test_what_was_added_is_found_as_before_with_its_pictures_in_one_folder(
    root: Root, tmp_path: Path
) -> None:
    before = found(root)
    assert len(before) == 5
    merged, count = merge.merge(root, None, print)
    assert merged and count == 3 and merged.manifest["counts"]["out"] == 5
    assert manifests.verify(merged) == [] and store.list_names(root, "additions") == [merged.key]
    assert found(root) == before
    view, _ = lineage.open_view(root, None)
    assert len(view.segments) == 2
    hits = [hit for hit in view.search(direction(2), view.count) if hit.segment]
    colours = {
        hit.facts["caption"]: read_picture(hit.facts, view.segments[1].shards, 40)[20, 20].tolist()
        for hit in hits
        if hit.facts["shard"]
    }
    assert colours == {
        "added colour 2": [14, 250, 250],
        "added colour 3": [250, 250, 21],
        "added colour 4": [250, 28, 250],
    }
    assert add(root, tmp_path / "pictures-2") == {"added": 0, "removed": 0, "already_there": 2}
    assert merge.merge(root, None, print) == (None, 1)


def test_a_kill_before_the_old_folders_go_shows_nothing_twice(
    root: Root, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = found(root)
    calls = []

    def die(given: Root) -> None:
        calls.append(given)
        if len(calls) == 2:
            raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(merge, "clear", die)
        with pytest.raises(KeyboardInterrupt):
            merge.merge(root, None, print)
    assert len(store.list_names(root, "additions")) == 4
    assert found(root) == before
    take_down(root, find(root, by_values("key", [before[0][0]])), {})
    assert sum(compact(root, print).values()) == 2, "out of the merged one and the one that is left"
    assert found(root) == before[1:]
    assert merge.merge(root, None, print) == (None, 1)
    assert len(store.list_names(root, "additions")) == 1 and found(root) == before[1:]


def test_a_sample_of_a_merged_addition_can_be_taken_down(root: Root) -> None:
    before = found(root)
    take_down(root, find(root, by_values("key", [before[0][0]])), {})
    merged, _ = merge.merge(root, None, print)
    assert merged and found(root) == before[1:], "what was down already stays unseen"
    take_down(root, find(root, by_values("key", [before[1][0]])), {})
    assert found(root) == before[2:]
    assert compact(root, print) == {f"additions/{merged.key}": 2}
    assert (
        verify(root, [{"key": key, "origin": "", "sha256": ""} for key, _ in before[:2]])[
            "found_in"
        ]["shards"]
        == []
    )
    assert found(root) == before[2:]


def test_the_service_follows_while_it_answers(root: Root, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        serve,
        "load_encoders",
        lambda known: Encoders(known.fingerprint, encode_texts, encode_images, 20),
    )
    service = Service(serve.parts_of(root, None, False, print))
    with TestClient(
        make_app(service, ServeConfig(rate=0), io.StringIO()), base_url="http://localhost"
    ) as client:

        def answer() -> list[tuple[str, str, int]]:
            asked: dict[str, Any] = {"text": "colour 2", "split": ["added"], "k": 10}
            results = client.post("/search", json=asked).json()["results"]
            return [
                (each["key"], each["caption"], client.get(f"/thumbnail/{each['key']}").status_code)
                for each in results
            ]

        before = answer()
        assert {status for *_, status in before} == {200} and len(before) == 3
        merge.merge(root, None, print)
        service.refresh()
        assert answer() == before
        assert len(service.version.view.segments) == 2


def test_the_command_line_merges_and_says_when_there_is_nothing_to(
    root: Root, capsys: pytest.CaptureFixture[str]
) -> None:
    said = []
    for _ in range(2):
        with pytest.raises(SystemExit) as left:
            main(["index", "merge", "--root", root.uri])
        assert left.value.code == 0
        said.append(capsys.readouterr().out)
    assert (
        said[0].startswith("3 additions, 5 samples, are one: additions/")
        and said[1] == "nothing to merge: one addition\n"
    )
