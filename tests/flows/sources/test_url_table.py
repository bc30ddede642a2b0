"""A source of any kind becomes rows of one schema; what has no URL, no caption or a known URL is
dropped and counted.
"""

import csv
import gzip
import json
import os
import urllib.request
from collections import Counter
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pydantic import ValidationError

from flows.sources import parquet_process, url_lists, url_table
from flows.sources.static_server import StaticServer
from flows.sources.url_table import DataConfig, new_urls, write_url_table
from infra.errors import CallerError, DataError, UnclipError
from infra.schemas import DROPPED, URLS, former_sample_key, sample_key
from tests.helpers.npm_packages import use_fake_npm

ROWS = [{"url": f"http://h/{n}.png", "caption": f"thing {n}"} for n in range(5)]
Row = dict[str, Any]


def table(tmp_path: Path, *given: Row, **settings: Any) -> tuple[list[Row], list[Row]]:
    """Return the rows of urls.parquet and of dropped.parquet."""
    out = tmp_path / "out"
    out.mkdir(exist_ok=True)
    count = write_url_table(
        DataConfig(sources=given, **settings), out, tmp_path / "cache", "http://127.0.0.1:80"
    )
    urls, dropped = pq.read_table(out / "urls.parquet"), pq.read_table(out / "dropped.parquet")
    assert urls.schema.equals(URLS) and dropped.schema.equals(DROPPED)
    assert count == urls.num_rows
    return urls.to_pylist(), dropped.to_pylist()


def write_list(path: Path, rows: list[Row]) -> None:
    text = ""
    if ".jsonl" in path.name:
        text = "".join(json.dumps(row) + "\n" for row in rows)
    if ".csv" in path.name or ".tsv" in path.name:
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(
                file, list(rows[0]), delimiter="\t" if ".tsv" in path.name else ","
            )
            writer.writeheader()
            writer.writerows(rows)
        text = path.read_text()
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    elif path.suffix == ".gz":
        path.write_bytes(gzip.compress(text.encode()))
    else:
        path.write_text(text)


@pytest.mark.parametrize(
    "name", ["a.parquet", "a.jsonl", "a.jsonl.gz", "a.csv", "a.csv.gz", "a.tsv"]
)
def test_a_list_of_any_format_becomes_the_same_rows(tmp_path: Path, name: str) -> None:
    rows = [
        *ROWS,
        {"url": "http://h/x.png", "caption": 'says "hi", twice\nand ü'},
        {"url": "http://h/7.png", "caption": "007"},
        {"url": "http://h/8.png", "caption": "null"},
    ]
    write_list(tmp_path / name, rows)
    source = {"kind": "urls", "path": str(tmp_path / name)}
    urls, dropped = table(tmp_path, source | ({"quotes": "double"} if ".tsv" in name else {}))
    assert {row["url"]: row["caption"] for row in urls} == {
        row["url"]: row["caption"] for row in rows
    }
    assert dropped == []
    one = next(row for row in urls if row["url"] == "http://h/3.png")
    key = sample_key("http://h/3.png", "thing 3")
    assert one == {
        "key": key,
        "url": "http://h/3.png",
        "origin": "http://h/3.png",
        "caption": "thing 3",
        "captions": ["thing 3"],
        "licence": "",
        "concept": key,
        "style": "",
        "category": "",
        "subcategory": "",
    }


def test_columns_are_found_by_their_names_in_the_recipe(tmp_path: Path) -> None:
    columns = {
        "URL": "http://h/1.png",
        "TEXT": "a dog",
        "more": ["a hound", "a dog"],
        "lic": None,
        "id": 12,
        "vendor": "x",
        "cls": "Animals",
    }
    write_list(tmp_path / "a.parquet", [columns])
    source = {
        "kind": "urls",
        "path": str(tmp_path / "a.parquet"),
        "url_column": "URL",
        "caption_column": "TEXT",
        "captions_column": "more",
        "licence_column": "lic",
        "concept_column": "id",
        "style_column": "vendor",
        "category_column": "cls",
        "licence": "CC0",
    }
    [row], _ = table(tmp_path, source)
    assert (row["captions"], row["licence"], row["concept"], row["style"], row["category"]) == (
        ["a dog", "a hound"],
        "CC0",
        "12",
        "x",
        "Animals",
    )


def test_bad_rows_are_dropped_for_their_reason_and_nothing_is_lost(tmp_path: Path) -> None:
    rows = [
        *ROWS,
        {"url": "http://h/1.png", "caption": "another name for 1"},
        {"url": "", "caption": "no url"},
        {"url": None, "caption": "no url"},
        {"url": "http://h/8.png", "caption": "  "},
        {"url": "http://h/9.png", "caption": None},
    ]
    write_list(tmp_path / "a.jsonl", rows)
    write_list(tmp_path / "b.jsonl", ROWS[:2])
    urls, dropped = table(
        tmp_path,
        *({"kind": "urls", "path": str(tmp_path / name)} for name in ("a.jsonl", "b.jsonl")),
    )
    assert Counter(row["reason"] for row in dropped) == {
        "duplicate_url": 3,
        "empty_url": 2,
        "empty_caption": 2,
    }
    assert len(urls) + len(dropped) == len(rows) + 2
    assert {row["caption"] for row in urls} == {
        row["caption"] for row in ROWS
    }  # the first of two equal URLs stays


def test_duplicates_are_found_across_blocks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(url_table, "BLOCK_ROWS", 3)
    rows = [{"url": f"http://h/{n % 8}.png", "caption": "x"} for n in range(40)]
    write_list(tmp_path / "a.jsonl", rows)
    urls, dropped = table(tmp_path, {"kind": "urls", "path": str(tmp_path / "a.jsonl")})
    assert (len({row["url"] for row in urls}), len(urls), len(dropped)) == (8, 8, 32)


def test_new_urls_agrees_with_a_set() -> None:
    seen, known = np.empty(0, np.uint64), set()
    for block in (["a", "b", "a"], ["b", "c", "c", "d"], [], ["e", "a"]):
        expected = []
        for url in block:
            expected.append(url not in known)
            known.add(url)
        is_new, seen = new_urls(block, seen)
        assert is_new.tolist() == expected


def test_any_fsspec_path_and_glob_is_read(tmp_path: Path) -> None:
    memory = fsspec.filesystem("memory")
    for n in range(3):
        memory.pipe(
            f"/lists/part-{n}.jsonl",
            json.dumps({"url": f"http://h/{n}.png", "caption": "x"}).encode(),
        )
    try:
        urls, _ = table(tmp_path, {"kind": "urls", "path": "memory://lists/part-*.jsonl"})
    finally:
        memory.rm("/lists", recursive=True)
    assert len(urls) == 3


@pytest.mark.parametrize(
    ("name", "content", "error", "words"),
    [
        ("a.jsonl", None, CallerError, "a.jsonl does not exist|matches no file"),
        ("a.xls", b"", CallerError, "set format"),
        (
            "a.jsonl",
            b'{"link": "x", "caption": "y"}\n',
            CallerError,
            "no column 'url': its columns are link, caption",
        ),
        (
            "a.csv",
            b"link,caption\nx,y\n",
            CallerError,
            "no column 'url': its columns are link, caption",
        ),
        ("a.jsonl", b'{"url": "x", \n', DataError, "cannot be parsed"),
        ("a.jsonl", b"[1]\n", DataError, "cannot be parsed"),
        ("a.csv", b"", DataError, "cannot be parsed"),
        ("a.parquet", b"PAR1 not", DataError, "cannot be parsed"),
        (
            "a.jsonl.gz",
            gzip.compress(b'{"url": "x", "caption": "y"}\n' * 9999)[:-20],
            DataError,
            "cannot be parsed",
        ),
        ("a.jsonl.gz", b"not gzip", DataError, "cannot be parsed"),
    ],
)
def test_a_bad_list_is_one_line_that_names_it(
    tmp_path: Path, name: str, content: bytes | None, error: type[UnclipError], words: str
) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(error, match=words) as caught:
        table(tmp_path, {"kind": "urls", "path": str(tmp_path / name)})
    assert name in str(caught.value) and "\n" not in str(caught.value)


def test_text_that_no_file_can_hold_does_no_harm(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(
        '{"url": "http://h/\\ud800.png", "caption": "half \\ud83d a pair"}\n'
    )
    [row], _ = table(tmp_path, {"kind": "urls", "path": str(tmp_path / "a.jsonl")})
    assert row["caption"] == "half ? a pair"


@pytest.mark.parametrize("name", ["a.tsv", "a.csv"])
@pytest.mark.parametrize("start", [0, 3, 4])
def test_a_caption_that_begins_with_a_quote_takes_no_other_row_along(
    tmp_path: Path, name: str, start: int
) -> None:
    separator = "\t" if name == "a.tsv" else ","
    captions = ['"big" cat', 'say "hi', "c", '"open', 'closed" x', "f", '""', '"last'][start:]
    lines = [f"http://h/{n}.png{separator}{caption}" for n, caption in enumerate(captions)]
    text = "\n".join([separator.join(("url", "caption")), *lines])
    (tmp_path / name).write_text(text)
    urls, dropped = table(tmp_path, {"kind": "urls", "path": str(tmp_path / name)})
    assert len(urls) + len(dropped) == len(captions)
    by_url = {row["url"]: row["caption"] for row in urls}
    if name == "a.tsv":
        assert dropped == []
        assert by_url == {f"http://h/{n}.png": caption for n, caption in enumerate(captions)}
    else:
        assert {"c", "f"} & set(captions) <= set(by_url.values())
        reasons = {row["reason"] for row in dropped}
        assert reasons == {"malformed_row", "empty_caption"}
        assert all(row["detail"] for row in dropped)


def test_quotes_are_what_the_recipe_says(tmp_path: Path) -> None:
    (tmp_path / "a.tsv").write_text('url\tcaption\nhttp://h/1.png\t"a ""b""\nc"\n')
    source = {"kind": "urls", "path": str(tmp_path / "a.tsv"), "quotes": "double"}
    [row], dropped = table(tmp_path, source)
    assert row["caption"] == 'a "b"\nc' and dropped == []
    (tmp_path / "a.csv").write_text('url,caption\nhttp://h/1.png,"a\nhttp://h/2.png,b"\n')
    source = {"kind": "urls", "path": str(tmp_path / "a.csv"), "quotes": "none"}
    urls, dropped = table(tmp_path, source)
    assert {row["caption"] for row in urls} == {'"a', 'b"'} and dropped == []


def test_rows_with_other_columns_than_the_header_are_counted(tmp_path: Path) -> None:
    (tmp_path / "a.tsv").write_bytes(b"url\tcaption\r\nu\r\nv\tw\tx\r\n\r\nhttp://h/1.png\tok\r\n")
    [row], dropped = table(tmp_path, {"kind": "urls", "path": str(tmp_path / "a.tsv")})
    assert row["caption"] == "ok"
    assert [(row["origin"], row["reason"]) for row in dropped] == [
        ("a.tsv line 2", "malformed_row"),
        ("a.tsv line 3", "malformed_row"),
    ]


def test_a_caption_is_text_or_a_list_of_texts_or_missing_and_counted(tmp_path: Path) -> None:
    nan, junk = float("nan"), b"\xff"
    values: list[Any] = [
        ["a", "b"], b"bytes", "text", nan, None, True, {"a": 1}, junk, 7, [], [None, "c"]
    ]  # fmt: skip
    for number, value in enumerate(values):
        columns = {
            "url": [f"http://h/{number}.png"],
            "caption": [value],
            "id": [float("nan") if number < 3 else number],
        }
        pq.write_table(pa.table(columns), tmp_path / f"{number:02d}.parquet")
    (tmp_path / "99.jsonl").write_text(
        '{"url": "http://h/99.png", "caption": NaN, "id": true}\n'
        '{"url": "http://h/98.png", "caption": ["x", 1], "id": {"a": 1}}\n'
    )
    source = {"kind": "urls", "path": str(tmp_path / "[0-9]*"), "concept_column": "id"}
    urls, dropped = table(tmp_path, source)
    rows = {row["url"]: row for row in urls}
    assert {url: row["captions"] for url, row in rows.items()} == {
        "http://h/0.png": ["a", "b"],
        "http://h/1.png": ["bytes"],
        "http://h/2.png": ["text"],
        "http://h/10.png": ["c"],
        "http://h/98.png": ["x"],
    }
    assert Counter(row["reason"] for row in dropped) == {
        "caption_not_text": 4,
        "empty_caption": 4,
    }
    assert len({row["concept"] for row in urls}) == len(urls)


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-32"])
@pytest.mark.parametrize("name", ["a.tsv", "a.csv", "a.jsonl"])
def test_a_byte_order_mark_decides_how_a_list_is_read(
    tmp_path: Path, name: str, encoding: str
) -> None:
    write_list(tmp_path / name, [*ROWS, {"url": "http://h/ü.png", "caption": "größer"}])
    text = (tmp_path / name).read_text()
    if name == "a.jsonl":
        text = "".join(
            json.dumps(json.loads(line), ensure_ascii=False) + "\n" for line in text.splitlines()
        )
    (tmp_path / name).write_bytes(text.encode(encoding))
    urls, dropped = table(tmp_path, {"kind": "urls", "path": str(tmp_path / name)})
    assert len(urls) == 6 and dropped == []
    assert "größer" in {row["caption"] for row in urls}


def test_latin_1_in_a_list_is_counted_row_by_row(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_bytes(
        "url,caption\nhttp://h/1.png,größer\nhttp://h/2.png,ok\n".encode("latin-1")
    )
    [row], [lost] = table(tmp_path, {"kind": "urls", "path": str(tmp_path / "a.csv")})
    assert (row["caption"], lost["reason"]) == ("ok", "caption_not_text")


def test_a_folder_that_a_spark_job_wrote_is_a_list(tmp_path: Path) -> None:
    root = tmp_path / "job"
    (root / "lang=en").mkdir(parents=True)
    for number, name in enumerate(("part-0000.parquet", "lang=en/part-0001.parquet")):
        write_list(root / name, ROWS[2 * number : 2 * number + 2])
    for name in ("_SUCCESS", ".part-0000.parquet.crc", "_committed_1"):
        (root / name).write_bytes(b"")
    source = {"kind": "urls", "path": str(root)}
    before = DataConfig(sources=(source,)).keyed()
    assert len(table(tmp_path, source)[0]) == 4
    write_list(root / "part-0002.parquet", ROWS[4:])
    assert DataConfig(sources=(source,)).keyed() != before
    assert len(table(tmp_path, {"kind": "urls", "path": f"{root}/*"})[0]) == 3


def test_every_image_file_of_a_folder_becomes_a_row_or_is_counted(tmp_path: Path) -> None:
    root = tmp_path / "p"
    (root / ".thumbnails").mkdir(parents=True)
    for name in ("a.png", "b.AVIF", "c.heic", "._a.png", ".thumbnails/a.png", "d.jfif"):
        (root / name).write_bytes(b"image")
        (root / name).with_suffix(".txt").write_bytes("ä".encode())
    for name, text in (
        ("latin.png", "größer".encode("latin-1")),
        ("wide.png", "größer\nhöher".encode("utf-16")),
        ("marked.png", "größer".encode("utf-8-sig")),
    ):
        (root / name).write_bytes(b"image")
        (root / name).with_suffix(".txt").write_bytes(text)
    urls, dropped = table(tmp_path, {"kind": "folder", "path": str(root)})
    assert {row["origin"].rpartition("/")[2]: row["captions"] for row in urls} == {
        "a.png": ["ä"],
        "b.AVIF": ["ä"],
        "d.jfif": ["ä"],
        "wide.png": ["größer", "höher"],
        "marked.png": ["größer"],
    }
    assert {row["origin"].removeprefix("folder:p/"): row["reason"] for row in dropped} == {
        "._a.png": "hidden_file",
        ".thumbnails/a.png": "hidden_file",
        "c.heic": "unknown_format",
        "latin.png": "caption_not_text",
    }


def test_only_regular_files_inside_a_folder_are_read(tmp_path: Path) -> None:
    root = tmp_path / "p"
    root.mkdir()
    (tmp_path / "secret.txt").write_text("secret")
    for name in ("a", "inside", "outside", "long", "fifo"):
        (root / f"{name}.png").write_bytes(b"image")
    for name in ("a", "zero", "pipe", "gone"):
        (root / f"{name}.txt").write_text(name)
    (root / "inside.txt").symlink_to("a.txt")
    (root / "outside.txt").symlink_to(tmp_path / "secret.txt")
    with (root / "long.txt").open("wb") as file:
        file.truncate(1 << 40)  # bytes
    os.mkfifo(root / "fifo.txt")
    (root / "zero.png").symlink_to("/dev/zero")
    os.mkfifo(root / "pipe.png")
    (root / "gone.png").symlink_to("gone")
    urls, dropped = table(tmp_path, {"kind": "folder", "path": str(root)})
    assert {row["origin"].rpartition("/")[2]: row["caption"] for row in urls} == {
        "a.png": "a",
        "inside.png": "a",
    }
    reasons = {row["origin"].removeprefix("folder:p/"): row["reason"] for row in dropped}
    unsafe = ("outside.png", "fifo.png", "zero.png", "pipe.png", "gone.png")
    assert reasons == {**dict.fromkeys(unsafe, "unsafe_file"), "long.png": "row_too_large"}


def test_file_names_that_are_not_utf_8_are_served_and_told_apart(tmp_path: Path) -> None:
    root = tmp_path / os.fsdecode(b"b\xe4r")
    root.mkdir()
    for byte in (0xE4, 0xF6):
        file = root / os.fsdecode(bytes([byte]) + b".png")
        file.write_bytes(bytes([byte]))
        file.with_suffix(".txt").write_text("one caption")
    source = url_table.FolderSource(kind="folder", path="x").model_copy(update={"path": str(root)})
    assert url_table.content_of(source) != "unreadable"
    config = DataConfig(sources=(source.model_copy(update={"path": "x"}),))
    config = config.model_copy(update={"sources": (source,)})
    (tmp_path / "out").mkdir()
    assert write_url_table(config, tmp_path / "out", tmp_path / "cache") == 2
    rows = pq.read_table(tmp_path / "out" / "urls.parquet").to_pylist()
    assert {row["origin"] for row in rows} == {
        "folder:b\\xe4r/\\xe4.png",
        "folder:b\\xe4r/\\xf6.png",
    }
    assert len({row["key"] for row in rows}) == 2
    with StaticServer(url_table.Mounts.load(tmp_path / "out" / "mounts.json").folders) as server:
        bodies = set()
        for row in rows:
            url = row["url"].replace(url_table.SERVED, server.base)
            with urllib.request.urlopen(url) as response:
                bodies.add(response.read())
    assert bodies == {b"\xe4", b"\xf6"}


def test_a_folder_of_images_beside_captions(tmp_path: Path) -> None:
    root = tmp_path / "my pictures"
    (root / "sub").mkdir(parents=True)
    for name, text in (
        ("a.png", "a cat\na small cat\n\n"),
        ("sub/b.JPG", "a dog"),
        ("c.webp", None),
        ("notes.txt", "no image"),
    ):
        if name != "notes.txt":
            (root / name).write_bytes(b"image")
        if text is not None:
            (root / name).with_suffix(".txt").write_text(text)
    urls, dropped = table(
        tmp_path, {"kind": "folder", "path": str(root), "licence": "CC0", "style": "mine"}
    )
    rows = {row["origin"]: row for row in urls}
    assert set(rows) == {"folder:my pictures/a.png", "folder:my pictures/sub/b.JPG"}
    assert rows["folder:my pictures/a.png"]["captions"] == ["a cat", "a small cat"]
    assert (
        rows["folder:my pictures/sub/b.JPG"]["url"] == "http://127.0.0.1:80/my%20pictures/sub/b.JPG"
    )
    assert [row["reason"] for row in dropped] == ["empty_caption"]
    mounts = url_table.Mounts.load(tmp_path / "out" / "mounts.json")
    assert mounts.folders == {"my pictures": root}


def test_two_folders_of_one_name_stay_apart(tmp_path: Path) -> None:
    for parent in ("x", "y"):
        (tmp_path / parent / "p").mkdir(parents=True)
        (tmp_path / parent / "p" / "a.png").write_bytes(b"image")
        (tmp_path / parent / "p" / "a.txt").write_text("a cat")
    urls, _ = table(
        tmp_path,
        *({"kind": "folder", "path": str(tmp_path / parent / "p")} for parent in ("x", "y")),
    )
    assert len({row["key"] for row in urls}) == len({row["url"] for row in urls}) == 2


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(CallerError, match="nowhere"):
        table(tmp_path, {"kind": "folder", "path": str(tmp_path / "nowhere")})


def test_packages_become_rows_that_share_concepts_across_vendors(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_fake_npm(tmp_path / "npm", monkeypatch)
    packages = [
        "emoji-datasource-google@16.0.0",
        "@lobehub/fluent-emoji-3d@1.1.0",
        "svg-country-flags@1.2.10",
        "openmoji@17.0.0",
    ]
    urls, dropped = table(tmp_path, {"kind": "packages", "packages": packages})
    assert dropped == [] and len(urls) == 5 + 3 + 2 + 2
    hearts = {row["style"]: row for row in urls if row["concept"] == "2764"}
    assert set(hearts) == {"google", "fluent-3d", "openmoji"}
    assert {row["caption"] for row in hearts.values()} == {"red heart"}
    assert {row["style"] for row in urls if row["concept"] == "1f1eb-1f1f7"} == {"google", "flags"}
    heart = hearts["google"]
    assert heart["origin"] == "npm:emoji-datasource-google@16.0.0/img/google/64/2764-fe0f.png"
    assert heart["url"] == "http://127.0.0.1:80/emoji-datasource-google/img/google/64/2764-fe0f.png"
    assert heart["key"] == sample_key(heart["origin"], "red heart")
    mounts = url_table.Mounts.load(tmp_path / "out" / "mounts.json").folders
    for row in urls:
        mount = next(
            name
            for name in sorted(mounts, reverse=True)
            if row["url"].startswith(f"http://127.0.0.1:80/{name}/")
        )
        assert (mounts[mount] / row["url"].removeprefix(f"http://127.0.0.1:80/{mount}/")).is_file()


def test_the_same_recipe_gives_the_same_table_and_another_seed_another_order(
    tmp_path: Path,
) -> None:
    write_list(
        tmp_path / "a.jsonl", [{"url": f"http://h/{n}.png", "caption": "x"} for n in range(50)]
    )
    source = {"kind": "urls", "path": str(tmp_path / "a.jsonl")}
    first, again, other = (table(tmp_path, source, seed=seed)[0] for seed in (0, 0, 1))
    assert first == again != other
    assert sorted(row["key"] for row in first) == sorted(row["key"] for row in other)


def test_a_list_that_grew_is_another_input(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    config = DataConfig(sources=({"kind": "urls", "path": str(path)},))
    missing = config.keyed()
    write_list(path, ROWS[:2])
    short = config.keyed()
    assert short == config.keyed()
    write_list(path, ROWS)
    assert len({json.dumps(keyed) for keyed in (missing, short, config.keyed())}) == 3


def test_how_fast_one_downloads_is_no_part_of_the_key() -> None:
    source = {"kind": "packages", "packages": ["openmoji@17.0.0"]}
    assert (
        DataConfig(sources=(source,), threads=1, cache="/x").keyed()
        == DataConfig(sources=(source,)).keyed()
    )
    assert (
        DataConfig(sources=(source,), image_size_px=32).keyed()
        != DataConfig(sources=(source,)).keyed()
    )


@pytest.mark.parametrize(
    "source",
    [
        {"kind": "paper"},
        {"kind": "urls"},
        {"kind": "packages", "packages": []},
        {"kind": "urls", "path": "x", "colour": 1},
    ],
)
def test_an_unknown_or_incomplete_source_is_refused(source: Row) -> None:
    with pytest.raises(ValidationError):
        DataConfig(sources=(source,))


def test_one_url_in_many_spellings_is_one_row_without_a_password(tmp_path: Path) -> None:
    urls = ["HTTP://u:secret@PICS.test.:80/x/../a.png", "http://pics.test/%61.png", "http://b@[d/"]
    write_list(tmp_path / "a.jsonl", [{"url": url, "caption": "x"} for url in urls])
    (tmp_path / "b.csv").write_text("url,caption\nhttp://u:secret@h/1\n")
    rows, dropped = table(
        tmp_path, *({"kind": "urls", "path": str(tmp_path / name)} for name in ("a.jsonl", "b.csv"))
    )
    assert {(row["url"], row["origin"]) for row in rows} == {
        ("http://pics.test/a.png",) * 2, ("http://[...][d/",) * 2
    }  # fmt: skip
    assert Counter(row["reason"] for row in dropped) == {"duplicate_url": 1, "malformed_row": 1}
    assert "secret" not in json.dumps(rows + dropped)


def test_no_list_names_our_own_server(tmp_path: Path) -> None:
    urls = ["http://127.0.0.1:80/a/1.png", "HTTP://u@127.1:80/a/2.png", "http://0x7f.1:080/a/3.png"]
    write_list(tmp_path / "a.jsonl", [{"url": url, "caption": "x"} for url in urls])
    rows, _ = table(tmp_path, {"kind": "urls", "path": str(tmp_path / "a.jsonl")})
    assert {row["url"] for row in rows} == {f"http://127.0.0.1/a/{n}.png" for n in (1, 2, 3)}


def test_two_different_pairs_never_share_a_key() -> None:
    pairs = [("h", "x\ny"), ("h\nx", "y"), ("h\nx\ny", ""), ("", "h\nx\ny"), ("h", "x")]
    pairs += [(f"{len('h')}", "h\nx"), ("3\nh\nx", "y"), ("", "3\nh\nx\ny")]
    assert len({sample_key(*pair) for pair in pairs}) == len(pairs)
    assert sample_key("http://h/1", "x\ny") == former_sample_key("http://h/1", "x\ny")


def test_a_removed_key_of_an_older_release_is_not_downloaded_again(tmp_path: Path) -> None:
    urls = ["HTTP://PICS.test/1.png", "http://pics.test/2.png"]
    write_list(tmp_path / "a.jsonl", [{"url": url, "caption": "x"} for url in urls])
    config = DataConfig(sources=({"kind": "urls", "path": str(tmp_path / "a.jsonl")},))
    removed = {former_sample_key(urls[0], "x")}
    assert write_url_table(config, tmp_path, tmp_path / "cache", removed_keys=removed) == 1
    [dropped] = pq.read_table(tmp_path / "dropped.parquet").to_pylist()
    assert (dropped["origin"], dropped["reason"]) == ("http://pics.test/1.png", "removed")


@pytest.mark.parametrize("name", ["a.parquet", "a.jsonl.gz", "a.csv", "a.tsv"])
def test_a_row_that_is_too_large_is_counted_and_the_others_are_read(
    tmp_path: Path, name: str
) -> None:
    rows: list[Row] = [
        {"url": "http://h/1", "caption": "a", "other": "x" * 300_000},
        {"url": "http://h/2", "caption": "b" * (url_lists.MAX_ROW_BYTES + 1), "other": ""},
        {"url": "http://h/3", "caption": "c" * 3 * url_lists.MAX_LINE_BYTES, "other": ""},
        {"url": "http://h/4", "caption": "d", "other": ""},
    ]
    if name == "a.csv":  # the maximum of Python's csv module
        rows[0]["other"] = "x" * 100_000
    write_list(tmp_path / name, rows)
    urls, dropped = table(tmp_path, {"kind": "urls", "path": str(tmp_path / name)})
    assert sorted(row["caption"] for row in urls) == ["a", "d"]
    assert [row["reason"] for row in dropped] == ["row_too_large"] * 2
    assert all(row["origin"].startswith(name) and len(row["detail"]) < 300 for row in dropped)


def test_a_row_of_endless_quoted_lines_is_one_that_is_too_large(tmp_path: Path) -> None:
    start = 'url,caption\nhttp://h/1,a\nhttp://h/2,"b'
    (tmp_path / "a.csv").write_text(start + 'x","y\n' * 300_000 + '"\nhttp://h/3,c\n')
    urls, dropped = table(tmp_path, {"kind": "urls", "path": str(tmp_path / "a.csv")})
    assert "http://h/1" in {row["url"] for row in urls}
    assert {"row_too_large"} <= {row["reason"] for row in dropped}


@pytest.mark.parametrize("kind", ["dictionary", "list"])
def test_a_small_parquet_file_with_gigabytes_of_text_takes_little_memory(
    tmp_path: Path, kind: str
) -> None:
    large = pa.array(["x" * (1 << 20), "a"])
    places = pa.array([1, *[0] * 2998, 1], pa.int32())
    captions: pa.Array = pa.DictionaryArray.from_arrays(places, large)
    if kind == "list":
        captions = pa.ListArray.from_arrays(pa.array(range(3001), pa.int32()), captions)
    columns = {"url": [f"http://h/{number}" for number in range(3000)], "caption": captions}
    pq.write_table(
        pa.table(columns), tmp_path / "a.parquet", compression="zstd", store_schema=False
    )
    assert (tmp_path / "a.parquet").stat().st_size < 100_000
    urls, dropped = table(tmp_path, {"kind": "urls", "path": str(tmp_path / "a.parquet")})
    assert {row["url"] for row in urls} == {"http://h/0", "http://h/2999"}
    assert Counter(row["reason"] for row in dropped) == {"row_too_large": 2998}


def test_a_row_group_that_does_not_fit_is_one_line_that_names_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parquet_process, "MEMORY_BYTES", 448 << 20)
    count = 10_000_000
    empty = pa.ListArray.from_arrays(pa.array([0, count], pa.int32()), pa.nulls(count, pa.string()))
    pq.write_table(
        pa.table({"url": ["http://h/1"], "caption": empty}),
        tmp_path / "a.parquet",
        compression="zstd",
    )
    with pytest.raises(DataError, match=r"a\.parquet: row group 0 cannot be read within 448 MiB"):
        table(tmp_path, {"kind": "urls", "path": str(tmp_path / "a.parquet")})


@pytest.mark.parametrize(
    "captions",
    [
        pa.array(["a", "x" * 70_000, None], pa.large_string()),
        pa.array([["a"], ["x" * 70_000], None], pa.large_list(pa.string())),
        pa.array([["a", "b"], ["x" * 70_000, "c"], None], pa.list_(pa.string(), 2)),
        pa.array([{"a": "a"}, {"a": "x" * 70_000}, None]),
    ],
)
def test_a_value_of_any_type_is_bounded(tmp_path: Path, captions: pa.Array) -> None:
    pq.write_table(
        pa.table({"an.url": ["u", "v", "w"], "caption": captions}), tmp_path / "a.parquet"
    )
    source = {"kind": "urls", "path": str(tmp_path / "a.parquet"), "url_column": "an.url"}
    first, large, missing = url_lists.read_lists(url_lists.UrlsSource.model_validate(source))
    assert isinstance(large, url_lists.Refused) and large.reason == "row_too_large"
    assert isinstance(first, dict) and first["caption"] == captions[0].as_py()
    assert missing == {"url": "w", "caption": None}


def test_a_block_of_the_table_is_bounded_in_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(url_table, "BLOCK_BYTES", 100)
    rows = [url_table.row(f"http://h/{number}", "", ["x" * 40]) for number in range(5)]
    assert [len(block) for block in url_table.blocks(iter(rows))] == [2, 2, 1]


def test_hostile_json_is_one_line_that_names_the_file(tmp_path: Path) -> None:
    start = '{"url": "http://h/1", "caption": "a"}\n{"url": "http://h/2", "caption": '
    for value in ("[" * 200_000, "9" * 5000):
        (tmp_path / "a.jsonl").write_text(start + value + "}\n")
        with pytest.raises(DataError, match=r"a\.jsonl cannot be parsed"):
            table(tmp_path, {"kind": "urls", "path": str(tmp_path / "a.jsonl")})
