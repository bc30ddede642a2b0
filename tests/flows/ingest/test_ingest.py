"""Ingest over a real server: every fault is a counted drop, and no way of killing it loses or
doubles an image.
"""

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
from types import SimpleNamespace
from typing import Any

import cv2
import numpy as np
import pyarrow.parquet as pq
import pytest

from flows.ingest import curate, ingest
from flows.ingest.curate import CurateConfig
from flows.sources import url_table as sources
from flows.sources.url_table import DataConfig
from infra.errors import CallerError, DataError, StorageError
from infra.schemas import DROPPED, URLS
from tests.helpers.hostile_server import Server, picture
from tests.helpers.npm_packages import use_fake_npm

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


def workers_of(pid: int) -> list[int]:
    """Return the download processes that are children of a process."""
    return [
        child
        for child in map(
            int, (entry.name for entry in Path("/proc").iterdir() if entry.name.isdigit())
        )
        if parent_of(child) == pid
    ]


def parent_of(pid: int) -> int:
    """Return the parent of a living download process, 0 for any other."""
    try:
        is_worker = b"flows.ingest.shard_worker" in Path(f"/proc/{pid}/cmdline").read_bytes()
        state, parent = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[:2]
    except OSError:
        return 0
    return int(parent) if is_worker and state != "Z" else 0


def wait_until(holds: Any, limit_s: float = 60) -> None:
    deadline = time.monotonic() + limit_s
    while not holds():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.02)


@pytest.fixture(scope="module")
def hostile(
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[tuple[Path, dict[str, Any], Server, str]]:
    """One run over everything that can go wrong: (out folder, counts, server, what was printed)."""
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
        counts = ingest.run(config_for(source), folder / "out", folder / "work")
        yield folder / "out", counts, server, (folder / "work" / "img2dataset.log").read_text()


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


def test_the_terminal_sees_progress_and_the_log_no_error(
    hostile: tuple[Path, dict[str, Any], Server, str],
) -> None:
    assert "Traceback" not in hostile[3]


def test_curate_reads_what_ingest_wrote(
    hostile: tuple[Path, dict[str, Any], Server, str], tmp_path: Path
) -> None:
    counts = curate.run(CurateConfig(held_out_concept_fraction=0), hostile[0], tmp_path)
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
        counts = ingest.run(config, tmp_path / "out", tmp_path / "work")
        assert not server.asked
    assert counts["dropped"] == {
        "host_refused": 1,
        "http_404": 1,
    }  # the second is an SVG that does not render
    assert Counter(Counter(row["caption"] for row in read_shards(tmp_path / "out")).values()) == {
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
            ingest.run(config_for(source, min_success=0.5), tmp_path / "out", tmp_path / "work")
        assert "\n" not in str(caught.value)
        asked = server.asked.total()
        counts = ingest.run(
            config_for(source, min_success=0.1), tmp_path / "out", tmp_path / "work"
        )
        assert (counts["out"], server.asked.total()) == (
            1,
            asked,
        )  # what is known is not asked again


def test_sources_without_a_single_pair_are_one_line(tmp_path: Path) -> None:
    source = write_list(tmp_path / "list.jsonl", [{"url": "http://h/a.png", "caption": ""}] * 2)
    with pytest.raises(DataError, match=r"name no URL with a caption \(empty_caption 2\)"):
        ingest.run(config_for(source), tmp_path / "out", tmp_path / "work")


def test_a_source_that_is_not_there_leaves_no_process_behind(tmp_path: Path) -> None:
    with pytest.raises(CallerError):
        ingest.run(
            config_for({"kind": "folder", "path": str(tmp_path / "nowhere")}),
            tmp_path / "out",
            tmp_path / "work",
        )
    assert workers_of(os.getpid()) == []


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
    feeds = ingest.write_feeds(tmp_path / "urls.parquet", tmp_path / "pass-0", 10, 5)
    assert [(feed.number, feed.rows) for feed in feeds] == [
        (10, 5),
        (11, 5),
        (12, 5),
        (13, 5),
        (14, 3),
    ]
    again = ingest.write_feeds(tmp_path / "urls.parquet", tmp_path / "pass-0", 10, 5)
    assert again == feeds


def long_list(tmp_path: Path, server: Server, count: int = 120) -> DataConfig:
    rows = [{"url": f"{server.base}/good/{n}.png", "caption": str(n)} for n in range(count)]
    return config_for(write_list(tmp_path / "list.jsonl", rows), threads=2, images_per_shard=20)


@pytest.mark.slow
@pytest.mark.parametrize("blow", [signal.SIGKILL, signal.SIGSTOP])
def test_a_killed_or_stuck_worker_is_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, blow: signal.Signals
) -> None:
    monkeypatch.setattr(download_pass, "SILENCE_LIMIT_S", -12)  # 4 s with the settings below
    monkeypatch.setattr(
        download_pass, "START_LIMIT_S", 20
    )  # one of the two may be hit while it starts
    with Server(delay_s=0.05) as server:
        config = long_list(tmp_path, server)
        results: list[dict[str, Any]] = []
        thread = threading.Thread(
            target=lambda: results.append(ingest.run(config, tmp_path / "out", tmp_path / "work"))
        )
        thread.start()
        wait_until(lambda: server.asked.total() >= 30)
        os.kill(workers_of(os.getpid())[0], blow)
        thread.join(timeout=90)
        assert not thread.is_alive()
    assert results[0]["out"] == 120 and results[0]["dropped"] == {}
    assert len(stored(tmp_path / "out")) == 120
    assert workers_of(os.getpid()) == []


def test_a_shard_that_kills_every_worker_ends_the_run_with_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = write_list(
        tmp_path / "list.jsonl", [{"url": "http://127.0.0.1:1/a.png", "caption": "x"}]
    )
    monkeypatch.setattr(
        workers, "WORKER", [sys.executable, "-c", "import sys; sys.stdin.readline()"]
    )
    with pytest.raises(
        DataError,
        match=r"shard 00000 failed 3 times, at last so: the download process died \(details in "
        r".*log\)",
    ):
        ingest.run(config_for(source), tmp_path / "out", tmp_path / "work")


def test_a_full_disk_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = write_list(
        tmp_path / "list.jsonl", [{"url": "http://127.0.0.1:1/a.png", "caption": "x"}]
    )
    says = "import sys; sys.stdin.readline(); print('failed 0 OSError: [Errno 28] No space left on device', flush=True); sys.stdin.readline()"  # noqa: E501
    monkeypatch.setattr(workers, "WORKER", [sys.executable, "-c", says])
    with pytest.raises(StorageError, match="no space left"):
        ingest.run(config_for(source), tmp_path / "out", tmp_path / "work")


POISONED = """
import os
from flows.ingest import shard_worker
fetch_image = shard_worker.fetch_image
def fetch(url, rules):
    if "/poison/" in url:
        os._exit(9)
    return fetch_image(url, rules)
shard_worker.fetch_image = fetch
shard_worker.main()
"""


@pytest.mark.slow
@pytest.mark.timeout(180)
def test_a_row_that_kills_its_process_is_found_and_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(workers, "WORKER", [sys.executable, "-c", POISONED])
    with Server() as server:
        paths = [f"good/{n}.png" for n in range(12)] + ["poison/1.png", "poison/2.png"]
        source = write_list(
            tmp_path / "list.jsonl",
            [{"url": f"{server.base}/{path}", "caption": path} for path in paths],
        )
        counts = ingest.run(config_for(source, processes=1), tmp_path / "out", tmp_path / "work")
    assert counts["out"] == 12 and counts["dropped"] == {"worker_crash": 2}
    dropped = pq.read_table(tmp_path / "out" / "dropped.parquet").to_pylist()
    assert {row["origin"].split("/", 3)[-1] for row in dropped} == {"poison/1.png", "poison/2.png"}


def test_a_host_whose_robots_txt_never_comes_costs_one_wait(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(download_pass, "SILENCE_LIMIT_S", -8)  # 4 s with the settings below
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
        clock = time.monotonic()
        counts = ingest.run(config, tmp_path / "out", tmp_path / "work")
        took_s = time.monotonic() - clock
    assert counts["out"] == 60 and counts["dropped"] == {"timeout": 60}
    assert silent.asked["/robots.txt"] <= 2 * 2 * 2  # of two processes, two tries, in two passes
    assert silent.asked["/good/0.png"] == 0 and took_s < 60 * 0.5


def test_a_slow_host_is_no_stuck_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ten rows of a host that answers every 40 s take longer than a process may be silent; the
    clock is the server's.
    """
    clock_s, reported = [time.monotonic()], threading.Semaphore(1)

    def answer_after_report(path: str) -> None:
        """Let 40 s pass, but only after the process has reported the row before."""
        if path.startswith("/good/"):
            reported.acquire(timeout=60)
            clock_s[0] += 40

    def hear(self: download_pass.Downloads, worker: workers.Worker, line: str) -> None:
        hear_line(self, worker, line)
        if line.startswith("rows "):
            reported.release(int(line.split()[1]))

    hear_line = download_pass.Downloads.handle_message
    monkeypatch.setattr(download_pass.Downloads, "handle_message", hear)
    for module in (download_pass, workers):
        monkeypatch.setattr(
            module, "time", SimpleNamespace(monotonic=lambda: clock_s[0], sleep=time.sleep)
        )
    with Server() as server:
        server.before_answer = answer_after_report
        rows = [{"url": f"{server.base}/good/{n}.png", "caption": str(n)} for n in range(10)]
        config = config_for(
            write_list(tmp_path / "list.jsonl", rows),
            per_host=1,
            processes=1,
            timeout_s=60.0,
            retries=0,
        )
        monkeypatch.setattr(
            download_pass, "SILENCE_LIMIT_S", 60 - 4 * 61
        )  # 60 s with what the timeout adds
        assert ingest.run(config, tmp_path / "out", tmp_path / "work")["out"] == 10
        assert set(server.asked.values()) == {1}


def test_a_shard_made_while_the_network_is_away_is_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(download_pass, "PAUSES_S", (2.0, 2.0, 2.0))
    with Server() as server:
        rows = [{"url": f"{server.base}/good/{n}.png", "caption": str(n)} for n in range(60)]
        config = config_for(write_list(tmp_path / "list.jsonl", rows), retries=0, retry_passes=0)
        server.is_away = True
        results: list[dict[str, Any]] = []
        thread = threading.Thread(
            target=lambda: results.append(ingest.run(config, tmp_path / "out", tmp_path / "work"))
        )
        thread.start()
        wait_until(lambda: server.asked.total() >= 2)
        time.sleep(0.7)
        assert not list((tmp_path / "work" / "shards").glob("[0-9]*"))
        server.is_away = False
        thread.join(timeout=60)
    assert results and results[0]["out"] == 60 and results[0]["dropped"] == {}


def test_hosts_that_stay_away_are_waited_for_a_few_times(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(download_pass, "PAUSES_S", (0.1, 0.1))
    monkeypatch.setattr(download_pass, "MAX_PAUSES", 4)
    with Server() as server:
        paths = [f"dead/{n}.png" for n in range(70)] + [f"good/{n}.png" for n in range(50)]
        source = write_list(
            tmp_path / "list.jsonl",
            [{"url": f"{server.base}/{path}", "caption": path} for path in paths],
        )
        config = config_for(source, retries=0, retry_passes=1, images_per_shard=30, max_passing=0.1)
        counts = ingest.run(config, tmp_path / "out", tmp_path / "work")
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
    counts = ingest.run(config, tmp_path / "out", tmp_path / "work")
    assert set(stored(tmp_path / "out")) == {"a disc"}
    assert counts["dropped"]["host_refused"] + counts["dropped"].get("duplicate_url", 0) == 3


RUN = """
import sys
from pathlib import Path
from flows.ingest import ingest
from flows.sources.url_table import DataConfig
ingest.run(DataConfig.model_validate_json(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3]))
"""


@pytest.mark.slow
def test_a_run_killed_at_random_moments_loses_and_doubles_nothing(tmp_path: Path) -> None:
    """The run gets SIGKILL, its download processes do not: they must end by themselves and leave
    nothing half-made under a final name.
    """
    moments = random.Random(0)
    with Server(delay_s=0.03) as server:
        config = long_list(tmp_path, server)
        shards = tmp_path / "work" / "shards"
        kills = 0
        for attempt in range(12):
            out = tmp_path / f"out-{attempt}"
            run = subprocess.Popen(
                [
                    sys.executable,
                    "-c",
                    RUN,
                    config.model_dump_json(),
                    str(out),
                    str(tmp_path / "work"),
                ]
            )
            before = server.asked.total()
            goal = moments.choice([0, 0, 5, 15, 30, 50])
            start, limit_s = time.monotonic(), moments.uniform(0.2, 2.0) if goal == 0 else 60
            while (
                run.poll() is None
                and server.asked.total() - before < max(goal, 1)
                and time.monotonic() - start < limit_s
            ):
                time.sleep(0.01)
            if run.poll() is not None or kills == 6:
                break
            workers = workers_of(run.pid)
            run.kill()
            run.wait()
            kills += 1
            for tar in shards.glob(
                "*.tar"
            ):  # what stands under a final name is whole at any moment
                with tarfile.open(tar) as opened:
                    assert sum(member.name.endswith(".png") for member in opened) == 20
            wait_until(lambda workers=workers: not any(map(parent_of, workers)), 20)
        assert run.wait(timeout=120) == 0
        assert kills >= 3
        assert set(stored(out)) == {str(n) for n in range(120)}
        finished_once = (
            120 + kills * 2 * 20
        )  # each kill may cost the two shards in the making, no more
        assert server.asked.total() <= finished_once
