"""The load benchmark's judge finds what is wrong with an answer, and nothing wrong with a right
one.
"""

import json
from typing import Any

import pytest

from tests.benchmarks.search_load import KINDS, Answer, Asker, main
from tests.helpers.search_changes import Changes


@pytest.fixture
def asker() -> Asker:
    changes = Changes(None, 4, False)
    changes.root = object()  # type: ignore[assignment]
    changes._whole, changes._half = frozenset("abcd"), frozenset("ab")
    changes.going, changes.gone, changes.added = {"b": 10.0}, {"b": 11.0}, {"new"}
    return Asker(KINDS, ["a", "b"], 4, {"licence": {"CC0": 2}}, changes)


def answer(keys: str | list[str], status: int = 200, **more: Any) -> tuple[int, bytes]:
    results = [
        {"key": key, "score": 1 - place / 10, "licence": "CC0"} for place, key in enumerate(keys)
    ]
    return status, json.dumps({"version": "one", "samples": 4, "results": results} | more).encode()


@pytest.mark.parametrize(
    ("question", "given", "asked", "answered", "words"),
    [
        ({"text": "x"}, answer("abcd"), 5, 6, ""),
        ({"text": "x"}, answer(["a", "new"]), 5, 6, ""),
        ({"text": "x"}, answer("ab"), 10.5, 12, ""),
        ({"text": "x"}, answer("ab"), 11.5, 12, "shows what was gone"),
        ({"text": "x"}, answer([]), 5, 6, "scores out of order, or none"),
        ({"text": "x", "offset": 24}, answer([]), 5, 6, ""),
        ({"text": "x"}, answer("ae"), 5, 6, "a sample that its version does not know"),
        (
            {"text": "x"},
            answer("ac", samples=2, version="half"),
            5,
            6,
            "a sample that its version does not know",
        ),
        ({"text": "x"}, answer("ab", samples=3), 5, 6, "two counts of samples in one version"),
        ({"licence": ["MIT"]}, answer("ab"), 5, 6, "licence against the filter"),
        ({"key": "a"}, answer("", 404), 5, 6, "404 for a sample that is there"),
        ({"key": "b"}, answer("", 404), 5, 10.5, ""),
        ({"key": "b"}, answer("", 404), 5, 9, "404 for a sample that is there"),
        ({"key": "b"}, answer("a"), 11.5, 12, "knows what was gone"),
        ({"text": "x"}, answer("", 500), 5, 6, "status 500"),
    ],
)
def test_an_answer_is_judged(
    asker: Asker,
    question: dict[str, Any],
    given: tuple[int, bytes],
    asked: float,
    answered: float,
    words: str,
) -> None:
    assert asker.problem(Answer({"text": "x"}, "text", *answer("abcd"), 1, 2)) == ""
    assert asker.problem(Answer(question, "text", *given, asked, answered)) == words


def test_scores_that_rise_are_out_of_order(asker: Asker) -> None:
    status, body = answer("ab")
    rising = json.loads(body)
    rising["results"].reverse()
    assert (
        asker.problem(Answer({"text": "x"}, "text", status, json.dumps(rising).encode(), 1, 2))
        == "scores out of order, or none"
    )


def test_a_service_of_its_own_is_asked_and_changed_without_a_wrong_answer(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "sys.argv", ["search_load", "--drawn", "500x16", "--queries", "280", "--clients", "3"]
    )
    assert main() == 0
    told = json.loads(capsys.readouterr().out)
    assert (
        told["queries"] == 276
        and set(told["times"]) == set(KINDS)
        and told["wrong"] == 0
        and told["failures"] == []
    )
