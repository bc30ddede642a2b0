"""All spellings of a URL have one canonical form, which is that of browsers, and none of them shows
a password.
"""

import random

import pyarrow as pa
import pytest

from infra.canonical_url import (
    canonical_column,
    canonical_origin,
    canonical_url,
    parse_url,
    redirect_target,
    without_user,
)

SPELLINGS = {
    "http://pics.net/private/a.png": [
        "HTTP://PICS.net./private/a.png",
        "http://user:pass@pics.net:80/private/a.png#top",
        "http:\\\\pics.net\\private\\a.png",
        "http:///pics.net/private/a.png",
        "http:pics.net/private/a.png",
        " \th\nttp://pics.net/pri\tvate/a.png\r\n",
        "http://pics.net/x/../private/./a.png",
        "http://pics.net/x/%2e%2E/private/%2E/a.png",
        "http://pics.net/%70rivate/a%2Epng",
        "http://pics%2enet/private/a.png",
        "http://ｐｉｃｓ。net/private/a.png",
        "http://pi\u00adcs.net/private/a.png",
        "http://a@b@pics.net:0080/private/a.png",
    ],
    "https://xn--bcher-kva.test/%C3%A4?q=%C3%A4%20b": [
        "https://BÜCHER.test/ä?q=ä b",
        "https://xn--BCHER-kva.test:443/%c3%a4?q=%c3%a4%20b",
        "https://bu\u0308cher.test/%C3%A4?q=%C3%A4 b",
    ],
    "http://127.0.0.1/": ["http://2130706433", "http://0x7f.1/?", "http://0177.0.0.01"],
    "http://0.0.0.0/": ["http://0x/", "http://0x.0."],
    "http://[2001:db8::1]:8080/": ["http://[2001:DB8:0:0::0:1]:08080"],
    "http://[::ffff:7f00:1]/": ["http://[::ffff:127.0.0.1]/"],
    "https://xn--strae-oqa.test/": ["https://straße.test"],
    "http://h/100%25%2F%2570": ["http://h/100%%2f%2570"],
    "http://h/?a=b/../c": ["http://h?a=b/../c"],
    "http://h/a//b/": ["http://h/../a//c/../b/."],
}


@pytest.mark.parametrize(
    ("canonical", "spelling"),
    [(form, text) for form, texts in SPELLINGS.items() for text in (form, *texts)],
)
def test_all_spellings_of_a_url_have_one_form(canonical: str, spelling: str) -> None:
    assert canonical_url(spelling) == canonical_origin(spelling) == canonical


@pytest.mark.parametrize(
    "text",
    ["", "not a url", "ftp://h/", "file:///a", "http://", "http://u@/x", "http://[::1/", "http://[1]",
     "http://h:99999/", "http://h:8x/", "http://h:٣/", "http://a b/", "http://a%00b/", "http://a..b/",
     "http://256.1.1.1/", "http://1.2.3.4.5/", "http://[::1%25eth0]/",
     "http://\u2028/"],
)  # fmt: skip
def test_what_has_no_valid_host_is_an_error_without_its_text(text: str) -> None:
    with pytest.raises(ValueError, match=r"host|port|http") as caught:
        parse_url(text)
    assert text not in str(caught.value) or not text


def test_the_canonical_form_of_random_urls_is_stable() -> None:
    draw = random.Random(0)
    alphabet = [
        "%",
        "2",
        "e",
        "E",
        "5",
        ".",
        "/",
        "\\",
        "?",
        "#",
        ":",
        "@",
        "a",
        "Z",
        " ",
        "\t",
        "ü",
    ]
    for _ in range(5000):
        url = "http://h" + "".join(draw.choices(alphabet, k=draw.randrange(12)))
        try:
            form = canonical_url(url)
        except ValueError:
            continue
        assert canonical_url(form) == str(parse_url(form)) == form
        assert form.isascii() and "@h" not in form


@pytest.mark.parametrize(
    ("location", "target"),
    [
        ("/b", "http://h/b"),
        ("b?q=\\x", "http://h/a/b?q=\\x"),
        ("//g/x", "http://g/x"),
        ("\\\\g\\x", "http://g/x"),
        ("/\\/g/x", "http://g/x"),
        (" ht\ntp:\\\\g/x", "http://g/x"),
        ("../../x", "http://h/x"),
        ("https:/g/x", "https://g/x"),
    ],
)
def test_a_redirect_leads_where_browsers_go(location: str, target: str) -> None:
    result = redirect_target("http://h/a/c", location)
    assert canonical_url(result) == canonical_url(target)


def test_no_password_is_left_in_any_text() -> None:
    for text in (
        "http://u:secret@h/x",
        "http://u:secret@[bad/x",
        "http://u:sec/secret@h:99999/x",
        "ht\ntp://u:secret@h:bad/",
        "ftp://u:secret@h/x",
        "HTTPS:\\\\u:secret@h:bad",
    ):
        assert "secret" not in canonical_origin(text)
    with pytest.raises(ValueError, match="host"):  # an invalid URL does not become a valid one
        parse_url(canonical_origin("http://[bad/@h/x"))
    line = "2 columns for 3: http://u:secret@h/x@y,s3://b/c@d.parquet,npm:@a/b@1"
    assert without_user(line) == line.replace("u:secret@", "")
    for origin in ("npm:@a/b@1.0/x.png", "folder:a@b/c", "s3://b/c@d.png"):
        assert canonical_origin(origin) == origin


def test_a_column_becomes_canonical_where_it_holds_urls() -> None:
    texts = ["http://h/a.png", "HTTP://H/a.png", None, "folder:x", "http://h:80/a", " \nhttp://h/b"]
    column = pa.chunked_array([texts[:2], texts[2:]], pa.string())
    expected = [text and canonical_origin(text) for text in texts]
    assert canonical_column(column).to_pylist() == expected
    assert canonical_column(column.slice(0, 1)).to_pylist() == texts[:1]
