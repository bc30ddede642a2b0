"""Ingest over a real server: every fault is a counted drop, and no way of killing it loses or
doubles an image.
"""

import ctypes
import json
import os
import random
import signal
import subprocess
import sys
import tarfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import cv2
import numpy as np
import pyarrow.parquet as pq
import pytest

from flows.ingest import curate, ingest, shard_pass, shard_task
from flows.ingest.curate import CurateConfig
from flows.ingest.shard_task import Attempt, Beat, Feed, download_shard
from flows.sources import url_table as sources
from flows.sources.url_table import DataConfig
from infra.compute.cluster import Cluster
from infra.errors import CallerError, DataError, StorageError, UnclipError
from infra.schemas import DROPPED, URLS
from infra.storage.stage_files import FolderFiles
from infra.storage.stage_output import StageOutput
from tests.helpers.hostile_server import Server, picture
from tests.helpers.local_ingest import local_ingest, output_in
from tests.helpers.npm_packages import use_fake_npm
from tests.infra.storage.test_store import full_disk  # noqa: F401

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("local_ray")]

GOOD = (
    [f"good/{n}.png" for n in range(40)]
    + [f"jpeg/{n}.jpg" for n in range(40, 50)]
    + ["redirect/50.png", "flaky/51.png", "flaky3/52.png"]
)
BAD = {
    "missing/100.png": "http_404",
    "missing/101.png": "http_404",
    "forbidden/102.png": "http_error",
    "html/103.png": "not_an_image",
    "truncated/104.png": "decode_error",
    "truncated_jpeg/105.jpg": "decode_error",
    "bomb/106.png": "too_large",
    "declared_large/107.png": "too_large",
    "endless/108.png": "too_large",
    "slow_body/109.png": "timeout",
    "dead/110.png": "http_unavailable",
    "cut/111.png": "cut_short",
    "noindex/112.png": "robots",
    "to_file/113.png": "host_refused",
}


def write_list(path: Path, rows: list[dict[str, Any]]) -> dict[str, Any]:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {"kind": "urls", "path": str(path)}


def config_for(*sources: dict[str, Any], **changes: Any) -> DataConfig:
    settings = {
        "image_size_px": 32,
        "images_per_shard": 20,
        "processes": 2,
        "threads": 8,
        "timeout_s": 1.0,
        "retries": 1,
        "allow_private": True,
        "max_image_bytes": 500_000,
        **changes,
    }
    return DataConfig.model_validate({"sources": sources, **settings})


def stored(out: Path) -> dict[str, np.ndarray]:
    """Return the pictures of all shards by caption, having checked that tars and parquets tell the
    same.
    """
    pictures: dict[str, np.ndarray] = {}
    names = sorted(path.name for path in (out / "shards").iterdir())
    assert names == sorted(
        f"{stem}{suffix}"
        for stem in {name.split(".")[0] for name in names}
        for suffix in (".parquet", ".tar")
    )
    for shard in sorted((out / "shards").glob("*.tar")):
        told = [
            row["caption"]
            for row in pq.read_table(shard.with_suffix(".parquet")).to_pylist()
            if row["status"] == "success"
        ]
        with tarfile.open(shard) as tar:
            files = {member.name: tar.extractfile(member).read() for member in tar}  # type: ignore[union-attr]
        captions = {
            name[:-4]: data.decode() for name, data in files.items() if name.endswith(".txt")
        }
        assert sorted(captions.values()) == sorted(told)
        for key, caption in captions.items():
            assert caption not in pictures, "stored twice"
            pictures[caption] = cv2.imdecode(
                np.frombuffer(files[f"{key}.png"], np.uint8), cv2.IMREAD_COLOR
            )
    return pictures


def tree(pid: int) -> set[int]:
    """Return a process and all below it."""
    parents: dict[int, int] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                parents[int(entry.name)] = int(
                    (entry / "stat").read_text().rpartition(")")[2].split()[1]
                )
            except OSError:
                continue  # it has just ended
    found = {pid}
    while more := {child for child, parent in parents.items() if parent in found} - found:
        found |= more
    return found


def is_downloading(pid: int) -> bool:
    """Say whether a living process is making a shard."""
    try:
        is_task = b"ray::download_shard" in Path(f"/proc/{pid}/cmdline").read_bytes()
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return is_task and state != "Z"


def workers_of(pid: int) -> list[int]:
    """Return the processes below a process that are making shards."""
    return [child for child in tree(pid) if is_downloading(child)]


def wait_until(holds: Any, limit_s: float = 60) -> None:
    deadline = time.monotonic() + limit_s
    while not holds():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.02)


@pytest.fixture(scope="module")
def hostile(
    tmp_path_factory: pytest.TempPathFactory, local_ray: Cluster
) -> Iterator[tuple[Path, dict[str, Any], Server, str]]:
    """One run over everything that can go wrong: (output, counts, server, what tasks printed)."""
    import ray

    folder = tmp_path_factory.mktemp("hostile")
    with Server() as server:
        rows = [{"url": f"{server.base}/{path}", "caption": path} for path in [*GOOD, *BAD]]
        rows += [
            rows[0],
            {"url": f"{server.base}/good/200.png", "caption": " "},
            {"url": "", "caption": "no url"},
        ]
        rows += [
            {"url": "file:///etc/hostname", "caption": "a file"},
            {"url": "http://127.0.0.1:1/x.png", "caption": "nobody there"},
        ]
        source = write_list(folder / "list.jsonl", rows)
        counts = local_ingest(config_for(source), folder)
        logs = Path(ray._private.worker._global_node.get_session_dir_path()) / "logs"
        printed = [file.read_text() for file in logs.glob("worker-*")]
        assert printed
        yield output_in(folder).folder, counts, server, "".join(printed)


def test_all_good_images_are_stored_and_look_right(
    hostile: tuple[Path, dict[str, Any], Server, str],
) -> None:
    pictures = stored(hostile[0])
    assert set(pictures) == set(GOOD)
    for caption, found in pictures.items():
        number = int("".join(c for c in caption.split("/")[1] if c.isdigit()))
        expected = cv2.resize(picture(number), (32, 32), interpolation=cv2.INTER_AREA)
        assert np.abs(found.astype(int) - expected).mean() < 4


def test_every_fault_is_counted_under_its_reason(
    hostile: tuple[Path, dict[str, Any], Server, str],
) -> None:
    out, counts, _, _ = hostile
    expected = Counter(
        [
            *BAD.values(),
            "duplicate_url",
            "empty_caption",
            "empty_url",
            "host_refused",
            "unreachable",
        ]
    )
    assert counts["dropped"] == expected
    assert counts["out"] == len(GOOD)
    assert counts["in"] == counts["out"] + sum(expected.values())
    dropped = pq.read_table(out / "dropped.parquet")
    assert dropped.schema.equals(DROPPED)
    told = {row["origin"].split("/", 3)[-1]: row["reason"] for row in dropped.to_pylist()}
    assert {path: told[path] for path in BAD} == BAD
    assert all(row["detail"] for row in dropped.to_pylist() if row["reason"] != "empty_url")


def test_what_may_pass_is_asked_again_in_a_later_pass_and_the_rest_is_not(
    hostile: tuple[Path, dict[str, Any], Server, str],
) -> None:
    asked = hostile[2].asked
    assert (
        asked["/missing/100.png"]
        == asked["/forbidden/102.png"]
        == asked["/html/103.png"]
        == asked["/good/0.png"]
        == 1
    )
    assert asked["/flaky/51.png"] == 2  # the second try at once
    assert asked["/flaky3/52.png"] == 4  # two tries in each of two passes
    assert asked["/dead/110.png"] == 4


def test_the_url_table_holds_what_was_asked(
    hostile: tuple[Path, dict[str, Any], Server, str],
) -> None:
    table = pq.read_table(hostile[0] / "urls.parquet")
    assert table.schema.equals(URLS)
    assert table.num_rows == len(GOOD) + len(BAD) + 2


def test_no_task_prints_a_traceback(
    hostile: tuple[Path, dict[str, Any], Server, str],
) -> None:
    assert "Traceback" not in hostile[3]


def test_curate_reads_what_ingest_wrote(
    hostile: tuple[Path, dict[str, Any], Server, str], tmp_path: Path
) -> None:
    counts = curate.run(
        CurateConfig(held_out_concept_fraction=0), FolderFiles(hostile[0]), tmp_path
    )
    assert counts["in"] == len(GOOD) and counts["out"] == len(GOOD)


def test_packages_and_folders_travel_over_loopback_without_leave_for_private_addresses(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_fake_npm(tmp_path / "npm", monkeypatch)
    (tmp_path / "mine").mkdir()
    cv2.imwrite(str(tmp_path / "mine" / "a.png"), picture(1))
    (tmp_path / "mine" / "a.txt").write_text("a disc\n")
    with Server() as server:
        config = config_for(
            {
                "kind": "packages",
                "packages": [
                    "emoji-datasource-google@16.0.0",
                    "@iconify-json/fluent-emoji-flat@1.2.6",
                ],
            },
            {"kind": "folder", "path": str(tmp_path / "mine")},
            write_list(
                tmp_path / "list.jsonl",
                [{"url": f"{server.base}/good/1.png", "caption": "from a private address"}],
            ),
            allow_private=False,
            cache=str(tmp_path / "cache"),
        )
        counts = local_ingest(config, tmp_path)
        assert not server.asked
    assert counts["dropped"] == {
        "host_refused": 1,
        "svg_invalid": 1,
    }
    assert Counter(
        Counter(row["caption"] for row in read_shards(output_in(tmp_path).folder)).values()
    ) == {
        2: 3,
        1: 3,
    }


def read_shards(out: Path) -> list[dict[str, Any]]:
    return [
        row
        for shard in sorted((out / "shards").glob("*.parquet"))
        for row in pq.read_table(shard).to_pylist()
        if row["status"] == "success"
    ]


def test_too_few_images_are_one_line_with_the_commonest_reason_and_an_example(
    tmp_path: Path,
) -> None:
    with Server() as server:
        paths = [*(f"missing/{n}.png" for n in range(8)), "html/1.png", "good/1.png"]
        source = write_list(
            tmp_path / "list.jsonl",
            [{"url": f"{server.base}/{path}", "caption": "x"} for path in paths],
        )
        with pytest.raises(
            DataError,
            match=r"only 1 of 10 URLs became images.*min_success.*mostly http_404 \(8\), such as "
            r"http://",
        ) as caught:
            local_ingest(config_for(source, min_success=0.5), tmp_path)
        assert "\n" not in str(caught.value)
        asked = server.asked.total()
        counts = local_ingest(config_for(source, min_success=0.1), tmp_path)
        assert (counts["out"], server.asked.total()) == (
            1,
            asked,
        )  # what is known is not asked again


def test_sources_without_a_single_pair_are_one_line(tmp_path: Path) -> None:
    source = write_list(tmp_path / "list.jsonl", [{"url": "http://h/a.png", "caption": ""}] * 2)
    with pytest.raises(DataError, match=r"name no URL with a caption \(empty_caption 2\)"):
        local_ingest(config_for(source), tmp_path)


def test_a_source_that_is_not_there_starts_nothing(tmp_path: Path) -> None:
    config = config_for({"kind": "folder", "path": str(tmp_path / "nowhere")})
    cluster, output = MagicMock(), output_in(tmp_path)
    (tmp_path / output.work).mkdir(parents=True)
    with pytest.raises(CallerError):
        ingest.run(config, cluster, output, tmp_path, tmp_path / output.work)
    assert not cluster.start.called


def test_shards_have_equal_counts_whatever_the_blocks_and_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sources, "BLOCK_ROWS", 7)
    lists = [
        write_list(
            tmp_path / f"{name}.jsonl",
            [{"url": f"http://h/{name}{n}.png", "caption": "x"} for n in range(count)],
        )
        for name, count in (("a", 9), ("b", 1), ("c", 13))
    ]
    assert sources.write_url_table(config_for(*lists), tmp_path, tmp_path) == 23
    feeds = list(ingest.read_feeds(tmp_path / "urls.parquet", 10, 5))
    assert [(feed.number, feed.rows) for feed in feeds] == [
        (10, 5),
        (11, 5),
        (12, 5),
        (13, 5),
        (14, 3),
    ]
    some = list(ingest.read_feeds(tmp_path / "urls.parquet", 10, 5, finished={11, 14}))
    assert some == [feeds[0], feeds[2], feeds[3]]


def long_list(tmp_path: Path, server: Server, count: int = 120) -> DataConfig:
    rows = [{"url": f"{server.base}/good/{n}.png", "caption": str(n)} for n in range(count)]
    return config_for(write_list(tmp_path / "list.jsonl", rows), threads=2, images_per_shard=20)


@pytest.mark.slow
@pytest.mark.parametrize("blow", [signal.SIGKILL, signal.SIGSTOP])
def test_a_killed_or_frozen_process_is_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, blow: signal.Signals
) -> None:
    monkeypatch.setattr(shard_pass, "FROZEN_S", 6)
    with Server(delay_s=0.05) as server:
        config = long_list(tmp_path, server)
        results: list[dict[str, Any]] = []
        thread = threading.Thread(target=lambda: results.append(local_ingest(config, tmp_path)))
        thread.start()
        wait_until(lambda: server.asked.total() >= 30)
        os.kill(workers_of(os.getpid())[0], blow)
        thread.join(timeout=90)
        assert not thread.is_alive()
    assert results[0]["out"] == 120 and results[0]["dropped"] == {}
    assert len(stored(output_in(tmp_path).folder)) == 120
    wait_until(lambda: workers_of(os.getpid()) == [])


Made = Iterator[Beat]


def dies(output: StageOutput, feed: Feed, settings: dict[str, Any], attempt: Attempt) -> Made:
    os._exit(9)
    yield


def full(output: StageOutput, feed: Feed, settings: dict[str, Any], attempt: Attempt) -> Made:
    """Have the check after img2dataset, which swallows the error, find a full disk."""
    shard_worker = shard_task._load_worker(1)
    lost = MagicMock(side_effect=OSError(28, os.strerror(28), "00000.tar"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shard_worker, "check_shard", lost)
        yield from download_shard(output, feed, settings, attempt)


def poisoned(output: StageOutput, feed: Feed, settings: dict[str, Any], attempt: Attempt) -> Made:
    """Die of a URL with `/poison/`, and hang in C, holding Python's lock, of one with `/hang/`."""
    shard_worker = shard_task._load_worker(10**8)
    fetch_image = shard_worker.fetch_image

    def fetch(url: str, rules: Any) -> bytes:
        if "/poison/" in url:
            os._exit(9)
        if "/hang/" in url:
            ctypes.PyDLL(None).sleep(1000)
        return fetch_image(url, rules)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shard_worker, "fetch_image", fetch)
        yield from download_shard(output, feed, settings, attempt)


def test_a_shard_that_kills_every_process_ends_the_run_with_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = write_list(
        tmp_path / "list.jsonl", [{"url": "http://127.0.0.1:1/a.png", "caption": "x"}]
    )
    monkeypatch.setattr(shard_task, "download_shard", dies)
    with pytest.raises(
        DataError,
        match=r"shard 00000 failed 3 times, the last time with: the process of its task died "
        r"\(details in .*logs.*\)",
    ):
        local_ingest(config_for(source), tmp_path)


def test_a_full_disk_that_img2dataset_swallows_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = write_list(
        tmp_path / "list.jsonl", [{"url": "http://127.0.0.1:1/a.png", "caption": "x"}]
    )
    monkeypatch.setattr(shard_task, "download_shard", full)
    with pytest.raises(StorageError, match=r"no space left to write .*: free some space"):
        local_ingest(config_for(source), tmp_path)


def test_a_disk_that_is_full_is_one_line(full_disk: Path, tmp_path: Path) -> None:  # noqa: F811
    with Server() as server:
        rows = [{"url": f"{server.base}/good/{n}.png", "caption": str(n)} for n in range(100)]
        config = config_for(
            write_list(tmp_path / "list.jsonl", rows), image_size_px=512, images_per_shard=50
        )
        with pytest.raises(StorageError, match=r"no space left to write .*: free some space"):
            local_ingest(config, full_disk)


def wait_long() -> None:
    time.sleep(600)


def test_a_cluster_that_has_no_room_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import ray

    monkeypatch.setattr(shard_pass, "START_LIMIT_S", 2)
    holds = ray.remote(num_cpus=2)(wait_long).remote()
    time.sleep(1)
    source = write_list(
        tmp_path / "list.jsonl", [{"url": "http://127.0.0.1:1/a.png", "caption": "x"}]
    )
    try:
        with pytest.raises(UnclipError, match="no node has started a download task in 2 s: each"):
            local_ingest(config_for(source), tmp_path)
    finally:
        ray.cancel(holds, force=True)


@pytest.mark.slow
@pytest.mark.timeout(180)
def test_a_row_that_kills_or_blocks_its_process_is_found_and_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shard_task, "download_shard", poisoned)
    monkeypatch.setattr(shard_pass, "SILENCE_LIMIT_S", 5 - 4 * 2 * 2)  # 5 s with the timeouts
    with Server() as server:
        paths = [f"good/{n}.png" for n in range(12)] + ["poison/1.png", "hang/2.png"]
        source = write_list(
            tmp_path / "list.jsonl",
            [{"url": f"{server.base}/{path}", "caption": path} for path in paths],
        )
        counts = local_ingest(config_for(source, processes=1), tmp_path)
    assert counts["out"] == 12 and counts["dropped"] == {"worker_crash": 2}
    dropped = pq.read_table(output_in(tmp_path).folder / "dropped.parquet").to_pylist()
    assert {row["origin"].split("/", 3)[-1] for row in dropped} == {"poison/1.png", "hang/2.png"}


def test_a_host_whose_robots_txt_never_comes_costs_one_wait(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shard_pass, "SILENCE_LIMIT_S", -8)  # 4 s with the settings below
    with Server() as server, Server() as silent:
        silent.is_robots_silent = True
        rows = [{"url": f"{silent.base}/good/{n}.png", "caption": str(n)} for n in range(60)]
        rows += [{"url": f"{server.base}/good/{n}.png", "caption": str(n)} for n in range(60, 120)]
        config = config_for(
            write_list(tmp_path / "list.jsonl", rows),
            timeout_s=0.5,
            images_per_shard=40,
            retry_passes=1,
            max_passing=1,
        )
        counts = local_ingest(config, tmp_path)
    assert counts["out"] == 60 and counts["dropped"] == {"timeout": 60}
    assert silent.asked["/robots.txt"] <= 2 * 2 * 2  # of two processes, two tries, in two passes
    assert silent.asked["/good/0.png"] == 0


def test_a_slow_host_is_no_stuck_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Eight rows of a host that answers one in a second take longer than a task may be silent."""
    monkeypatch.setattr(shard_pass, "SILENCE_LIMIT_S", 5 - 4 * 61)  # 5 s with the timeout
    with Server(delay_s=1) as server:
        rows = [{"url": f"{server.base}/good/{n}.png", "caption": str(n)} for n in range(8)]
        source = write_list(tmp_path / "list.jsonl", rows)
        config = config_for(source, per_host=1, processes=1, timeout_s=60.0, retries=0)
        assert local_ingest(config, tmp_path)["out"] == 8
        assert set(server.asked.values()) == {1}


def test_a_shard_made_while_the_network_is_away_is_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shard_pass, "PAUSES_S", (2.0, 2.0, 2.0))
    with Server() as server:
        rows = [{"url": f"{server.base}/good/{n}.png", "caption": str(n)} for n in range(60)]
        config = config_for(write_list(tmp_path / "list.jsonl", rows), retries=0, retry_passes=0)
        server.is_away = True
        results: list[dict[str, Any]] = []
        thread = threading.Thread(target=lambda: results.append(local_ingest(config, tmp_path)))
        thread.start()
        wait_until(lambda: server.asked.total() >= 2)
        time.sleep(0.7)
        assert not list(output_in(tmp_path).folder.glob("shards/*"))
        server.is_away = False
        thread.join(timeout=60)
    assert results and results[0]["out"] == 60 and results[0]["dropped"] == {}


def test_hosts_that_stay_away_are_waited_for_a_few_times(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shard_pass, "PAUSES_S", (0.1, 0.1))
    monkeypatch.setattr(shard_pass, "MAX_PAUSES", 4)
    with Server() as server:
        paths = [f"dead/{n}.png" for n in range(70)] + [f"good/{n}.png" for n in range(50)]
        source = write_list(
            tmp_path / "list.jsonl",
            [{"url": f"{server.base}/{path}", "caption": path} for path in paths],
        )
        config = config_for(source, retries=0, retry_passes=1, images_per_shard=30, max_passing=0.1)
        counts = local_ingest(config, tmp_path)
    assert counts["out"] == 50 and counts["dropped"] == {"http_unavailable": 70}
    assert (
        max(server.asked[f"/dead/{n}.png"] for n in range(70)) == 2 + 2
    )  # two repeats, and a pass for those that failed
    assert sum(server.asked[f"/dead/{n}.png"] for n in range(70)) <= 70 * 2 + 4 * 2 * 30


def test_a_list_cannot_name_what_is_served_for_other_sources(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    for name in ("a", "secret"):
        cv2.imwrite(str(tmp_path / "mine" / f"{name}.png"), picture(1))
    (tmp_path / "mine" / "a.txt").write_text("a disc\n")
    rows = [
        {"url": f"http://127.0.0.1{port}/mine/secret.png", "caption": "theirs"}
        for port in (":80", "", ":080")
    ]
    folder = {"kind": "folder", "path": str(tmp_path / "mine")}
    config = config_for(folder, write_list(tmp_path / "list.jsonl", rows), allow_private=False)
    counts = local_ingest(config, tmp_path)
    assert set(stored(output_in(tmp_path).folder)) == {"a disc"}
    assert counts["dropped"]["host_refused"] + counts["dropped"].get("duplicate_url", 0) == 3


RUN = """
import sys
from pathlib import Path
from flows.sources.url_table import DataConfig
from tests.helpers.local_ingest import local_ingest
local_ingest(DataConfig.model_validate_json(sys.argv[1]), Path(sys.argv[2]), num_cpus=2)
"""
HERE = Path(__file__).parents[3]


def started(config: DataConfig, folder: Path) -> subprocess.Popen[bytes]:
    """Start an ingest in a process of its own, with a Ray of its own."""
    command = [sys.executable, "-c", RUN, config.model_dump_json(), str(folder)]
    return subprocess.Popen(command, cwd=HERE)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_run_killed_at_random_moments_loses_and_doubles_nothing(tmp_path: Path) -> None:
    """The driver gets SIGKILL, its tasks do not: they must end by themselves and leave nothing
    half-made under a final name.
    """
    moments = random.Random(0)
    with Server(delay_s=0.03) as server:
        config = long_list(tmp_path, server)
        shards = output_in(tmp_path).folder / "shards"
        kills = 0
        while True:
            run = started(config, tmp_path)
            if kills == 2:
                break
            before, goal = server.asked.total(), moments.choice([1, 5, 15, 30])
            wait_until(
                lambda run=run, before=before, goal=goal: (
                    run.poll() is not None or server.asked.total() - before >= goal
                ),
                200,
            )
            assert run.poll() is None
            workers = workers_of(run.pid)
            run.kill()
            run.wait()
            kills += 1
            for tar in shards.glob("*.tar"):  # whole at any moment
                with tarfile.open(tar) as opened:
                    assert sum(member.name.endswith(".png") for member in opened) == 20
            wait_until(lambda workers=workers: not any(map(is_downloading, workers)), 60)
        assert run.wait(timeout=200) == 0
        assert set(stored(output_in(tmp_path).folder)) == {str(n) for n in range(120)}
        # Each kill may cost the two shards in the making, no more.
        pictures = server.asked.total() - server.asked["/robots.txt"]
        assert pictures <= 120 + kills * 2 * 20
