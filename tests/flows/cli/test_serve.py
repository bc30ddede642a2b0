"""What is served is what the pointer names, opened again only where it changed, without what any
machine has taken down.
"""

import asyncio
import io
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from starlette.testclient import TestClient

from flows.cli import run as run_command
from flows.cli import serve
from flows.cli.serve import as_origin, parts_of
from flows.live_index import additions, lineage
from flows.live_index.compaction import compact
from flows.orchestration.stages import STAGES
from flows.runs.promotion import promote_if_passed
from flows.runs.records import find_run, write_run
from flows.runs.stage import StagePlan
from indexing.ann.index import Index, IndexConfig, build
from indexing.service.app import make_app
from indexing.service.freshness import Freshness
from indexing.service.state import Encoders, ServeConfig, Service
from infra.errors import CallerError, StorageError
from infra.storage import commits, manifests, store
from infra.storage.removal_log import read_entry, write_removal
from infra.storage.stage_files import pinned_copy
from infra.storage.store import Root
from tests.helpers import evaluation_run
from tests.helpers.committed_root import committed, write_root
from tests.helpers.evaluation_run import encode_images, encode_texts, row, usual_rows
from tests.helpers.manifest_facts import FACTS
from tests.helpers.search_service import Fake
from tests.helpers.tiny_run import RECIPE
from training.sections.preprocessing import WHOLE

GATE = ("generation.own >= 0.5",)


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Root:
    monkeypatch.setattr(
        serve,
        "load_encoders",
        lambda known: Encoders(known.fingerprint, encode_texts, encode_images, 20),
    )
    return write_root(tmp_path)


def finish(root: Root, folder: Path, name: str, numbers: range, own: float | None = None) -> None:
    """Commit an index over these concepts as the run `name`, with a report that says `own` where it
    is judged by the gate.
    """
    rows = [row(number, name, "train") for number in numbers]
    evaluation_run.write_run(folder / name, rows)
    made = {stage: committed(root, stage) for stage in ("ingest", "curate", "clip")}

    def commit(stage: str, out: Path, inputs: tuple[str, ...], sections: dict[str, Any]) -> None:
        about = {
            "inputs": {each: made[each].key for each in inputs},
            "input_digests": {each: made[each].digest for each in inputs},
        }
        counts = {"in": len(rows), "out": len(rows), "dropped": {}}
        made[stage] = commits.commit(
            root,
            stage,
            f"{stage}-{name}",
            out,
            FACTS | {"sections": sections, "counts": counts, **about},
        )

    commit("embed", folder / name / "embed", ("ingest", "curate", "clip"), {})
    section = IndexConfig(factory="Flat", queries=4)
    index = folder / name / "index"
    index.mkdir()
    build(section, pinned_copy(made["embed"].files), index)
    commit("index", index, ("embed",), {"index": section.model_dump(mode="json")})
    if own is not None:
        report = folder / name / "report"
        report.mkdir()
        storage_report = f'{{"generation": {{"own": {own}}}}}'
        (report / "report.json").write_text(storage_report)
        commit("evaluate", report, ("index",), {})
    record = write_run(root, name, "drawn", manifests.now(), made, own is not None)
    promote_if_passed(root, GATE, record, made)


@contextmanager
def served(
    root: Root, run: str | None = None, **config: Any
) -> Iterator[tuple[TestClient, Service, list[str]]]:
    told: list[str] = []
    service = Service(parts_of(root, run, False, told.append))
    with TestClient(
        make_app(service, ServeConfig(rate=0, **config), io.StringIO()), base_url="http://localhost"
    ) as client:
        yield client, service, told


def shown(client: TestClient) -> tuple[str, set[str]]:
    """Return the name of what is served, and the styles in it."""
    found = client.post("/search", json={"text": "colour 5", "k": 48}).json()["results"]
    return client.get("/indices-list").json()[0], {each["style"] for each in found}


def test_the_service_follows_the_pointer_and_no_run_that_the_gate_rejected(
    root: Root, tmp_path: Path
) -> None:
    finish(root, tmp_path, "first", range(8), own=0.7)
    with served(root) as (client, service, _):
        assert shown(client) == ("first", {"first"})
        finish(root, tmp_path, "worse", range(8, 16), own=0.2)
        service.refresh()
        assert shown(client) == ("first", {"first"}), "the gate rejected it"
        finish(root, tmp_path, "better", range(4, 12), own=0.9)
        service.refresh()
        assert shown(client) == ("better", {"better"}), "it was promoted, under another name"
        body = {"text": "colour 5", "num_images": 1, "indice_name": "first"}
        assert client.post("/knn-service", json=body).status_code == 200, (
            "who asks by the name that was served before is answered"
        )
        assert client.post("/knn-service", json=body | {"indice_name": "worse"}).status_code == 404
    with served(root, "worse") as (client, *_):
        assert shown(client) == ("worse", {"worse"}), "by name any run can be had"


def test_a_run_of_the_same_name_that_is_not_promoted_is_not_served(
    root: Root, tmp_path: Path
) -> None:
    finish(root, tmp_path, "nightly", range(8), own=0.7)
    with served(root) as (client, service, _):
        rejected = store.read_json(root, "runs/drawn.json")
        store.write_json(
            root, "runs/nightly.json", {**rejected, "name": "nightly"}
        )  # last night's, which the gate did not let by
        service.refresh()
        assert shown(client) == ("nightly", {"nightly"})


def test_without_a_gate_the_run_that_finished_last_is_served(root: Root, tmp_path: Path) -> None:
    with served(root) as (client, service, _):
        assert shown(client)[0] == "drawn"
        finish(root, tmp_path, "second", range(8))
        service.refresh()
        assert shown(client) == ("second", {"second"})


def test_a_first_run_that_its_gate_rejects_is_no_ones_default(root: Root, tmp_path: Path) -> None:
    (root.folder / "runs" / "drawn.json").unlink()  # type: ignore[operator]
    finish(root, tmp_path, "first", range(8), own=0.1)
    with pytest.raises(CallerError, match=r"has passed its gate.*--run first"):
        find_run(root)
    assert find_run(root, "first")["name"] == "first"


def test_only_what_changed_is_opened_again(
    root: Root, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened, loaded = [], []
    really = Index.open.__func__  # type: ignore[attr-defined]
    monkeypatch.setattr(
        Index,
        "open",
        classmethod(lambda cls, folder: opened.append(folder.parent.name) or really(cls, folder)),
    )

    def load(known: lineage.Lineage) -> Encoders:
        loaded.append(known.fingerprint)
        return Encoders(known.fingerprint, encode_texts, encode_images, 20)

    monkeypatch.setattr(serve, "load_encoders", load)
    with served(root) as (client, service, _):
        before = service.version
        add_two(root, tmp_path)
        opened.clear()
        service.refresh()
        after = service.version
        assert opened == ["additions"] and len(loaded) == 1
        assert (
            after.view.segments[0] is before.view.segments[0] and after.encoders is before.encoders
        )
        assert (after.view.count, after.view.version != before.view.version) == (50, True)
        assert client.get("/healthz").json()["version"] == after.view.version


def add_two(root: Root, folder: Path) -> None:
    evaluation_run.write_run(folder / "more", [row(number, "added", "train") for number in (2, 3)])
    facts = folder / "more" / "embed" / "facts.json"
    facts.write_text(facts.read_text().replace('"abc"', '"clip0123456789"'))
    view, known = lineage.open_view(root, None)
    additions.add(root, known, view, folder / "more" / "embed", "")


def test_an_addition_of_another_clip_is_named_with_the_mend(root: Root, tmp_path: Path) -> None:
    add_two(root, tmp_path)
    (addition,) = store.list_names(root, "additions")
    path = f"additions/{addition}/manifest.json"
    store.write_json(root, path, {**store.read_json(root, path), "clip_digest": "0" * 64})
    with served(root) as (_, service, told):
        (root.folder / "additions" / "touched").mkdir()  # type: ignore[operator]
        service.refresh()
        assert service.version.view.count == 48
        (line,) = told
        assert (
            f"additions/{addition} (2 samples) is not searched" in line
            and "unclip index add" in line
        )


def test_entries_of_the_removal_log_are_read_once(
    root: Root, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[str] = []
    monkeypatch.setattr(
        lineage, "read_entry", lambda root, name: read.append(name) or read_entry(root, name)
    )
    log = lineage.RemovalLog(root)
    names = [
        write_removal(root, {"keys": [key], "origins": [], "sha256": []}, manifests.now())
        for key in "abc"
    ]
    assert log.read().keys == {"a", "b", "c"} and len(read) == 3
    write_removal(root, {"keys": ["d"], "origins": [], "sha256": []}, manifests.now())
    assert log.read().keys == {"a", "b", "c", "d"} and len(read) == 4
    store.remove(root, f"removals/{names[1]}.json")
    assert log.read().keys == {"a", "c", "d"} and len(read) == 4, (
        "an entry that was taken back is out of force"
    )


def test_a_change_of_the_log_is_worked_off_the_event_loop(root: Root) -> None:
    threads: list[threading.Thread] = []
    with served(root) as (client, service, _):
        after = type(service.version.view).after
        key = client.post("/search", json={"text": "colour 5", "k": 1}).json()["results"][0]["key"]

        def slowly(view: Any, removals: Any) -> Any:
            threads.append(threading.current_thread())
            return after(view, removals)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(type(service.version.view), "after", slowly)
            write_removal(root, {"keys": [key], "origins": [], "sha256": []}, manifests.now())
            assert (
                client.post("/search", json={"text": "colour 5", "k": 1}).json()["results"][0][
                    "key"
                ]
                != key
            )
    assert threads and all(
        each.name.startswith(("AnyIO worker", "watch-index")) for each in threads
    ), threads


def test_a_log_that_does_not_read_shows_nothing_rather_than_what_it_names(root: Root) -> None:
    with served(root) as (client, _, told):
        store.write_json(root, "removals/2.json", {"keys": "a"})
        answer = client.post("/search", json={"text": "colour 5"})
        assert answer.status_code == 503 and "removal log cannot be read" in answer.json()["detail"]
        while not told:
            time.sleep(0.01)
        assert (
            "removals/2.json is not an entry" in told[0]
            and client.get("/healthz").status_code == 200
        )
        store.remove(root, "removals/2.json")
        assert client.post("/search", json={"text": "colour 5"}).status_code == 200


def test_on_a_store_what_another_machine_took_down_is_gone_from_the_next_query_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        serve,
        "load_encoders",
        lambda known: Encoders(known.fingerprint, encode_texts, encode_images, 20),
    )
    monkeypatch.setattr("indexing.service.state.POLL_S", 1000)
    root = write_root(tmp_path, uri=f"memory://store-{tmp_path.name}")
    keys = [each["key"] for each in usual_rows()]
    with served(root) as (client, service, told):
        for number, key in enumerate(keys[:5]):
            write_removal(root, {"keys": [key], "origins": [], "sha256": []}, manifests.now())
            answer = client.post("/search", json={"text": "colour 5", "k": 48}).json()
            assert answer["samples"] == 47 - number and key not in {
                each["key"] for each in answer["results"]
            }
        monkeypatch.setattr("indexing.service.freshness.WAIT_S", 0.2)
        really, released = service.parts.check_removals, threading.Event()
        object.__setattr__(service.parts, "check_removals", lambda: released.wait(10) and really())
        started = time.monotonic()
        assert (
            client.post("/search", json={"text": "colour 5"}).status_code == 200
            and time.monotonic() - started < 5
        )
        while not told:
            time.sleep(0.01)
        assert "has not returned the removal log" in told[0]
        released.set()
    with served(root, removal_lag_s=1000) as (client, *_):
        assert client.post("/search", json={"text": "colour 5"}).json()["samples"] == 43
        write_removal(root, {"keys": [keys[9]], "origins": [], "sha256": []}, manifests.now())
        assert client.post("/search", json={"text": "colour 5"}).json()["samples"] == 43, (
            "as old as was allowed"
        )


def test_no_query_is_content_with_a_look_that_began_before_it(tmp_path: Path) -> None:
    fake = Fake(tmp_path)
    service = fake.service()
    began, going = [], threading.Semaphore(0)

    def check() -> None:
        began.append(time.monotonic())
        going.acquire(timeout=10)

    object.__setattr__(service.parts, "check_removals", check)

    async def ask() -> None:
        freshness = Freshness(service, 0)
        first = asyncio.create_task(freshness.version())
        while not began:
            await asyncio.sleep(0.01)
        others = [asyncio.create_task(freshness.version()) for _ in range(5)]
        await asyncio.sleep(0.05)
        going.release()
        await first
        assert not any(each.done() for each in others)
        going.release()
        await asyncio.gather(*others)

    asyncio.run(ask())
    assert len(began) == 2, "those who wait share one check"
    going.release(10)
    service.close()


def test_a_store_that_fails_does_not_stop_the_search(tmp_path: Path) -> None:
    fake = Fake(tmp_path)

    def check() -> None:
        raise StorageError("cannot use s3://bucket: it is down")

    service = fake.service()
    object.__setattr__(service.parts, "check_removals", check)
    with TestClient(
        make_app(service, ServeConfig(rate=0), io.StringIO()), base_url="http://localhost"
    ) as client:
        for _ in range(3):
            assert client.post("/search", json={"text": "colour 5"}).status_code == 200
    assert (
        len(
            [
                line
                for line in fake.reported
                if "answers use its last known entries" in line and "it is down" in line
            ]
        )
        == 1
    )


def test_removal_addition_swap_and_compaction_race_and_every_answer_is_of_one_version(
    root: Root, tmp_path: Path
) -> None:
    keys = [each["key"] for each in usual_rows()]
    problems, answers = [], 0
    gone: dict[str, float] = {}
    known: dict[str, set[str]] = {}
    stop = threading.Event()
    with served(root) as (client, service, told):

        def ask() -> None:
            nonlocal answers
            while not stop.is_set():
                asked = time.monotonic()
                answer = client.post("/search", json={"text": "colour 5", "k": 60})
                if answer.status_code != 200:
                    problems.append(answer.text)
                    continue
                told = answer.json()
                found = {each["key"] for each in told["results"]}
                problems.extend(key for key in found if gone.get(key, asked) < asked)
                problems.extend(
                    ["another answer of one version"]
                    if known.setdefault(told["version"], found) != found
                    else []
                )
                answers += 1

        threads = [threading.Thread(target=ask) for _ in range(3)]
        for each in threads:
            each.start()
        for number in range(6):
            write_removal(
                root, {"keys": [keys[number]], "origins": [], "sha256": []}, manifests.now()
            )
            gone[keys[number]] = time.monotonic()
            if number == 1:
                add_two(root, tmp_path)
            if number == 3:
                compact(root, lambda _: None)
            if number == 4:
                finish(root, tmp_path, "second", range(8))
            service.refresh()
            time.sleep(0.2)
        stop.set()
        for each in threads:
            each.join()
        assert problems == [] and answers > 20 and len(known) >= 6
        assert shown(client)[0] == "second" and not told


@pytest.mark.parametrize(
    "text",
    [
        "*",
        "search.example.org",
        "https://a.example/path",
        "ftp://a.example",
        "https://u:p@a.example",
        "http://a:x",
    ],
)
def test_what_is_no_origin_is_refused(text: str) -> None:
    with pytest.raises(CallerError, match="give scheme, host and port alone"):
        as_origin(text)


def test_an_origin_is_written_as_browsers_send_it() -> None:
    assert [
        as_origin(each)
        for each in ("HTTPS://Search.Example.org:443/", "http://localhost:1235", "http://[::1]:80")
    ] == [
        "https://search.example.org",
        "http://localhost:1235",
        "http://[::1]",
    ]


def test_an_added_picture_is_found_by_its_own_size_and_kept_no_larger(
    root: Root, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from training.jobs import embed

    monkeypatch.setattr(embed, "encoders", lambda _: (encode_texts, encode_images, 20))
    monkeypatch.setattr(embed, "read_look", lambda _: WHOLE)
    folder = tmp_path / "pictures"
    folder.mkdir()
    for name, size in (("small", (30, 40)), ("large", (900, 600))):
        Image.new("RGB", size, (9, 9, 9)).save(folder / f"{name}.png")
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (400, 300), (9, 9, 9)).save(folder / "lying.jpg", exif=exif)
    view, known = lineage.open_view(root, None)
    additions.add(root, known, view, folder, "")
    with served(root) as (client, service, _):
        found = client.post("/search", json={"text": "colour 5", "split": ["added"]}).json()[
            "results"
        ]
        assert {each["caption"]: (each["width_px"], each["height_px"]) for each in found} == {
            "small": (30, 40),
            "large": (900, 600),
            "lying": (300, 400),
        }
        for least, most, right in (
            (300, None, {"large", "lying"}),
            (301, None, {"large"}),
            (0, 300, {"small", "lying"}),
        ):
            asked = {
                "text": "colour 5",
                "split": ["added"],
                "min_side_px": least,
                "max_side_px": most,
            }
            assert {
                each["caption"] for each in client.post("/search", json=asked).json()["results"]
            } == right
        sizes = [
            service.thumbnail(service.version.view, service.version.view.find_key(each["key"]))
            for each in found
        ]  # type: ignore[arg-type]
        shown = {
            each["caption"]: Image.open(io.BytesIO(data)).size
            for each, data in zip(found, sizes, strict=True)
        }
        assert shown == {"small": (40, 40), "large": (256, 256), "lying": (256, 256)}


def test_an_addition_may_take_its_share_of_the_memory(
    root: Root, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    view, _ = lineage.open_view(root, None)
    assert additions.share_of(4 << 30, 48, view) == 2 << 30
    assert additions.share_of(4 << 30, 1, view) == (4 << 30) // 49
    assert additions.share_of(1 << 30, 1, view) == additions.LEAST_BYTES
    assert additions.share_of(1 << 20, 1, view) == 1 << 20
    add_two(root, tmp_path)
    (addition,) = lineage.additions(root)
    assert addition.manifest["sections"]["index"]["memory_bytes"] == additions.share_of(
        2 << 30, 2, view
    )


def test_status_names_additions_that_are_not_searched(
    root: Root, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    add_two(root, tmp_path)
    (addition,) = lineage.additions(root)
    clip = committed(root, "clip")
    assert lineage.unsearched([addition], clip) == []
    store.write_json(
        root, "clip/clip0123456789/manifest.json", {**clip.manifest, "digest": "0" * 64}
    )
    (line,) = lineage.unsearched(lineage.additions(root), committed(root, "clip"))
    assert f"additions/{addition.key} (2 samples)" in line and "clip/clip0123456789" in line
    told: list[str] = []
    plans = [
        StagePlan(
            next(each for each in STAGES if each.name == "clip"),
            clip.key,
            "current",
            "",
            committed(root, "clip"),
        )
    ]
    monkeypatch.setattr("flows.runs.planning.plan", lambda *_: plans)
    monkeypatch.setattr(run_command, "say", told.append)
    run_command.status(str(RECIPE), root.uri)
    assert told == [f"unclip: {line}"]
