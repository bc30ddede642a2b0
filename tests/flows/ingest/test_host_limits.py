"""What a host does not want is not asked for: robots.txt by RFC 9309, opt-out lists; and no host is
asked too much at once.
"""

import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from flows.ingest import host_limits, http_fetch, ingest
from flows.ingest.host_limits import FAILURE_S, Hosts
from flows.ingest.http_fetch import FetchError, fetch_image
from flows.ingest.robots import parse
from flows.sources import opt_out
from flows.sources.opt_out import OptOut, read_opt_out
from flows.sources.url_table import DataConfig
from infra.errors import CallerError
from tests.flows.ingest.test_http_fetch import RULES
from tests.flows.ingest.test_ingest import config_for, write_list
from tests.helpers.hostile_server import Server
from tests.helpers.local_ingest import local_ingest

POLITE = replace(RULES, robots=True, timeout_s=5)


@pytest.fixture(autouse=True)
def _fresh_hosts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_fetch, "hosts", Hosts())


@pytest.fixture
def server() -> Iterator[Server]:
    with Server() as running:
        yield running


@pytest.mark.parametrize(
    ("text", "target", "allowed"),
    [
        ("", "/a", True),
        ("User-agent: *\nDisallow: /", "/a", False),
        ("User-agent: *\nDisallow:", "/a", True),
        ("user-agent: *\ndisallow: /private\n", "/private/a.png", False),
        ("User-agent: *\nDisallow: /private", "/public/a.png", True),
        ("User-agent: *\nDisallow: /a\nAllow: /a/b", "/a/b/c", True),  # the longest match decides
        ("User-agent: *\nAllow: /a\nDisallow: /a", "/a", True),  # and a tie allows
        ("User-agent: *\nDisallow: /*.png$", "/x/y.png", False),
        ("User-agent: *\nDisallow: /*.png$", "/x/y.png?q", True),
        ("User-agent: *\nDisallow: /a?x=", "/a?x=1", False),
        ("User-agent: other\nDisallow: /", "/a", True),
        (
            "User-agent: other\nUser-agent: Unclip\nDisallow: /b\n\nUser-agent: *\nDisallow: /",
            "/a",
            True,
        ),  # our own group alone
        (
            "User-agent: unclip\nDisallow: /a\n\nUser-agent: x\nDisallow: /\n\nUser-agent: "
            "unclip\nDisallow: /b",
            "/b",
            False,
        ),  # merged
        ("\ufeffUser-agent: * # all\nDisallow: /a # here\nnonsense\n", "/a", False),
        ("Disallow: /\n", "/a", True),  # a rule of no group
        (
            "User-agent: *\nDisallow: /(.*+[",
            "/(.*+%5B",
            False,
        ),  # no regular expression of theirs is ours
        ("User-agent: *\nDisallow: /*a*b$", "/xaxbxb", False),
        ("User-agent: *\nDisallow: /*ab*b$", "/ab", True),  # one letter does not stand for two
        ("User-agent: *\nDisallow: /a$", "/a/", True),
        ("User-agent: *\nDisallow: *", "/a", False),
        ("User-agent: *\nDisallow: /*/b", "/a", True),
        ("User-agent: *\nDisallow: /b\u00fccher/", "/b%C3%BCcher/a.png", False),
        ("User-agent: *\nDisallow: /%7euser/%2f%c3%a4 b?x='", "/~user/%2F%C3%A4%20b?x='", False),
        ("User-agent: unclip/0.1\nDisallow: /", "/a", False),  # a version or comment follows
        ("User-Agent: UnCLIP bot\nDisallow: /\n\nUser-agent: *\nAllow: /", "/a", False),
        ("User-agent: * # all\nUser-agent: x\nDisallow: /", "/a", False),
        ("User-agent: unclip-news\nDisallow: /", "/a", True),  # another product
        ("User-agent: unclipper/1\nDisallow: /", "/a", True),
        ("User-agent: *bot\nDisallow: /", "/a", True),
    ],
)
def test_robots_txt_is_read_as_the_rfc_says(text: str, target: str, allowed: bool) -> None:
    assert parse(text).allows(target) is allowed


def test_patterns_of_a_hostile_host_take_no_time() -> None:
    clock = time.monotonic()
    rules = parse(
        "User-agent: *\n"
        + "Disallow: /"
        + "*a" * 60
        + "!\n"
        + "Disallow: /*a*a*a*a*a*a*a*a*a*a*b$\n" * 1000
    )
    assert rules.allows("/" + "a" * 5000)
    assert time.monotonic() - clock < 2


def test_what_robots_txt_forbids_is_not_asked_and_it_is_read_once(server: Server) -> None:
    server.robots = b"User-agent: *\nDisallow: /good/\n"
    with pytest.raises(FetchError, match=r"robots: robots\.txt of 127\.0\.0\.1 forbids it"):
        fetch_image(f"{server.base}/good/1.png", POLITE)
    threads = [
        threading.Thread(target=fetch_image, args=(f"{server.base}/jpeg/{n}.jpg", POLITE))
        for n in range(6)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (
        server.asked["/robots.txt"] == 1
        and server.asked["/good/1.png"] == 0
        and server.asked.total() == 7
    )


def test_a_redirect_to_what_is_forbidden_is_not_followed(server: Server) -> None:
    server.robots = b"User-agent: *\nDisallow: /good/\n"
    with pytest.raises(FetchError, match="robots"):
        fetch_image(f"{server.base}/redirect/1.png", POLITE)
    assert server.asked["/redirect/1.png"] == 1 and server.asked["/good/1.png"] == 0


def test_a_host_without_robots_txt_allows_and_one_that_fails_is_tried_later(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert fetch_image(f"{server.base}/good/1.png", POLITE)
    http_fetch.hosts = Hosts()
    server.robots = None
    with pytest.raises(FetchError, match=r"http_unavailable: robots\.txt: HTTP 503") as caught:
        fetch_image(f"{server.base}/good/2.png", POLITE)
    assert caught.value.reason in http_fetch.TEMPORARY_REASONS and server.asked["/good/2.png"] == 0
    asked = server.asked["/robots.txt"]
    for number in range(3, 6):
        with pytest.raises(FetchError, match=r"http_unavailable: robots\.txt: HTTP 503"):
            fetch_image(f"{server.base}/good/{number}.png", replace(POLITE, retries=2))
    assert server.asked["/robots.txt"] == asked  # the failure is remembered
    server.robots = b""
    later = time.monotonic() + FAILURE_S
    monkeypatch.setattr(host_limits.time, "monotonic", lambda: later)
    assert fetch_image(f"{server.base}/good/2.png", replace(POLITE, timeout_s=100))  # for a while


def test_hosts_that_were_not_asked_for_longest_are_forgotten_unless_in_use() -> None:
    hosts = Hosts(max_hosts=3, max_bytes=1000)
    with hosts.slot(("http", "used", 80), 1):
        for number in range(10):
            assert hosts.allows(
                ("http", str(number), 80), "/", lambda: "User-agent: *\nDisallow: /a"
            )
        assert [host for _, host, _ in hosts.hosts_by_origin] == ["used", "8", "9"]
    for number in range(3):
        assert not hosts.allows(
            ("http", str(number), 80),
            "/a",
            lambda: "User-agent: *\nDisallow: /a\nDisallow: /b\nDisallow: /c",
        )
    assert len(hosts.hosts_by_origin) == 2 and hosts.rules_bytes <= 1000


def test_the_places_at_a_host_are_divided_among_the_tasks(tmp_path: Path) -> None:
    def places(per_host: int, workers: int) -> int:
        config = config_for({"kind": "urls", "path": "l.jsonl"}, per_host=per_host)
        opt_out.save(OptOut(), tmp_path / "opt_out.json")
        return int(
            ingest.shard_settings(config, tmp_path, "http://x", workers)["rules"]["per_host"]
        )

    assert (places(16, 4), places(16, 3), places(2, 8), places(0, 4)) == (4, 5, 1, 0)


@pytest.mark.slow
def test_a_redirect_to_an_opted_out_host_is_not_followed(server: Server, tmp_path: Path) -> None:
    source = write_list(
        tmp_path / "list.jsonl",
        [{"url": f"{server.base}/{kind}/1.png", "caption": kind} for kind in ("away", "jpeg")],
    )
    (tmp_path / "no.txt").write_text("localhost\n")
    counts = local_ingest(config_for(source, opt_out=[str(tmp_path / "no.txt")]), tmp_path)
    assert (
        counts["dropped"] == {"opted_out": 1}
        and server.asked["/away/1.png"] == 1
        and server.asked["/good/1.png"] == 0
    )


def test_our_own_server_is_not_asked_for_leave(server: Server) -> None:
    server.robots = b"User-agent: *\nDisallow: /\n"
    rules = replace(POLITE, loopback=server.base)
    assert fetch_image(f"{server.base}/good/1.png", rules) and server.asked["/robots.txt"] == 0


def test_one_host_gets_no_more_requests_at_once_than_agreed() -> None:
    with Server(delay_s=0.05) as server:
        threads = [
            threading.Thread(
                target=fetch_image,
                args=(f"{server.base}/good/{n}.png", replace(RULES, per_host=2, timeout_s=0.5)),
            )
            for n in range(24)
        ]
        clock = time.monotonic()
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert (
            server.most_at_once == 2 and server.asked.total() == 24
        )  # and waiting for one's turn is no time-out
        assert time.monotonic() - clock >= 24 / 2 * 0.05


@pytest.mark.slow
def test_opted_out_hosts_and_urls_are_never_asked_and_counted(
    server: Server, tmp_path: Path
) -> None:
    rows: list[dict[str, Any]] = [
        {"url": f"{server.base}/good/{n}.png", "caption": str(n)} for n in range(6)
    ]
    rows += [
        {"url": "http://img.nothanks.test/a.png", "caption": "a"},
        {"url": "http://notnothanks.test/b.png", "caption": "b"},
    ]
    source = write_list(tmp_path / "list.jsonl", rows)
    (tmp_path / "no.txt").write_text(
        f"# by request\nNoThanks.test\n{server.base}/good/3.png\n{server.base}/jpeg/\n"
    )
    config = config_for(source, opt_out=[str(tmp_path / "no.txt")])
    counts = local_ingest(config, tmp_path)
    assert (
        counts["dropped"] == {"opted_out": 2, "unreachable": 1}
        and counts["out"] == 5
        and server.asked["/good/3.png"] == 0
    )
    (tmp_path / "more.txt").write_text("another.test\n")
    longer = config_for(source, opt_out=[str(tmp_path / "no.txt"), str(tmp_path / "more.txt")])
    assert longer.keyed() != config.keyed()
    before = config.keyed()
    (tmp_path / "no.txt").write_text("")
    assert config.keyed() != before  # a list that changes makes the ingest stale


def test_an_entry_means_what_it_says(tmp_path: Path) -> None:
    (tmp_path / "no.txt").write_text("a.test\nhttps://b.test/one.png\nhttps://b.test/all/\n")
    lists = read_opt_out([str(tmp_path / "no.txt")])
    assert all(
        map(
            lists.covers,
            (
                "http://a.test/x",
                "https://deep.A.test./x",
                "https://b.test/one.png",
                "https://b.test/all/x.png",
            ),
        )
    )
    assert not any(
        map(
            lists.covers,
            (
                "http://ba.test/x",
                "https://b.test/two.png",
                "https://b.test/al",
                "http://[",
                "",
                "folder:a.test/x",
            ),
        )
    )


@pytest.mark.parametrize(
    ("entry", "urls", "others"),
    [
        ("a.test/", ["http://a.test/x", "https://b.a.test:8080/"], ["http://ba.test/"]),
        ("a.test:8080", ["http://a.test:8080/x", "http://b.a.test:8080"], ["http://a.test/x"]),
        ("a.test:443", ["https://a.test/x"], ["http://a.test/x"]),
        ("*.a.test", ["http://b.a.test/x"], []),
        ("a.test/one/", ["http://a.test/one/x", "https://a.test/one/"], ["http://a.test/two"]),
        ("https://a.test", ["https://a.test/x"], ["http://b.test/x"]),
        ("http://A.test:80/%c3%a4.png", ["http://a.test/ä.png"], ["http://a.test/a.png"]),
        ("bücher.test", ["http://xn--bcher-kva.test/x", "http://BÜCHER.test/x"], []),
        ("xn--bcher-kva.test", ["http://bücher.test/x", "http://www.bücher.test/"], []),
        ("http://bücher.test/ä/", ["http://xn--bcher-kva.test/%C3%A4/1.png"], []),
        ("-a-.test", ["http://-a-.test/x"], []),
        ("test", ["http://a$b.test/x"], []),
        ("straße.test", ["http://straße.test", "http://strasse.test/x"], []),
        ("192.0.2.1", ["http://192.0.2.1/x", "http://0xC0000201"], ["http://192.0.2.10/x"]),
        ("pics.test", ["http://pics.test./x", "http://u@pics.test/", "HTTP:\\\\pics%2etest"], []),
        (
            "pics.test/private/",
            [
                "http://PICS.test/private/x",
                "http://pics.test/a/../private/x",
                "https://u:p@pics.test./%70rivate/%2e/x",
                "http://pics.test\\pri\tvate\\x",
            ],
            ["http://pics.test/privates/x", "http://pics.test/private"],
        ),
        ("[2001:db8::1]:80", ["http://[2001:DB8:0::1]/x"], ["http://[2001:db8::1]:81/x"]),
    ],
)
@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-8", "utf-16"])
def test_an_entry_holds_in_every_spelling(
    tmp_path: Path, entry: str, urls: list[str], others: list[str], encoding: str
) -> None:
    (tmp_path / "no.txt").write_text(f"{entry}\nlast.test\n", encoding=encoding)
    lists = read_opt_out([str(tmp_path / "no.txt")])
    assert [url for url in (*urls, "http://last.test/") if not lists.covers(url)] == []
    assert [url for url in others if lists.covers(url)] == []


@pytest.mark.parametrize(
    "entry",
    ["someone@a.test", "a b.test", "10.0.0.0/8", "N/A", "ftp://a.test/", "http:///x", "a..test",
     "a$.test", "User-agent: *", "a.test:99999", "*", "\ufeffhttps://a.test"],
)  # fmt: skip
def test_an_entry_that_cannot_be_understood_is_an_error_that_names_it(
    tmp_path: Path, entry: str
) -> None:
    (tmp_path / "no.txt").write_text(f"# first\n{entry}\n")
    with pytest.raises(CallerError, match=r"no.txt' line 2: .* is neither a host nor a URL"):
        read_opt_out([str(tmp_path / "no.txt")])


def test_a_list_that_cannot_be_read_stops_the_run(tmp_path: Path) -> None:
    config: DataConfig = config_for(
        write_list(tmp_path / "l.jsonl", [{"url": "http://h/a.png", "caption": "x"}]),
        opt_out=["gone.txt"],
    )
    with pytest.raises(CallerError, match=r"\[data\] opt_out 'gone.txt' cannot be read"):
        local_ingest(config, tmp_path)
