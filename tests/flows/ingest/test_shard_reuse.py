"""A nightly ingest asks for what is new, takes over the rest as it is, and lets go of what the list
has lost.
"""

import json
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pyarrow.parquet as pq
import pytest

from flows.orchestration.run_stage import run_stage
from flows.orchestration.stages import INGEST_VERSION, run_ingest
from flows.runs.stage import Stage
from flows.sources.url_table import DataConfig
from infra.compute.cluster import Cluster, ClusterConfig
from infra.settings import Section
from infra.storage import store
from infra.storage.manifests import Committed
from infra.storage.stage_output import StageOutput
from tests.flows.ingest.test_ingest import config_for, stored, write_list
from tests.helpers.hostile_server import Server
from tests.helpers.local_ingest import local_ingest, output_in

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("local_ray")]
INGEST = Stage("ingest", (), ("data",), INGEST_VERSION, run_ingest)


class OnlyData(Section):
    """A recipe of one section."""

    data: DataConfig
    cluster: ClusterConfig = ClusterConfig()


@pytest.fixture
def server() -> Iterator[Server]:
    with Server() as running:
        yield running


def rows(server: Server, paths: list[str], licence: str = "") -> list[dict[str, Any]]:
    return [{"url": f"{server.base}/{path}", "caption": path, "licence": licence} for path in paths]


def night(
    root: store.Root, listed: list[dict[str, Any]], folder: Path, **changes: Any
) -> Committed:
    """Run the ingest stage on a list, as a run does."""
    source = write_list(folder / "list.jsonl", listed) | {"licence_column": "licence"}
    config = OnlyData(
        data=config_for(source, retries=0, images_per_shard=10, **{"processes": 1} | changes)
    )
    with Cluster(config.cluster) as cluster:
        return run_stage(INGEST, root, config, {}, cluster, lambda line: None).committed


def test_a_night_asks_only_for_what_is_new_and_ends_as_if_it_had_asked_for_all(
    server: Server, tmp_path: Path
) -> None:
    root = store.open_root(str(tmp_path / "root"))
    first = [f"good/{n}.png" for n in range(30)] + ["missing/90.png", "flaky3/91.png"]
    before = night(root, rows(server, first), tmp_path, retry_passes=0)
    assert before.manifest["counts"]["dropped"] == {"http_404": 1, "http_unavailable": 1}
    server.asked.clear()
    second = [path for path in first if path not in ("good/3.png", "good/4.png")] + [
        f"good/{n}.png" for n in range(40, 47)
    ]
    server.asked["/flaky3/91.png"] = 3  # its server has recovered
    after = night(root, rows(server, second), tmp_path)
    asked = server.asked - type(server.asked)({"/flaky3/91.png": 3, "/robots.txt": 99})
    assert set(asked) == {f"/good/{n}.png" for n in range(40, 47)} | {"/flaky3/91.png"} and set(
        asked.values()
    ) == {1}
    assert (
        after.manifest["counts"]["dropped"] == {"http_404": 1}
        and after.manifest["counts"]["shards_taken_over"] == 4
    )
    pictures = stored(after.local_folder)
    assert set(pictures) == set(second) - {"missing/90.png"} and after.manifest["counts"][
        "out"
    ] == len(pictures)
    fresh = local_ingest(
        config_for(write_list(tmp_path / "all.jsonl", rows(server, second)), images_per_shard=10),
        tmp_path / "fresh",
    )
    assert fresh["out"] == len(pictures)
    found = stored(output_in(tmp_path / "fresh").folder)
    assert {k: v.tobytes() for k, v in found.items()} == {
        k: v.tobytes() for k, v in pictures.items()
    }


def test_what_the_list_has_lost_is_in_no_shard_and_untouched_shards_are_the_same_files(
    server: Server, tmp_path: Path
) -> None:
    root = store.open_root(str(tmp_path / "root"))
    first = [f"good/{n}.png" for n in range(30)]
    before = night(root, rows(server, first), tmp_path)
    after = night(root, rows(server, [path for path in first if path != "good/7.png"]), tmp_path)
    same = [
        old.name
        for old in (before.local_folder / "shards").glob("*.tar")
        if old.stat().st_ino == (after.local_folder / "shards" / old.name).stat().st_ino
    ]
    assert len(same) == 2
    texts = []
    for tar in (after.local_folder / "shards").glob("*.tar"):
        with tarfile.open(tar) as opened:
            texts += [member for member in opened if member.name.endswith(".txt")]
        assert pq.read_table(tar.with_suffix(".parquet")).num_rows in (9, 10)
    assert len(texts) == 29 and "good/7.png" not in stored(after.local_folder)


def test_a_row_of_which_the_list_says_something_else_is_asked_again(
    server: Server, tmp_path: Path
) -> None:
    root = store.open_root(str(tmp_path / "root"))
    night(root, rows(server, ["good/1.png", "good/2.png"]), tmp_path)
    changed = rows(server, ["good/1.png"], "CC0") + rows(server, ["good/2.png"])
    after = night(root, changed, tmp_path)
    assert server.asked["/good/1.png"] == 2 and server.asked["/good/2.png"] == 1
    found = [
        row
        for file in (after.local_folder / "shards").glob("*.parquet")
        for row in pq.read_table(file).to_pylist()
    ]
    assert {row["caption"]: row["licence"] for row in found} == {
        "good/1.png": "CC0",
        "good/2.png": "",
    }


def test_other_settings_or_a_folder_take_nothing_over(server: Server, tmp_path: Path) -> None:
    root = store.open_root(str(tmp_path / "root"))
    night(root, rows(server, ["good/1.png"]), tmp_path)
    assert (
        "shards_taken_over"
        not in night(root, rows(server, ["good/1.png"]), tmp_path, image_size_px=16).manifest[
            "counts"
        ]
    )
    assert server.asked["/good/1.png"] == 2
    pictures = tmp_path / "mine"
    pictures.mkdir()
    for value in (10, 200):  # another picture under the same name
        cv2.imwrite(str(pictures / "a.png"), np.full((32, 32, 3), value, np.uint8))
        (pictures / "a.txt").write_text("mine")
        config = OnlyData(data=config_for({"kind": "folder", "path": str(pictures)}))
        with Cluster(config.cluster) as cluster:
            made = run_stage(INGEST, root, config, {}, cluster, lambda line: None).committed
        assert abs(int(stored(made.local_folder)["mine"].mean()) - value) < 2


def test_a_killed_take_over_is_repeated_and_ends_the_same(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = store.open_root(str(tmp_path / "root"))
    first = [f"good/{n}.png" for n in range(30)]
    night(root, rows(server, first), tmp_path)
    original, calls = StageOutput.copy, []

    def killed(*arguments: Any) -> Any:
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return original(*arguments)

    monkeypatch.setattr(StageOutput, "copy", killed)
    with pytest.raises(KeyboardInterrupt):
        night(root, rows(server, first[1:]), tmp_path)
    after = night(root, rows(server, first[1:]), tmp_path)
    assert (
        set(stored(after.local_folder)) == set(first[1:])
        and max(server.asked[f"/{path}"] for path in first) == 1
    )
    assert json.loads((after.local_folder / "manifest.json").read_text())["counts"]["out"] == 29
