"""What a host does not want is not asked for: robots.txt by RFC 9309, opt-out lists; and no host is asked too much at once."""

import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from flows import fetch, ingest
from flows.fetch import FetchError, fetch_image
from flows.manners import Hosts, parse
from flows.opt_out import read_opt_out
from flows.sources import DataConfig
from infra.errors import CallerError
from tests.hostile_server import Server
from tests.test_fetch import RULES
from tests.test_ingest import config_for, write_list

POLITE = replace(RULES, robots=True, timeout_s=5)


@pytest.fixture(autouse=True)
def _fresh_hosts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fetch, "hosts", Hosts())


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
        ("User-agent: other\nUser-agent: Unclip\nDisallow: /b\n\nUser-agent: *\nDisallow: /", "/a", True),  # our own group alone
        ("User-agent: unclip\nDisallow: /a\n\nUser-agent: x\nDisallow: /\n\nUser-agent: unclip\nDisallow: /b", "/b", False),  # merged
        ("\ufeffUser-agent: * # all\nDisallow: /a # here\nnonsense\n", "/a", False),
        ("Disallow: /\n", "/a", True),  # a rule of no group
        ("User-agent: *\nDisallow: /(.*+[", "/(.*+[", False),  # no regular expression of theirs is ours
    ],
)
def test_robots_txt_is_read_as_the_rfc_says(text: str, target: str, allowed: bool) -> None:
    assert parse(text).allows(target) is allowed


def test_what_robots_txt_forbids_is_not_asked_and_it_is_read_once(server: Server) -> None:
    server.robots = b"User-agent: *\nDisallow: /good/\n"
    with pytest.raises(FetchError, match=r"robots: robots\.txt of 127\.0\.0\.1 forbids it"):
        fetch_image(f"{server.base}/good/1.png", POLITE)
    threads = [threading.Thread(target=fetch_image, args=(f"{server.base}/jpeg/{n}.jpg", POLITE)) for n in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert server.asked["/robots.txt"] == 1 and server.asked["/good/1.png"] == 0 and server.asked.total() == 7


def test_a_redirect_to_what_is_forbidden_is_not_followed(server: Server) -> None:
    server.robots = b"User-agent: *\nDisallow: /good/\n"
    with pytest.raises(FetchError, match="robots"):
        fetch_image(f"{server.base}/redirect/1.png", POLITE)
    assert server.asked["/redirect/1.png"] == 1 and server.asked["/good/1.png"] == 0


def test_a_host_without_robots_txt_allows_and_one_that_fails_is_tried_later(server: Server) -> None:
    assert fetch_image(f"{server.base}/good/1.png", POLITE)
    fetch.hosts = Hosts()
    server.robots = None
    with pytest.raises(FetchError, match=r"http_unavailable: robots\.txt: HTTP 503") as caught:
        fetch_image(f"{server.base}/good/2.png", POLITE)
    assert caught.value.reason in fetch.PASSING and server.asked["/good/2.png"] == 0
    server.robots = b""
    assert fetch_image(f"{server.base}/good/2.png", POLITE)  # the failure is not remembered


def test_our_own_server_is_not_asked_for_leave(server: Server) -> None:
    server.robots = b"User-agent: *\nDisallow: /\n"
    rules = replace(POLITE, loopback=server.base.removeprefix("http://"))
    assert fetch_image(f"{server.base}/good/1.png", rules) and server.asked["/robots.txt"] == 0


def test_one_host_gets_no_more_requests_at_once_than_agreed() -> None:
    with Server(delay_s=0.05) as server:
        threads = [
            threading.Thread(target=fetch_image, args=(f"{server.base}/good/{n}.png", replace(RULES, per_host=2, timeout_s=0.5)))
            for n in range(24)
        ]
        clock = time.monotonic()
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert server.most_at_once == 2 and server.asked.total() == 24  # and waiting for one's turn is no time-out
        assert time.monotonic() - clock >= 24 / 2 * 0.05


def test_opted_out_hosts_and_urls_are_never_asked_and_counted(server: Server, tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [{"url": f"{server.base}/good/{n}.png", "caption": str(n)} for n in range(6)]
    rows += [{"url": "http://img.nothanks.test/a.png", "caption": "a"}, {"url": "http://notnothanks.test/b.png", "caption": "b"}]
    source = write_list(tmp_path / "list.jsonl", rows)
    (tmp_path / "no.txt").write_text(f"# by request\nNoThanks.test\n{server.base}/good/3.png\n{server.base}/jpeg/\n")
    config = config_for(source, opt_out=[str(tmp_path / "no.txt")])
    counts = ingest.run(config, tmp_path / "out", tmp_path / "work")
    assert counts["dropped"] == {"opted_out": 2, "unreachable": 1} and counts["out"] == 5 and server.asked["/good/3.png"] == 0
    (tmp_path / "more.txt").write_text("another.test\n")
    longer = config_for(source, opt_out=[str(tmp_path / "no.txt"), str(tmp_path / "more.txt")])
    assert longer.keyed() != config.keyed()
    before = config.keyed()
    (tmp_path / "no.txt").write_text("")
    assert config.keyed() != before  # a list that changes makes the ingest stale


def test_an_entry_means_what_it_says(tmp_path: Path) -> None:
    (tmp_path / "no.txt").write_text("a.test\nhttps://b.test/one.png\nhttps://b.test/all/\n")
    lists = read_opt_out([str(tmp_path / "no.txt")])
    assert all(map(lists.covers, ("http://a.test/x", "https://deep.A.test./x", "https://b.test/one.png", "https://b.test/all/x.png")))
    assert not any(
        map(lists.covers, ("http://ba.test/x", "https://b.test/two.png", "https://b.test/al", "http://[", "", "folder:a.test/x"))
    )


def test_a_list_that_cannot_be_read_stops_the_run(tmp_path: Path) -> None:
    config: DataConfig = config_for(write_list(tmp_path / "l.jsonl", [{"url": "http://h/a.png", "caption": "x"}]), opt_out=["gone.txt"])
    with pytest.raises(CallerError, match=r"\[data\] opt_out 'gone.txt' cannot be read"):
        ingest.run(config, tmp_path / "out", tmp_path / "work")
