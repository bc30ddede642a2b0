"""The search page in a real browser: by keyboard alone, by a dropped picture, behind a token, with
hostile captions, on a phone.
"""

from pathlib import Path

import pytest

from indexing.service.state import Service
from tests.helpers import evaluation_run
from tests.helpers.browser import CHROMIUM, Browser
from tests.helpers.evaluation_run import HOSTILE, row
from tests.helpers.search_service import Fake, serving

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine"),
]
TOKEN = "a-token-of-twenty-letters"
SMALL = """[...document.querySelectorAll('a, button, summary, select, input')]
  .filter((each) => each.offsetHeight && !each.matches('.unseen, .skip'))
  .map((each) => [each.name || each.id || each.className || each.tagName, (each.closest('label.check') || each).offsetHeight])
  .filter(([, height]) => height < 40)"""  # noqa: E501
FULL = "document.querySelectorAll('.card').length == 24"


def run_in(folder: Path) -> Service:
    """Return the service of the drawn run, one caption of it hostile."""
    rows = [
        *evaluation_run.usual_rows(),
        row(
            3, "hostile", "train", caption=HOSTILE, captions=[HOSTILE], origin="javascript:alert(1)"
        ),
    ]
    return Fake(folder, rows).service()


def test_the_page_by_keyboard_by_picture_and_on_a_phone(tmp_path: Path) -> None:
    with serving(run_in(tmp_path / "run")) as address, Browser(tmp_path / "browser") as browser:
        browser.go(address)
        browser.until("document.activeElement && document.activeElement.id == 'text'")
        for letter in "colour 3":
            browser.press(letter, letter)
        browser.press("Enter", "\r")
        browser.until(FULL)
        assert browser.run("location.hash") == "#text=colour%203"
        browser.until(
            "[...document.querySelectorAll('.card img')].slice(0, 4).every((each) => "
            "each.complete && each.naturalWidth == 20)"
        )
        captions = browser.run(
            "[...document.querySelectorAll('.caption')].map((each) => each.textContent)"
        )
        assert HOSTILE in captions and "colour 3" in captions
        assert (
            browser.run("document.querySelectorAll('#results script, #results [onerror]').length")
            == 0
        )
        links = browser.run("[...document.querySelectorAll('#results a')].map((each) => each.href)")
        assert len(links) == 23 and all(
            link.startswith("https://example.org/") for link in links
        ), "javascript: becomes no link"

        browser.run("document.querySelector('.like').focus()")
        browser.press("ArrowRight")
        assert (
            browser.run("[...document.querySelectorAll('.like')].indexOf(document.activeElement)")
            == 1
        )
        browser.press("ArrowDown")
        columns = browser.run(
            "getComputedStyle(document.getElementById('results')).gridTemplateColumns.split(' "
            "').length"
        )
        assert columns > 2
        assert (
            browser.run("[...document.querySelectorAll('.like')].indexOf(document.activeElement)")
            == 1 + columns
        )
        browser.press("Enter", "\r")
        browser.until(
            FULL
            + " && location.hash.startsWith('#key=') && !document.getElementById('asked').hidden"
        )
        browser.run("document.getElementById('more').click()")
        browser.until("document.querySelectorAll('.card').length > 24")
        browser.run("history.back()")
        browser.until(
            "location.hash == '#text=colour%203' && document.getElementById('asked').hidden && "
            + FULL
        )

        browser.run(
            """(async () => {
              const canvas = document.createElement("canvas");
              canvas.width = canvas.height = 40;
              const context = canvas.getContext("2d");
              context.fillStyle = "rgb(COLOUR)";
              context.fillRect(0, 0, 40, 40);
              const blob = await new Promise((done) => canvas.toBlob(done));
              const transfer = new DataTransfer();
              transfer.items.add(new File([blob], "mine.png", { type: "image/png" }));
              document.dispatchEvent(new DragEvent("drop", { dataTransfer: transfer }));
            })()""".replace("COLOUR", ",".join(map(str, evaluation_run.colour(9))))
        )
        browser.until(
            "document.getElementById('asked-words').textContent == 'Pictures like mine.png'"
        )
        browser.until(
            "document.querySelector('.caption') && document.querySelector('.caption').textContent "
            "== 'colour 9'"
        )

        browser.look(tmp_path / "phone.png", 390, 800)
        assert browser.run("document.documentElement.scrollWidth") <= 390, (
            "nothing sticks out on a phone"
        )
        assert (
            browser.run(
                "getComputedStyle(document.getElementById('results')).gridTemplateColumns.split(' "
                "').length"
            )
            == 2
        )
        browser.run("document.getElementById('filters').open = true")
        small = browser.run(SMALL)
        assert small == [], "a thumb can hit everything"
        assert (
            browser.run("getComputedStyle(document.querySelector('header')).position") == "static"
        ), "open filters leave room for results"
        browser.run("document.getElementById('filters').open = false")
        assert (
            browser.run("getComputedStyle(document.querySelector('header')).position") == "sticky"
        )
        browser.look(tmp_path / "landscape.png", 800, 360)
        assert (
            browser.run("getComputedStyle(document.querySelector('header')).position") == "static"
        ), "a low screen belongs to the results"
        assert browser.errors == []


def test_filters_are_in_the_address_and_in_the_history(tmp_path: Path) -> None:
    with serving(run_in(tmp_path / "run")) as address, Browser(tmp_path / "browser") as browser:
        browser.go(f"{address}/#text=colour 3&style=framed&min_side_px=10&near_copies=no")
        styles = "[...new Set([...document.querySelectorAll('.facts')].map((each) => each.textContent.split(' · ')[0]))].join()"  # noqa: E501
        browser.until(f"document.querySelectorAll('.card').length == 16 && {styles} == 'framed'")
        assert browser.run("document.getElementById('filter-count').textContent") == "(3)"
        browser.until(
            "[...document.querySelector('[name=style]').options].some((option) => option.text == "
            "'plain (16)')"
        )
        assert browser.run("document.querySelector('[name=style]').value") == "framed", (
            "the counts came after the choice"
        )
        choose(browser, "min_side_px", "21")
        browser.until(
            "document.getElementById('status').textContent == 'Nothing matches these filters.'"
        )
        choose(browser, "min_side_px", "")
        choose(browser, "style", "plain")
        browser.until(f"{styles} == 'plain'")
        assert browser.run("location.hash") == "#style=plain&near_copies=no&text=colour%203"
        browser.run("history.back()")
        browser.until(
            f"{styles} == 'framed' && document.querySelector('[name=style]').value == 'framed'"
        )
        browser.run("document.querySelector('.like').click()")
        browser.until("location.hash.includes('&key=') && !document.getElementById('asked').hidden")
        assert browser.run("location.hash").startswith("#style=framed&near_copies=no&key="), (
            "more like this goes on with the filters"
        )
        assert browser.run(
            "[...document.querySelectorAll('h1, h2')].map((each) => each.textContent)"
        ) == ["Search the pictures", "Results"]
        assert browser.errors == []


def choose(browser: Browser, name: str, value: str) -> None:
    field = f"document.querySelector('[name={name}]')"
    browser.run(
        f"{field}.value = '{value}'; {field}.dispatchEvent(new Event('change', "
        f"{{ bubbles: true }}))"
    )


def test_the_page_can_be_read_in_either_colour_scheme(tmp_path: Path) -> None:
    with serving(run_in(tmp_path / "run")) as address, Browser(tmp_path / "browser") as browser:
        browser.go(address)
        for is_dark in (False, True):
            browser.look(tmp_path / "page.png", is_dark=is_dark)
            assert browser.run(contrast("#login-error", "color", "dialog")) >= 4.5
            assert browser.run(contrast("#status", "color", "body")) >= 4.5
            for field in ("#text", "#pick", "[name=style]", "[name=min_side_px]"):
                assert browser.run(contrast(field, "borderTopColor", field)) >= 3, field
                assert browser.run(contrast(field, "borderTopColor", "body")) >= 3, field
        shown = "getComputedStyle(document.querySelector('.keys')).display"
        assert browser.run(shown) == "inline"
        browser.look(tmp_path / "phone.png", 390, 800)
        assert browser.run(shown) == "none" and browser.run(
            "document.getElementById('hint').innerText"
        ).strip().endswith("paste one.")


def contrast(inner: str, what: str, ground: str) -> str:
    """Return the script that computes WCAG's contrast ratio of a colour of one element with the
    background of another.
    """
    return f"""(() => {{
      const light = (colour) => {{
        const parts = colour.match(/[\\d.]+/g).slice(0, 3).map((each) => each / 255);
        const linear = parts.map((each) => each <= 0.04045 ? each / 12.92 : ((each + 0.055) / 1.055) ** 2.4);
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2] + 0.05;
      }};
      const one = light(getComputedStyle(document.querySelector("{inner}")).{what});
      const other = light(getComputedStyle(document.querySelector("{ground}")).backgroundColor);
      return Math.max(one, other) / Math.min(one, other);
    }})()"""  # noqa: E501


def test_the_page_asks_for_the_token_and_goes_on(tmp_path: Path) -> None:
    with (
        serving(run_in(tmp_path / "run"), token=TOKEN) as address,
        Browser(tmp_path / "browser") as browser,
    ):
        browser.go(f"{address}/#text=colour 3")
        browser.until("document.getElementById('login').open")
        browser.run(
            "document.getElementById('token').value = 'wrong'; document.querySelector('#login "
            ".main').click()"
        )
        browser.until("document.getElementById('login-error').textContent == 'the token is wrong'")
        browser.run(
            f"document.getElementById('token').value = '{TOKEN}'; document.querySelector('#login "
            f".main').click()"
        )
        browser.until(FULL + " && !document.getElementById('login').open")
        browser.until("document.querySelector('.card img').naturalWidth == 20")
        assert browser.run("document.cookie") == "", "no script can read the token"


def test_who_closes_the_dialog_is_told_that_nothing_was_searched_and_may_try_again(
    tmp_path: Path,
) -> None:
    with (
        serving(run_in(tmp_path / "run"), token=TOKEN) as address,
        Browser(tmp_path / "browser") as browser,
    ):
        browser.go(f"{address}/#text=colour 3")
        browser.until("document.getElementById('login').open")
        browser.press("Escape")
        browser.until("!document.getElementById('login').open")
        browser.until(
            "document.getElementById('status').textContent.startsWith('Nothing was searched')"
        )
        browser.run("document.querySelector('#form .main').click()")
        browser.until("document.getElementById('login').open")
        browser.run(
            f"document.getElementById('token').value = '{TOKEN}'; document.querySelector('#login "
            f".main').click()"
        )
        browser.until(FULL)
