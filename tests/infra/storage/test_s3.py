"""ROOT on a real S3 server: commits that only one writer wins, and the whole pipeline behind a
network that fails now and then.
"""

import json
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from flows.cli.main import main
from flows.config.roots import open_for, scratch_for
from flows.live_index import lineage
from flows.runs.planning import fault
from infra.errors import StorageError
from infra.storage import commits, manifests, retry, store
from infra.storage.stage_files import pinned_copy
from tests.helpers.committed_root import committed, write_root
from tests.helpers.evaluation_run import direction, usual_rows, write_run
from tests.helpers.manifest_facts import FACTS
from tests.helpers.s3_server import BUCKET, SECRET_KEY, Faults, FaultyProxy, S3Server
from tests.helpers.tiny_run import LIMIT_S, prepare, ran

QUICK = [
    part
    for each in (
        "clip.images=128",
        "prior.images=64",
        "decoder.images=64",
        "upsampler.images=64",
        "cluster.clip_workers=1",
    )
    for part in ("--set", each)
]
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    with S3Server(tmp_path_factory.mktemp("s3")) as running:
        yield running


@pytest.fixture
def reached(server: S3Server, monkeypatch: pytest.MonkeyPatch) -> S3Server:
    """The server, found through the environment as any user's is."""
    reach(server, monkeypatch)
    return server


def reach(server: S3Server, monkeypatch: pytest.MonkeyPatch, endpoint: str | None = None) -> None:
    for name, value in server.environment(endpoint).items():
        monkeypatch.setenv(name, value)


def made(folder: Path, word: str) -> Path:
    """Return a folder as a stage leaves it."""
    (folder / "deep").mkdir(parents=True)
    (folder / "a.txt").write_text(word)
    (folder / "deep" / "b.bin").write_bytes(os.urandom(300_000))
    return folder


def test_of_writers_at_the_same_time_one_wins_and_nothing_of_the_others_stays(
    reached: S3Server, tmp_path: Path
) -> None:
    root = store.open_root(f"s3://{BUCKET}/race", tmp_path / "scratch")
    won: list[manifests.Committed] = []
    outs = [made(tmp_path / f"out-{number}", str(number)) for number in range(4)]
    together = threading.Barrier(len(outs))

    def write(out: Path) -> None:
        together.wait()
        won.append(commits.commit(root, "clip", "k", out, FACTS))

    threads = [threading.Thread(target=write, args=(out,)) for out in outs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(won) == 4 and len({each.manifest["attempt"] for each in won}) == 1
    prefix = won[0].manifest["prefix"]
    assert set(store.file_sizes(root, "")) == {
        "clip/k/manifest.json",
        f"clip/k/{prefix}/a.txt",
        f"clip/k/{prefix}/deep/b.bin",
    }
    assert manifests.verify(won[0]) == [] and won[0].files.size_bytes("a.txt") == 1


def test_what_several_writers_change_at_the_same_time_loses_no_change(
    reached: S3Server, tmp_path: Path
) -> None:
    roots = [
        store.open_root(f"s3://{BUCKET}/count", tmp_path / f"scratch-{number}")
        for number in range(4)
    ]

    def count(root: store.Root) -> None:
        for _ in range(5):
            store.change_bytes(
                root, "jobs/count.json", lambda old: str(int(old or b"0") + 1).encode()
            )

    threads = [threading.Thread(target=count, args=(root,)) for root in roots]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert store.read_bytes(roots[0], "jobs/count.json") == b"20"


def test_a_replaced_folder_is_there_all_the_time_and_of_two_repairs_the_first_stays_whole(
    reached: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = store.open_root(f"s3://{BUCKET}/repair", tmp_path / "scratch")
    replaces = commits.commit(root, "clip", "k", made(tmp_path / "out-0", "0"), FACTS).manifest[
        "attempt"
    ]
    change, found = store.change_bytes, []

    def be_overtaken(*given: Any) -> bytes | None:
        """The other machine's repair, which started from the same folder, is committed just before
        ours.
        """
        monkeypatch.setattr(store, "change_bytes", change)
        found.append(
            commits.commit(root, "clip", "k", made(tmp_path / "theirs", "theirs"), FACTS, replaces)
        )
        return change(*given)

    removed: list[str] = []
    remove = store.remove
    monkeypatch.setattr(store, "change_bytes", be_overtaken)
    monkeypatch.setattr(
        store, "remove", lambda root, name: (removed.append(name), remove(root, name))
    )
    ours = commits.commit(root, "clip", "k", made(tmp_path / "ours", "ours!"), FACTS, replaces)
    assert ours.manifest == found[0].manifest and ours.manifest["attempt"] != replaces
    assert (
        manifests.verify(ours) == [] and (pinned_copy(ours.files) / "a.txt").read_text() == "theirs"
    )
    assert "clip/k/manifest.json" not in removed, (
        "readers would find no folder, and one who is killed then loses it"
    )
    prefix = ours.manifest["prefix"]
    assert set(store.file_sizes(root, "clip")) == {
        "k/manifest.json",
        f"k/{prefix}/a.txt",
        f"k/{prefix}/deep/b.bin",
    }


def test_an_answer_that_was_lost_after_a_conditional_write_is_no_second_change(
    server: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second try is refused by what the first has written, and the change is asked about its
    own bytes.
    """
    monkeypatch.setattr(retry, "FIRST_PAUSE_S", 0.01)
    reach(server, monkeypatch)
    store.write_bytes(store.open_root(f"s3://{BUCKET}/lost2", tmp_path / "scratch"), "claim", b"1")
    with FaultyProxy(
        server.s3_port, Faults(cut_answer=1.0), only=("PUT", "claim"), at_most=1
    ) as proxy:
        reach(server, monkeypatch, proxy.endpoint)
        root = store.open_root(f"s3://{BUCKET}/lost2", tmp_path / "scratch")
        asked: list[bytes | None] = []
        there = store.change_bytes(
            root, "claim", lambda old: (asked.append(old), None if old == b"2" else b"2")[1]
        )
        assert there == b"2" and asked == [b"1", b"2"] and proxy.happened["cut_answer"] == 1


def test_a_commit_whose_answer_was_lost_is_known_as_our_own(
    server: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The manifest is put, the answer cut: the second try is refused by what the first has
    written.
    """
    lost = Faults(cut_answer=1.0)
    with FaultyProxy(server.s3_port, lost, only=("PUT", "manifest.json"), at_most=1) as proxy:
        reach(server, monkeypatch, proxy.endpoint)
        root = store.open_root(f"s3://{BUCKET}/lost", tmp_path / "scratch")
        committed = commits.commit(root, "clip", "k", made(tmp_path / "out", "x"), FACTS)
        assert proxy.happened["cut_answer"] == 1 and proxy.happened["PUT manifest.json"] == 2
        assert manifests.damage(committed) == "" and manifests.verify(committed) == []


@pytest.mark.parametrize(
    "fault", ["unavailable", "cut_request", "cut_answer", "corrupt_answer", "corrupt_request"]
)
def test_every_fault_is_outlived_by_a_commit_and_a_download(
    fault: str, server: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(retry, "FIRST_PAUSE_S", 0.01)
    with FaultyProxy(server.s3_port, Faults(**{fault: 0.2}), seed=1) as proxy:
        reach(server, monkeypatch, proxy.endpoint)
        root = store.open_root(f"s3://{BUCKET}/{fault}", tmp_path / "scratch")
        committed = commits.commit(root, "clip", "k", made(tmp_path / "out", "x"), FACTS)
        found = manifests.find(root, "clip", "k")
        assert (
            found
            and found.manifest == committed.manifest
            and (pinned_copy(found.files) / "a.txt").read_text() == "x"
        )
        assert manifests.verify(committed) == [] and proxy.happened[fault] >= 2
    left = server.files().find(f"{BUCKET}/{fault}")
    assert len(left) == 3, left


def test_what_a_killed_writer_left_is_cleared_by_the_next_uploads_included(
    reached: S3Server, tmp_path: Path
) -> None:
    root = store.open_root(f"s3://{BUCKET}/killed", tmp_path / "scratch")
    files = reached.files()
    files.pipe_file(f"{BUCKET}/killed/clip/k/0123456789ab/a.txt", b"half")
    for key in ("killed/clip/k/0123456789ab/big.bin", "killed/clip/another/0123456789ab/big.bin"):
        started = files.call_s3("create_multipart_upload", Bucket=BUCKET, Key=key)
        files.call_s3(
            "upload_part",
            Bucket=BUCKET,
            Key=key,
            UploadId=started["UploadId"],
            PartNumber=1,
            Body=b"x" * (5 << 20),
        )
    committed = commits.commit(root, "clip", "k", made(tmp_path / "out", "x"), FACTS)
    assert {name.partition("/")[0] for name in store.file_sizes(root, "clip/k")} == {
        "manifest.json",
        committed.manifest["prefix"],
    }
    assert [each["Key"] for each in files.list_multipart_uploads(BUCKET)] == [
        "killed/clip/another/0123456789ab/big.bin"
    ]
    assert store.abort_uploads(root, "clip/another") == 1


def test_a_file_of_many_parts_arrives_whole(reached: S3Server, tmp_path: Path) -> None:
    root = store.open_root(f"s3://{BUCKET}/large", tmp_path / "scratch")
    out = tmp_path / "out"
    out.mkdir()
    (out / "big.bin").write_bytes(os.urandom(1 << 20) * 110)  # above s3fs's limit for one PUT
    committed = commits.commit(root, "clip", "k", out, FACTS)
    assert "-" in reached.files().info(f"{committed.uri.removeprefix('s3://')}/big.bin")["ETag"]
    assert manifests.verify(manifests.Committed(root, "clip", "k", committed.manifest)) == []
    assert (pinned_copy(committed.files) / "big.bin").stat().st_size == 110 << 20


def test_wrong_credentials_are_one_line_without_the_secret(
    reached: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "another-secret-0815")
    with pytest.raises(StorageError, match="check the credentials in the environment") as caught:
        store.open_root(f"s3://{BUCKET}/denied", tmp_path)
    assert "secret-0815" not in str(caught.value) and "\n" not in str(caught.value)


def test_a_bucket_that_one_may_not_use_is_one_line(reached: S3Server, tmp_path: Path) -> None:
    with pytest.raises(
        StorageError,
        match=r"cannot write s3://nowhere/x.*Denied.*check the credentials in the environment and "
        r"what they may do",
    ):
        store.open_root("s3://nowhere/x", tmp_path)


@pytest.mark.timeout(LIMIT_S * 2)
def test_the_whole_pipeline_runs_on_s3_behind_a_faulty_network(
    server: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """503s, cut connections, slow answers and 1 % flipped bytes: the run ends right, and the bucket
    holds what the manifests say, once.
    """
    drawn = prepare(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    uri = f"s3://{BUCKET}/deep/root"
    faults = Faults(
        unavailable=0.03,
        cut_request=0.02,
        cut_answer=0.02,
        slow=0.02,
        corrupt_answer=0.01,
        corrupt_request=0.01,
    )
    with FaultyProxy(server.s3_port, faults) as proxy:
        reach(server, monkeypatch, proxy.endpoint)
        code, out, err = ran(tmp_path, "run", "tiny.toml", "--root", uri, *QUICK, "--json")
        assert code == 0 and "Traceback" not in err, err
        stages = {each["stage"]: each for each in json.loads(out)["stages"]}
        assert {each["state"] for each in stages.values()} == {"ran"}
        code, out, err = ran(tmp_path, "search", "a red disc", "--root", uri, "-k", "5", "--json")
        assert (code, err, len(json.loads(out))) == (0, "", 5)
        code, out, err = ran(
            tmp_path,
            "generate",
            "a red disc",
            "--count",
            "2",
            "--out",
            "drawn",
            "--root",
            uri,
            "--json",
        )
        assert code == 0 and len(list((tmp_path / "drawn").glob("*.png"))) == 3, err
        assert sum(proxy.happened[name] for name in vars(faults)) >= 10, proxy.happened
    reach(server, monkeypatch)
    code, out, err = ran(
        tmp_path, "status", "tiny.toml", "--root", uri, *QUICK, "--checksums", "--json"
    )
    assert code == 0 and {each["state"] for each in json.loads(out)["stages"]} == {"current"}, err
    assert_only_what_was_committed(
        server, "deep/root", {stage: each["key"] for stage, each in stages.items()}, drawn
    )
    assert secrets_in(tmp_path) == [] and secrets_in_bucket(server) == []


def assert_only_what_was_committed(
    server: S3Server, prefix: str, keys: dict[str, str], drawn: int
) -> None:
    files = server.files()
    expected = {f"{BUCKET}/{prefix}/runs/tiny.json"}
    manifest: dict[str, Any] = {}
    for stage, key in keys.items():
        place = f"{BUCKET}/{prefix}/{stage}/{key}"
        manifest[stage] = json.loads(files.cat_file(f"{place}/manifest.json"))
        expected |= {f"{place}/manifest.json"} | {
            f"{place}/{manifest[stage]['prefix']}/{each['path']}"
            for each in manifest[stage]["files"]
        }
    assert set(files.find(f"{BUCKET}/{prefix}")) == expected
    assert files.list_multipart_uploads(BUCKET) == []
    assert manifest["ingest"]["counts"]["out"] == manifest["embed"]["counts"]["out"] == drawn


def secrets_in(folder: Path) -> list[str]:
    """Return the files (logs, scratch, Prefect's database) that hold the secret key."""
    return [
        str(path)
        for path in folder.rglob("*")
        if path.is_file() and SECRET_KEY.encode() in path.read_bytes()
    ]


def secrets_in_bucket(server: S3Server) -> list[str]:
    files = server.files()
    return [
        name
        for name in files.find(BUCKET)
        if "/large/" not in name and SECRET_KEY.encode() in files.cat_file(name)
    ]


def test_a_living_index_on_a_store_adds_removes_compacts_and_proves_it(
    reached: S3Server,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    uri = f"s3://{BUCKET}/living"
    monkeypatch.setenv("UNCLIP_SCRATCH", str(tmp_path / "cache"))
    root = write_root(tmp_path, uri=uri)
    row = pq.read_table(pinned_copy(committed(root, "curate").files) / "keep.parquet").to_pylist()[
        7
    ]
    tar = (pinned_copy(committed(root, "ingest").files) / "shards" / "00000.tar").read_bytes()
    content = tar[row["offset"] : row["offset"] + row["size_bytes"]]

    def unclip(*arguments: str) -> dict[str, Any]:
        with pytest.raises(SystemExit) as left:
            main([*arguments, "--root", uri, "--json"])
        captured = capsys.readouterr()
        assert left.value.code == 0, captured.err
        return dict(json.loads(captured.out))

    everywhere = {
        "shards": ["ingest/ingest0123456789", "curate/curate0123456789"],
        "embeddings": ["embed/embed0123456789"],
        "index": ["index/index0123456789"],
    }
    assert unclip("index", "verify", "--url", row["origin"])["found_in"] == everywhere
    cache = scratch_for(uri)
    assert cache and not list(cache.rglob("*.tar")) and not list(cache.rglob("*.npy")), (
        "proving reads tables alone"
    )
    removed = unclip("index", "remove", "--url", row["origin"])
    assert (removed["removed"], removed["trained_into"]) == ([row["key"]], ["clip/clip0123456789"])
    opened = open_for(uri, for_writing=False)
    hits = lineage.open_view(opened, None)[0].search(direction(7), 48)
    assert len(hits) == 47 and row["key"] not in {hit.facts["key"] for hit in hits}
    assert len(unclip("index", "compact")["rows"]) == 4
    assert unclip("index", "verify", "--url", row["origin"])["found_in"] == {
        "shards": [],
        "embeddings": [],
        "index": [],
    }
    files = reached.files()
    left = [files.cat_file(name) for name in files.find(f"{BUCKET}/living")]
    left += [path.read_bytes() for path in cache.rglob("*") if path.is_file()]
    assert content in tar and not any(content in each for each in left), (
        "its bytes are in no object, and in no download"
    )
    assert fault_of(root) == {"curate": "", "embed": "", "index": ""}

    write_run(
        tmp_path / "more",
        [each | {"key": f"new{number}"} for number, each in enumerate(usual_rows()[:3])],
    )
    facts = json.loads((tmp_path / "more" / "embed" / "facts.json").read_text()) | {
        "clip_key": "clip0123456789"
    }
    (tmp_path / "more" / "embed" / "facts.json").write_text(json.dumps(facts))
    assert unclip("index", "add", str(tmp_path / "more" / "embed"))["added"] == 3
    assert unclip("index", "add", str(tmp_path / "more" / "embed"))["already_there"] == 3
    assert lineage.open_view(opened, None)[0].count == 50


def fault_of(root: store.Root) -> dict[str, str]:
    """Return what makes each folder stale."""
    stages = ("curate", "embed", "index")
    return {
        stage: fault(
            committed(root, stage),
            [
                committed(root, name)
                for name in committed(root, stage).manifest["inputs"]
                if name != "clip"
            ],
        )
        for stage in stages
    }
