"""What is taken down is gone from the next query on, leaves every committed folder, and comes back
in no later run.
"""

import io
import json
import os
import shutil
import tarfile
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from flows.cli.main import main
from flows.ingest import curate, ingest
from flows.ingest.curate import CurateConfig
from flows.live_index import additions, compaction, lineage
from flows.live_index.compaction import compact
from flows.live_index.takedown import blank, by_values, find, take_down, verify
from flows.runs.planning import fault
from indexing.dedup import deduplicate
from infra.errors import CallerError, DataError
from infra.schemas import DROPPED, URLS
from infra.storage import commits, manifests, store
from infra.storage.locks import reader_lock, reading_file
from infra.storage.removal_log import (
    Removals,
    gather,
    read_entries,
    read_removals,
    write_removal,
)
from infra.storage.store import Root, open_root
from tests.helpers.committed_root import committed, index_facts, write_root
from tests.helpers.evaluation_run import (
    HOSTILE,
    direction,
    encode_images,
    encode_texts,
    usual_rows,
    write_run,
)
from tests.helpers.manifest_facts import FACTS
from training.sections.preprocessing import WHOLE

TWICE = 2  # of usual_rows(); the first is all black, which curate leaves out


@pytest.fixture
def root(tmp_path: Path) -> Root:
    return write_root(tmp_path)


def take(root: Root, key: str) -> dict:
    return take_down(root, find(root, by_values("key", [key])), {"keys": [key]})


def keys_of(root: Root, query: int = 5) -> list[str]:
    view, _ = lineage.open_view(root, None)
    return [hit.facts["key"] for hit in view.search(direction(query), 48)]


def test_a_sample_is_gone_from_the_next_query_on(root: Root) -> None:
    first = keys_of(root)[0]
    take(root, first)
    assert first not in keys_of(root) and len(keys_of(root)) == 47


def test_an_entry_names_the_models_that_trained_on_the_sample_and_no_others(root: Root) -> None:
    rows = usual_rows()
    trained = next(row["key"] for row in rows if row["split"] == "train")
    unseen = next(row["key"] for row in rows if row["split"] == "held_out_style")
    assert [each["stage"] for each in take(root, trained)["trained_into"]] == ["clip"]
    assert take(root, unseen)["trained_into"] == []


def test_compaction_takes_the_bytes_out_of_every_folder_and_all_others_stay(root: Root) -> None:
    row = pq.read_table(committed(root, "curate").local_folder / "keep.parquet").to_pylist()[7]
    others = {hit for hit in keys_of(root) if hit != row["key"]}
    tar = committed(root, "ingest").local_folder / "shards" / "00000.tar"
    content = tar.read_bytes()[row["offset"] : row["offset"] + row["size_bytes"]]
    before = verify(root, [row])
    assert before == {
        "found_in": {
            "shards": ["ingest/ingest0123456789", "curate/curate0123456789"],
            "embeddings": ["embed/embed0123456789"],
            "index": ["index/index0123456789"],
        },
        "leftovers": [],
        "unreadable": [],
        "trained_into": ["clip/clip0123456789"],
    }
    take(root, row["key"])
    gone = compact(root, print)
    assert set(gone.values()) == {1} and len(gone) == 4
    after = verify(root, [row])
    assert after["found_in"] == {"shards": [], "embeddings": [], "index": []}
    assert after["trained_into"] == ["clip/clip0123456789"], "the model has still seen it"
    assert content not in tar.read_bytes()
    assert index_facts(root)["count"] == 47 and set(keys_of(root)) == others
    for stage in ("ingest", "curate", "embed", "index"):
        assert manifests.verify(committed(root, stage)) == []
    assert compact(root, print) == {}, "a second time finds nothing"


def test_after_compaction_the_chain_is_current_and_only_models_are_made_again(root: Root) -> None:
    take(root, keys_of(root)[0])
    compact(root, print)
    faults = {
        stage: fault(
            committed(root, stage),
            [committed(root, name) for name in committed(root, stage).manifest["inputs"]],
        )
        for stage in ("curate", "clip", "embed", "index")
    }
    assert faults == {
        "curate": "",
        "clip": "curate was made again with another result",
        "embed": "",
        "index": "",
    }


def test_other_pictures_keep_their_places_and_readers_skip_the_blank(root: Root) -> None:
    table = pq.read_table(committed(root, "curate").local_folder / "keep.parquet").to_pylist()
    take(root, table[3]["key"])
    compact(root, print)
    tar = committed(root, "ingest").local_folder / "shards" / "00000.tar"
    with tarfile.open(tar) as opened:
        names = [member.name for member in opened if member.isreg()]
    assert names == [row["member"] for row in table if row["key"] != table[3]["key"]]
    judged = curate.run(
        CurateConfig(held_out_concept_fraction=0.3, min_side_px=1),
        committed(root, "ingest").files,
        tar.parent.parent.parent / "out",
    )
    assert judged["in"] == 47
    for row in table[4:6]:
        data = tar.read_bytes()[row["offset"] : row["offset"] + row["size_bytes"]]
        assert cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR).shape == (20, 20, 3)


def second_night(
    root: Root, key: str, download: str, caption: str = "a mirror"
) -> tuple[str, bytes]:
    """Commit an ingest that holds picture TWICE again, from a mirror, and what curate makes of it;
    return its tar and the bytes.
    """
    first = pq.read_table(committed(root, "curate").local_folder / "keep.parquet").to_pylist()[
        TWICE
    ]
    before = committed(root, "ingest").local_folder
    content = (before / "shards" / "00000.tar").read_bytes()[
        first["offset"] : first["offset"] + first["size_bytes"]
    ]
    out = root.scratch / "aside" / key
    shutil.copytree(before, out)
    (out / "manifest.json").unlink()
    shard = pq.read_table(out / "shards" / "00000.parquet")
    mirror = shard.to_pylist()[TWICE] | {
        "key": "900000000",
        "sample": f"{key}-mirror",
        "origin": "https://mirror.example.org/0",
        "url": "https://mirror.example.org/0",
        "captions": [caption],
        "sha256": download or shard["sha256"][TWICE].as_py(),
    }
    pq.write_table(
        pa.Table.from_pylist([*shard.to_pylist(), mirror], shard.schema),
        out / "shards" / "00000.parquet",
    )
    urls = pq.read_table(out / "urls.parquet").to_pylist()
    told = {name: mirror[name] for name in URLS.names} | {"key": mirror["sample"]}
    pq.write_table(pa.Table.from_pylist([*urls, told], URLS), out / "urls.parquet")
    with tarfile.open(out / "shards" / "00000.tar", "a") as tar:
        member = tarfile.TarInfo("900000000.png")
        member.size = len(content)
        tar.addfile(member, io.BytesIO(content))
    facts = FACTS | {"started": manifests.now()}
    ingest_made = commits.commit(root, "ingest", key, out, facts)
    counts = curate.run(CurateConfig(min_side_px=1), ingest_made.files, out, read_removals(root))
    inputs = {"inputs": {"ingest": key}, "input_digests": {"ingest": ingest_made.digest}}
    commits.commit(root, "curate", key, out, facts | inputs | {"counts": counts})
    return str(ingest_made.local_folder / "shards" / "00000.tar"), content


@pytest.mark.parametrize(("download", "caption"), [("f" * 64, "a mirror"), ("", "x")])
@pytest.mark.parametrize("asked", ["A", "its twin"])
def test_an_equal_picture_that_curate_left_out_goes_along(
    root: Root, asked: str, download: str, caption: str
) -> None:
    """Known by the stored bytes (another download), and where curate had another reason to leave it
    out by the download's.
    """
    tar, content = second_night(root, "night2", download, caption)
    kept = pq.read_table(manifests.find(root, "curate", "night2").local_folder / "keep.parquet")[
        "key"
    ].to_pylist()  # type: ignore[union-attr]
    first = usual_rows()[TWICE]
    assert first["key"] in kept and "night2-mirror" not in kept
    assert Path(tar).read_bytes().count(content) == 2
    take(root, first["key"] if asked == "A" else "night2-mirror")
    for key in (first["key"], "night2-mirror"):
        assert (
            "ingest/night2"
            in verify(root, find(root, by_values("key", [key])))["found_in"]["shards"]
        )
    compact(root, print)
    assert content not in Path(tar).read_bytes() and first["key"] not in keys_of(root)
    for url in (first["origin"], "https://mirror.example.org/0"):
        assert verify(root, [], [url])["found_in"] == {"shards": [], "embeddings": [], "index": []}
    assert manifests.verify(manifests.find(root, "ingest", "night2")) == []  # type: ignore[arg-type]


@pytest.mark.parametrize("download", ["f" * 64, ""])
def test_an_equal_picture_that_comes_after_the_take_down_does_not_stay(
    root: Root, download: str
) -> None:
    first = usual_rows()[TWICE]
    take(root, first["key"])
    tar, content = second_night(root, "night2", download)
    dropped = pq.read_table(
        manifests.find(root, "curate", "night2").local_folder / "dropped.parquet"
    ).to_pylist()  # type: ignore[union-attr]
    assert {row["key"] for row in dropped if row["reason"] == "removed"} == {
        first["key"],
        "night2-mirror",
    }
    proof = verify(root, [{"key": first["key"]}])
    assert "ingest/night2" in proof["found_in"]["shards"]
    compact(root, print)
    assert content not in Path(tar).read_bytes() and "night2-mirror" in read_removals(root).keys
    assert verify(root, [{"key": first["key"]}])["found_in"] == {
        "shards": [],
        "embeddings": [],
        "index": [],
    }
    assert compact(root, print) == {} and len(read_entries(root)) == 3, (
        "the take-down, what came later, what the lists were trained into"
    )


def commit_dedup(root: Root) -> tuple[str, str]:
    """Commit a dedup folder in which one picture has gone for another; return the keys of both, the
    one that stays first.
    """
    embed, out = committed(root, "embed"), root.scratch / "aside" / "dedup"
    out.mkdir(parents=True)
    table = pq.read_table(embed.local_folder / "metadata" / "metadata_0000.parquet")
    keys = table["key"].to_pylist()
    is_kept = np.array([key != keys[4] for key in keys])
    deduplicate.write_keepers(embed.local_folder, out, is_kept)
    row = {"key": keys[4], "keeper": keys[5], "reason": "alike", "score": 0.9}
    pq.write_table(pa.Table.from_pylist([row], deduplicate.GROUPS), out / "groups.parquet")
    (out / "threshold.json").write_text("{}")
    (out / "groups.png").write_bytes(b"both pictures")
    inputs = {name: committed(root, name) for name in ("ingest", "clip", "embed")}
    told = (
        {name: each.key for name, each in inputs.items()},
        {name: each.digest for name, each in inputs.items()},
    )
    facts = FACTS | {"inputs": told[0], "input_digests": told[1], "started": manifests.now()}
    commits.commit(root, "dedup", "dedup0123456789", out, facts)
    return keys[5], keys[4]


def test_what_dedup_keeps_and_what_it_left_out_leave_its_folder_too(root: Root) -> None:
    keeper, copy = commit_dedup(root)
    for key in (copy, keeper):
        take(root, key)
        assert (
            "dedup/dedup0123456789"
            in verify(root, find(root, by_values("key", [key])))["found_in"]["embeddings"]
        )
        assert compact(root, print)["dedup/dedup0123456789"] == 1
        assert verify(root, [{"key": key}])["found_in"] == {
            "shards": [],
            "embeddings": [],
            "index": [],
        }
    folder = committed(root, "dedup").local_folder
    assert (
        pq.read_table(folder / "groups.parquet").num_rows == 0
        and not (folder / "groups.png").exists()
    )
    tables = [
        pq.read_table(folder / name)["key"].to_pylist()
        for name in ("keep.parquet", "metadata/metadata_0000.parquet")
    ]
    assert (
        tables[0] == tables[1]
        and len(tables[0]) == 46 == json.loads((folder / "facts.json").read_text())["count"]
    )
    assert (
        len(np.load(folder / "img_emb" / "img_emb_0000.npy"))
        == len(np.load(folder / "text_emb" / "text_emb_0000.npy"))
        == 46
    )
    assert (
        fault(
            committed(root, "dedup"),
            [committed(root, name) for name in ("ingest", "clip", "embed")],
        )
        == ""
    )


def test_a_model_that_is_committed_between_take_down_and_compaction_or_after_both_is_named(
    root: Root,
) -> None:
    """It was being trained while the sample was taken down: the entry of the take-down cannot know
    it.
    """
    key = next(row["key"] for row in usual_rows() if row["split"] == "train")
    started = manifests.now()

    def commit_model(stage: str, started: str) -> None:
        out = root.scratch / "aside" / stage
        out.mkdir(parents=True)
        (out / "weights.safetensors").write_bytes(stage.encode())
        facts = FACTS | {"inputs": {"curate": "curate0123456789"}, "started": started}
        commits.commit(root, stage, f"{stage}0123456789", out, facts)

    take(root, key)
    commit_model("upsampler", started)
    compact(root, print)
    commit_model("upsampler_2", started)
    commit_model("decoder", manifests.now())
    proof = verify(root, [{"key": key}])
    assert proof["trained_into"] == [
        "clip/clip0123456789",
        "upsampler/upsampler0123456789",
        "upsampler_2/upsampler_20123456789",
    ]
    unseen = next(row["key"] for row in usual_rows() if row["split"] == "held_out_style")
    take(root, unseen)
    compact(root, print)
    assert verify(root, [{"key": unseen}])["trained_into"] == []


def test_search_opens_at_every_moment_of_a_compaction(
    root: Root, monkeypatch: pytest.MonkeyPatch
) -> None:
    gone = keys_of(root)[0]
    take(root, gone)
    replace, agree = compaction._replace, compaction._agree
    opened: list[int] = []

    def look() -> None:
        opened.append(len(keys_of(root)))

    def replace_and_look(*given: Any) -> int:
        count = replace(*given)
        look()
        return count

    monkeypatch.setattr(compaction, "_replace", replace_and_look)
    monkeypatch.setattr(compaction, "_agree", lambda root: (look(), agree(root), look()))
    compact(root, print)
    assert opened == [47] * 6


def test_compaction_waits_for_a_stage_that_reads_what_it_would_change(root: Root) -> None:
    """A training that reads pictures by SHA-256 would stop at the first one that is blanked under
    it.
    """
    take(root, keys_of(root)[0])
    tar = committed(root, "ingest").local_folder / "shards" / "00000.tar"
    before, said = tar.read_bytes(), []
    with reader_lock(reading_file(root.scratch, "ingest", "ingest0123456789"), "ingest", print):
        waiting = threading.Thread(target=compact, args=(root, said.append))
        waiting.start()
        limit = time.monotonic() + 60
        while not said and time.monotonic() < limit:
            time.sleep(0.05)
        assert len(said) == 1 and said[0].startswith(
            f"ingest/ingest0123456789 is being read by another run (process {os.getpid()} "
        )
        assert tar.read_bytes() == before
    waiting.join(timeout=60)
    assert tar.read_bytes() != before


def test_files_beside_the_folders_of_stages_are_no_folders(root: Root) -> None:
    store.write_json(root, "jobs/clip-0123.json", {"attempt": 1})
    store.write_json(root, "models/notes.json", {})
    assert (
        take(root, usual_rows()[0]["key"])["trained_into"]
        and manifests.find(root, "models", "notes.json") is None
    )


def test_a_blanked_tar_of_img2datasets_form_still_reads(tmp_path: Path) -> None:
    tar = tmp_path / "00000.tar"
    with tarfile.open(tar, "w", format=tarfile.PAX_FORMAT) as opened:
        for number in range(4):
            for suffix in ("json", "png", "txt"):
                file = tmp_path / f"{number:08d}.{suffix}"
                file.write_bytes(f"secret {number} {suffix}".encode() * 100)
                opened.add(file, file.name)  # a fractional mtime makes an extended header
    before = tar.read_bytes()
    blank(tar, ["00000001.json", "00000001.png", "00000001.txt"])
    with tarfile.open(tar) as opened:
        assert [m.name for m in opened if m.isreg()] == [
            f"{n:08d}.{s}" for n in (0, 2, 3) for s in ("json", "png", "txt")
        ]
    assert (
        b"secret 1" in before
        and b"secret 1" not in tar.read_bytes()
        and len(before) == tar.stat().st_size
    )
    assert b"secret 2" in tar.read_bytes()


def test_ingest_does_not_download_and_curate_does_not_keep_what_was_taken_down(
    root: Root, tmp_path: Path
) -> None:
    rows = pq.read_table(committed(root, "curate").local_folder / "keep.parquet").to_pylist()
    removals = Removals(
        frozenset({rows[0]["key"]}),
        frozenset({"https://cdn.example.org/5"}),
        frozenset({rows[9]["sha256"]}),
    )
    counts = curate.run(
        CurateConfig(min_side_px=1),
        committed(root, "ingest").files,
        tmp_path / "curated",
        removals,
    )
    dropped = pq.read_table(tmp_path / "curated" / "dropped.parquet").to_pylist()
    assert Counter(row["reason"] for row in dropped) == {"removed": 2} and counts["dropped"] == {
        "removed": 2
    }
    assert {row["key"] for row in dropped} == {rows[0]["key"], rows[9]["key"]}
    table = tmp_path / "table"
    table.mkdir()
    source = pq.read_table(committed(root, "ingest").local_folder / "urls.parquet")
    pq.write_table(source, table / "urls.parquet")
    pq.write_table(pa.Table.from_pylist([], DROPPED), table / "dropped.parquet")
    ingest.leave_out(table, removals)
    assert pq.read_table(table / "dropped.parquet")["key"].to_pylist() == [
        rows[0]["key"],
        rows[5]["key"],
    ]
    left = pq.read_table(table / "urls.parquet")
    assert left.schema == URLS and left.num_rows == 46


def test_a_log_that_does_not_read_stops_rather_than_letting_things_come_back(root: Root) -> None:
    write_removal(root, {"keys": ["a"], "origins": [], "sha256": []}, manifests.now())
    assert read_removals(root).keys == {"a"}
    store.write_json(root, "removals/2.json", {"keys": "a"})
    with pytest.raises(DataError, match=r"removals/2\.json is not an entry"):
        read_entries(root)


def test_manifests_are_read_again_only_where_a_folder_has_changed(
    root: Root, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reads = []
    read_now = lineage.segments_stamp
    monkeypatch.setattr(
        lineage, "segments_stamp", lambda *given: reads.append(given) or read_now(*given)
    )
    monkeypatch.setattr(lineage, "GRAIN_NS", 0)
    stamp = lineage.SegmentsStamp(root, "drawn")
    first = stamp()
    assert stamp() == stamp() == first and len(reads) == 1
    take(root, keys_of(root)[0])
    assert stamp() == first and len(reads) <= 2, "the removal log is another's business"
    compact(root, print)
    compacted = stamp()
    assert compacted != first and stamp() == compacted and len(reads) <= 3
    write_run(
        tmp_path / "more", [each | {"key": f"new{each['number']}"} for each in usual_rows()[:2]]
    )
    facts = json.loads((tmp_path / "more" / "embed" / "facts.json").read_text()) | {
        "clip_key": "clip0123456789"
    }
    (tmp_path / "more" / "embed" / "facts.json").write_text(json.dumps(facts))
    view, known = lineage.open_view(root, None)
    additions.add(root, known, view, tmp_path / "more" / "embed", "")
    assert stamp() != compacted


def test_an_index_of_another_clip_is_refused(root: Root) -> None:
    path = "clip/clip0123456789/manifest.json"
    store.write_json(root, path, {**store.read_json(root, path), "digest": "0" * 64})
    with pytest.raises(CallerError, match="made by another CLIP"):
        lineage.open_view(root, None)


@pytest.fixture
def drawn_clip(monkeypatch: pytest.MonkeyPatch) -> None:
    from training.jobs import embed

    monkeypatch.setattr(embed, "encoders", lambda _: (encode_texts, encode_images, 20))
    monkeypatch.setattr(embed, "read_look", lambda _: WHOLE)


def pictures(folder: Path) -> Path:
    folder.mkdir()
    for number in (2, 3):
        picture = np.full((40, 30, 3), 250, np.uint8)
        picture[:, :, number % 3] = 7 * number
        cv2.imwrite(str(folder / f"{number}.png"), picture)
        (folder / f"{number}.txt").write_text(f"colour {number} {HOSTILE if number == 3 else ''}")
    return folder


def test_added_pictures_are_found_once_with_thumbnail_and_can_be_taken_down(
    root: Root, tmp_path: Path, drawn_clip: None
) -> None:
    from indexing.data.images import read_picture

    source = pictures(tmp_path / "pictures")
    view, known = lineage.open_view(root, None)
    addition, reasons = additions.add(root, known, view, source, "CC0")
    assert addition and reasons == {"added": 2, "removed": 0, "already_there": 0}
    view, known = lineage.open_view(root, None)
    assert view.count == 50
    added = [hit for hit in view.search(direction(2), 50) if hit.segment == 1]
    assert sorted(hit.facts["caption"].split()[1] for hit in added) == ["2", "3"]
    assert read_picture(added[0].facts, view.segments[1].shards, 256).shape == (256, 256, 3)
    assert additions.add(root, known, view, source, "CC0") == (
        None,
        {"added": 0, "removed": 0, "already_there": 2},
    )

    take(root, added[0].facts["key"])
    assert added[0].facts["key"] not in keys_of(root)
    view, known = lineage.open_view(root, None)
    assert compact(root, print) == {f"additions/{addition.key}": 1}
    take(root, added[1].facts["key"])
    compact(root, print)
    assert store.list_names(root, "additions") == []
    view, known = lineage.open_view(root, None)
    assert additions.add(root, known, view, source, "CC0")[1] == {
        "added": 0,
        "removed": 2,
        "already_there": 0,
    }, "it stays down"


def test_files_that_do_not_read_are_counted_and_the_rest_is_added(
    root: Root, tmp_path: Path, drawn_clip: None
) -> None:
    source = pictures(tmp_path / "pictures")
    whole = (source / "2.png").read_bytes()
    name = os.fsdecode(b"b\xe4r")
    cv2.imwrite(str(source / "deep.tif"), np.full((40, 30, 3), 30000, np.uint16))
    (source / "deep.txt").write_text("größer", encoding="utf-16")
    (source / f"{name}.png").write_bytes(whole)
    (source / "._2.png").write_bytes(b"\0\5\x16\7")
    (source / "cut.png").write_bytes(whole[:-40])
    (source / "page.jpg").write_bytes(b"<html>")
    (source / "new.heic").write_bytes(b"heic")
    (source / "latin.png").write_bytes(whole)
    (source / "latin.txt").write_bytes("größer".encode("latin-1"))
    view, known = lineage.open_view(root, None)
    said: list[str] = []
    addition, reasons = additions.add(root, known, view, source, "CC0", said.append)
    assert reasons == {
        "added": 4,
        "removed": 0,
        "already_there": 0,
        "hidden_file": 1,
        "decode_error": 1,
        "not_an_image": 1,
        "unknown_format": 1,
        "caption_not_text": 1,
    }
    assert addition and sum(addition.manifest["counts"]["dropped"].values()) == 5
    assert len(said) == 5 and any("page.jpg: not_an_image" in line for line in said)
    view, _ = lineage.open_view(root, None)
    added = [hit.facts for hit in view.search(direction(2), 99) if hit.segment == 1]
    assert {facts["caption"] for facts in added} >= {"größer", "b\\xe4r"}
    for path in source.glob("*.png"):
        path.write_bytes(b"<html>")
    (source / "deep.tif").unlink()
    (source / "new.heic").unlink()
    with pytest.raises(CallerError, match=r"none of 7 images .* can be added: .*\._2\.png"):
        additions.add(root, known, view, source, "CC0", said.append)


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
def test_the_first_entry_of_a_list_with_a_byte_order_mark_is_removed(
    root: Root, tmp_path: Path, capsys: pytest.CaptureFixture[str], encoding: str
) -> None:
    (tmp_path / "list.txt").write_text("https://example.org/4-plain\n", encoding=encoding)
    with pytest.raises(SystemExit) as left:
        main(["index", "remove", "--text-file", str(tmp_path / "list.txt"), "--root", root.uri])
    assert left.value.code == 0 and "removed 1:" in capsys.readouterr().out
    with pytest.raises(SystemExit) as left:  # a second time is no mistake
        main(["index", "remove", "--text-file", str(tmp_path / "list.txt"), "--root", root.uri])
    assert left.value.code == 0
    (tmp_path / "list.txt").write_bytes("größer".encode("latin-1"))
    with pytest.raises(SystemExit) as left:
        main(["index", "remove", "--text-file", str(tmp_path / "list.txt"), "--root", root.uri])
    assert left.value.code == 2 and "list.txt" in capsys.readouterr().err


def test_a_url_is_taken_down_in_every_spelling(
    root: Root, capsys: pytest.CaptureFixture[str]
) -> None:
    url = "HTTPS://u:secret@EXAMPLE.org.:443/x/../4-plain"
    with pytest.raises(SystemExit) as left:
        main(["index", "remove", "--url", url, "--root", root.uri])
    printed = capsys.readouterr()
    [entry] = read_entries(root)
    assert left.value.code == 0 and "removed 1:" in printed.out
    assert entry["origins"] == ["https://example.org/4-plain"]
    assert "secret" not in json.dumps(entry) + printed.out + printed.err


def test_rows_that_an_older_release_recorded_are_matched_in_canonical_form() -> None:
    old = pa.table({"origin": ["HTTP://PICS.test./a", "http://pics.test/b", "folder:a"]})
    is_meant = by_values("origin", ["http://u@pics.test/x/../a"])
    assert is_meant(old).to_pylist() == [True, False, False]
    log = gather([{"keys": [], "origins": ["HTTP://PICS.test./b"], "sha256": []}])
    assert log.mask({"origin": old["origin"]}).to_pylist() == [False, True, False]


def test_embeddings_of_another_clip_are_not_added(root: Root, tmp_path: Path) -> None:
    view, known = lineage.open_view(root, None)
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "facts.json").write_text(
        json.dumps({"clip_key": "other", "count": 1, "dim": 16})
    )
    with pytest.raises(CallerError, match="was embedded by CLIP other"):
        additions.add(root, known, view, tmp_path / "foreign", "")
    (tmp_path / "empty").mkdir()
    with pytest.raises(CallerError, match="neither embeddings"):
        additions.add(root, known, view, tmp_path / "empty", "")


def test_the_command_line_removes_by_url_and_proves_it(
    root: Root, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def unclip(*arguments: str) -> dict:
        with pytest.raises(SystemExit) as left:
            main([*arguments, "--root", root.uri, "--json"])
        assert left.value.code == 0
        return json.loads(capsys.readouterr().out)

    url = "https://example.org/4-plain"
    key = unclip("index", "remove", "--url", url, "--dry-run")["removed"]
    assert read_entries(root) == []
    assert unclip("index", "remove", "--url", url) == {
        "removed": key,
        "urls": [url],
        "trained_into": ["clip/clip0123456789"],
    }
    assert len(unclip("index", "compact")["rows"]) == 4
    proof = unclip("index", "verify", "--url", url)
    assert proof["found_in"] == {"shards": [], "embeddings": [], "index": []} and proof[
        "trained_into"
    ] == ["clip/clip0123456789"]
    assert proof["leftovers"] == proof["unreadable"] == []
    captions = tmp_path / "list.txt"
    captions.write_text(
        "# to go\ncolour 6\nhttps://cdn.example.org/0\nhttps://nowhere.example.org/x\n"
    )
    before = len(read_entries(root))
    for missing in (
        ["--text-file", str(captions)],
        ["--key", "0" * 16],
        ["--url", "http://x.test/"],
    ):
        with pytest.raises(SystemExit) as left:
            main(["index", "remove", *missing, "--root", root.uri])
        assert left.value.code == 2 and "no sample in ROOT matches" in capsys.readouterr().err
    assert len(read_entries(root)) == before
    removed = unclip("index", "remove", "--text-file", str(captions), "--missing-ok")
    assert len(removed["removed"]) == 3 + 1, (
        "three drawings of colour 6, and the one that was downloaded from there"
    )
    assert "https://nowhere.example.org/x" in read_removals(open_root(root.uri)).origins, (
        "what is not here yet does not come either"
    )
