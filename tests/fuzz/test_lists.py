"""Whatever stands in URL lists, opt-out lists and robots.txt: documented errors, and every row
counted.
"""

import json
import re
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from hypothesis import assume, example, given
from hypothesis import strategies as st

from flows.ingest import robots
from flows.sources import opt_out
from flows.sources.url_lists import UrlsSource, read_lists
from flows.sources.url_table import DataConfig, write_url_table
from infra.errors import CallerError, DataError
from tests.helpers.bounds import bounded

CELLS = st.one_of(
    st.sampled_from(
        [
            b"http://example.org/a.png", b"https://user@[::1]:99999/", b"a caption", b'"', b'"open',
            b"\xff", b"\xef\xbb\xbf", b"\0", b"\r", b"", b"//", b"http://[", b"x" * 3000,
        ]
    ),
    st.binary(max_size=30),
    st.text(max_size=30).map(lambda text: text.encode("utf-8", "surrogatepass")),
)  # fmt: skip
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=10),
    lambda values: st.lists(values, max_size=3) | st.dictionaries(st.text(max_size=3), values),
    max_leaves=5,
)
STARTS = st.sampled_from([b"", b"\xef\xbb\xbf", b"\xff\xfe", b"\xfe\xff", b"\xff\xfe\0\0"])


def separated(separator: bytes) -> st.SearchStrategy[bytes]:
    """Return files of lines whose cells are hostile, usually below a right header."""
    lines = st.lists(st.lists(CELLS, max_size=3).map(separator.join), max_size=8)
    header = st.sampled_from([separator.join([b"url", b"caption"]), b"", b"url", b'"url'])
    return st.builds(
        lambda start, header, lines, end: start + end.join([header, *lines]),
        STARTS, header, lines, st.sampled_from([b"\n", b"\r\n", b"\r"]),
    )  # fmt: skip


JSON_LINES = st.lists(
    st.fixed_dictionaries({"url": VALUES, "caption": VALUES}).map(
        lambda values: json.dumps(values).encode()
    )
    | VALUES.map(lambda value: json.dumps(value).encode())
    | st.binary(max_size=30),
    max_size=8,
).map(b"\n".join)
FILES = st.one_of(
    st.tuples(st.just("csv"), separated(b",")),
    st.tuples(st.just("tsv"), separated(b"\t")),
    st.tuples(st.just("jsonl"), JSON_LINES),
    st.tuples(st.sampled_from(["csv", "tsv", "jsonl", "parquet"]), st.binary(max_size=100)),
    st.tuples(st.sampled_from(["csv.gz", "jsonl.gz"]), st.binary(max_size=60)),
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("lists")


@example(("jsonl", b'{"url": "http://a/", "caption": "x"}\n' + b"[" * 100_000))
@given(FILES)
def test_every_row_of_a_list_is_in_the_table_or_dropped_with_a_reason(
    folder: Path, file: tuple[str, bytes]
) -> None:
    kind, data = file
    path = folder / f"list.{kind}"
    path.write_bytes(data)
    source = UrlsSource(kind="urls", path=str(path))
    with bounded():
        try:
            rows = list(read_lists(source))
        except (CallerError, DataError) as error:
            assert len(str(error).splitlines()) == 1 and str(path) in str(error)
            return
        written = write_url_table(DataConfig(sources=(source,)), folder, folder / "cache")
    dropped = pq.read_table(folder / "dropped.parquet").to_pylist()
    assert written == pq.read_table(folder / "urls.parquet").num_rows
    assert written + len(dropped) == len(rows)
    assert all(row["reason"] for row in dropped)


@given(st.lists(st.lists(CELLS, max_size=3).map(b"\t".join), max_size=8))
def test_no_line_of_a_list_is_lost(folder: Path, lines: list[bytes]) -> None:
    path = folder / "lines.tsv"
    path.write_bytes(b"\n".join([b"url\tcaption", *lines]))
    split = [line for line in b"\n".join(lines).split(b"\n") if line.strip(b"\r")]
    with bounded():
        rows = list(read_lists(UrlsSource(kind="urls", path=str(path))))
    assert len(rows) == len(split)


ENTRIES = st.one_of(
    st.sampled_from(
        [
            "example.org", "*.example.org", "example.org:8080", "https://example.org/a/",
            "Bücher.de", "http://user@example.org/", "[::1]", "127.1", "http://[", "//", "a@b.org",
            ".", "xn--", "example.org:x", "straße.de/Ä?ö#ü", "x." * 200,
        ]
    ),
    st.text(max_size=30),
)  # fmt: skip


@given(st.lists(ENTRIES, max_size=5), STARTS, st.binary(max_size=20))
def test_an_opt_out_list_is_read_or_refused_with_the_line(
    folder: Path, entries: list[str], start: bytes, end: bytes
) -> None:
    path = folder / "opt_out.txt"
    path.write_bytes(start + "\n".join(entries).encode("utf-8", "surrogatepass") + end)
    with bounded():
        try:
            lists = opt_out.read_opt_out([str(path)])
        except CallerError as error:
            assert len(str(error).splitlines()) == 1 and str(path) in str(error)
            return
        for entry in entries:
            lists.covers(entry)
    opt_out.save(lists, folder / "opt_out.json")
    opt_out.load.cache_clear()
    assert opt_out.load(folder / "opt_out.json") == lists


@given(
    host=st.from_regex(r"[a-zA-Z0-9]{1,9}(\.[a-zA-Z0-9]{1,9}){1,3}\.(org|DE)", fullmatch=True),
    scheme=st.sampled_from(["http", "https", "HTTP"]),
    path=st.text(max_size=20),
    is_url=st.booleans(),
)
def test_an_opted_out_host_or_url_is_covered_in_every_spelling(
    host: str, scheme: str, path: str, is_url: bool
) -> None:
    with bounded():
        url = f"{scheme}://{host}/{path}"
        try:
            hosts, urls = opt_out.parse_entry(url if is_url else host)
        except ValueError:
            assume(False)
        lists = opt_out.OptOut(hosts, urls)
        assert lists.covers(url)
        port = 443 if scheme == "https" else 80
        assert lists.covers(f"{scheme}://{host.swapcase()}:{port}/{path}")


PATTERNS = st.text("ab*$/%", max_size=12)


@given(PATTERNS, st.text("ab$/%", max_size=12))
def test_a_robots_pattern_matches_what_a_regular_expression_does(pattern: str, target: str) -> None:
    body, ends = pattern.removesuffix("$"), pattern.endswith("$")
    expression = ".*".join(re.escape(part) for part in body.split("*")) + ("$" if ends else "")
    assert robots.matches(pattern, target) == bool(re.match(expression, target, re.DOTALL))


LINES = st.one_of(
    st.sampled_from(
        [
            "User-agent: *", "user-agent:unclip", "USER-AGENT : other", "Disallow: /a",
            "allow:/a*b$", "Disallow:", "#", "Disallow: /ä", "Crawl-delay: 1",
            "\ufeff", "Disallow: " + "*a" * 500,
        ]
    ),
    st.text(max_size=20),
)  # fmt: skip


@given(st.lists(LINES, max_size=12), st.text(max_size=30))
def test_any_robots_txt_gives_bounded_rules(lines: list[str], target: str) -> None:
    text = "\n".join(lines)
    with bounded():
        rules = robots.parse(text)
        rules.allows(target)
    assert len(rules.rules) <= len(text.splitlines())
    assert rules.size_bytes <= robots.RULE_BYTES * len(rules.rules) + 12 * len(text)


@given(st.lists(LINES.filter(lambda line: "llow" not in line), max_size=8), st.text(max_size=20))
def test_a_group_for_us_that_forbids_everything_does_so_whatever_stands_around(
    lines: list[str], target: str
) -> None:
    forbidding = ["User-agent: unclip", "Disallow: /"]
    assert not robots.parse("\n".join([*lines, *forbidding, *lines])).allows("/" + target)
