"""The pointer moves only to a run whose report passes, and what follows the pointer stays with the
last that did.
"""

import json
from pathlib import Path
from typing import Any

import pytest

from flows.config.promotion_conditions import parsed
from flows.config.run_config import load_recipe
from flows.runs.promotion import judge, promote_if_passed
from flows.runs.records import find_run, list_runs, write_run
from infra.errors import CallerError
from infra.storage import commits, manifests, store
from infra.storage.store import Root
from tests.helpers.manifest_facts import FACTS
from tests.helpers.tiny_run import RECIPE

GATE = ("generation.own >= 0.5", "retrieval.recall@1 >= current - 0.05")


@pytest.fixture(params=["folder", "memory"])
def root(request: pytest.FixtureRequest, tmp_path: Path) -> Root:
    if request.param == "folder":
        return store.open_root(str(tmp_path / "root"))
    return store.open_root(f"memory://bucket-{tmp_path.name}", tmp_path / "scratch")


def finished(
    root: Root, name: str, own: float, recall: float
) -> tuple[dict[str, Any], dict[str, manifests.Committed]]:
    """Commit a report and write the run's record."""
    out = root.scratch / "out"
    out.mkdir(parents=True)
    report = {
        "generation": {"own": own, "note": "text", "passed": True},
        "retrieval": {"recall@1": {"value": recall, "low": 0.0, "n": 9}},
    }
    (out / "report.json").write_text(json.dumps(report))
    committed = commits.commit(root, "evaluate", f"key-{name}", out, FACTS)
    return write_run(root, name, "tiny", manifests.now(), {"evaluate": committed}), {
        "evaluate": committed
    }


def test_a_better_run_becomes_the_current_one_and_a_worse_one_does_not(root: Root) -> None:
    verdicts = {}
    for name, own, recall in (
        ("first", 0.6, 0.3),
        ("worse", 0.6, 0.2),
        ("nearly", 0.6, 0.26),
        ("blind", 0.4, 0.9),
    ):
        judgement = promote_if_passed(root, GATE, *finished(root, name, own, recall))
        assert judgement
        verdicts[name] = judgement["promoted"]
        assert find_run(root)["name"] == {"worse": "first", "blind": "nearly"}.get(name, name)
    assert verdicts == {"first": True, "worse": False, "nearly": True, "blind": False}
    assert find_run(root, "blind")["stages"] == {
        "evaluate": "key-blind"
    }  # by name, any run can be had
    assert find_run(root)["stages"] == {"evaluate": "key-nearly"} and find_run(root)["promoted_at"]


def test_without_a_gate_the_last_run_is_the_one(root: Root) -> None:
    record, committed = finished(root, "first", 0, 0)
    assert (
        promote_if_passed(root, (), record, committed) is None
        and promote_if_passed(root, GATE, record, {}) is None
    )
    assert not store.exists(root, "current.json") and find_run(root)["name"] == "first"


def test_the_pointer_keeps_its_keys_when_the_run_of_that_name_goes_on(root: Root) -> None:
    promote_if_passed(root, GATE, *finished(root, "nightly", 0.6, 0.3))
    write_run(root, "nightly", "tiny", manifests.now(), {})
    assert find_run(root)["stages"] == {"evaluate": "key-nightly"}


def test_all_runs_are_listed_and_the_one_that_is_followed_is_marked(root: Root) -> None:
    assert list_runs(root) == []
    promote_if_passed(root, (), *finished(root, "plain", 0, 0))
    finished(root, "later", 0, 0)
    assert [(each["name"], each["followed"]) for each in list_runs(root)] == [
        ("later", True),
        ("plain", False),
    ]
    for name, own in (("first", 0.6), ("blind", 0.4)):
        promote_if_passed(root, GATE, *finished(root, name, own, 0.3))
    listed = list_runs(root)
    assert [each["name"] for each in listed] == ["blind", "first", "later", "plain"]
    assert [each["followed"] for each in listed] == [
        each["name"] == find_run(root)["name"] for each in listed
    ]
    write_run(
        root, "first", "tiny", manifests.now(), {}
    )  # goes on under its name: what was promoted is followed still
    listed = list_runs(root)
    assert [(each["name"], each["followed"], bool(each["stages"])) for each in listed][:3] == [
        ("first", False, False),
        ("blind", False, True),
        ("first", True, True),
    ]


@pytest.mark.parametrize(
    ("condition", "value", "limit", "holds"),
    [
        ("a.b >= 2", 2, 2, True),
        ("a.b > 2", 2, 2, False),
        ("a.b<=-1e-1", 2, -0.1, False),
        ("a.b < current", 2, 3, True),
        ("a.b >= current * 0.5", 2, 1.5, True),
        ("a.b >= current + 0.5", 2, 3.5, False),
        ("a.c.low > 0", 1, 0, True),
        ("a.new >= current", 7, None, True),
    ],
)
def test_conditions_mean_what_they_say(
    condition: str, value: float, limit: float | None, holds: bool
) -> None:
    report = {"a": {"b": 2, "c": {"value": 5, "low": 1}, "new": 7}}
    (verdict,) = judge(report, [condition], {"a": {"b": 3, "c": {"value": 4, "low": 0}}})
    assert verdict == {"condition": condition, "value": value, "limit": limit, "holds": holds}


def test_a_figure_that_is_not_there_is_the_callers_mistake_with_those_that_are() -> None:
    with pytest.raises(CallerError, match=r"has no figure a\.x; it has b, c"):
        judge({"a": {"b": 1, "c": 2}}, ["a.x > 1"], None)
    with pytest.raises(CallerError, match=r"has no figure a\.t"):
        judge({"a": {"t": True}}, ["a.t >= 1"], None)


@pytest.mark.parametrize(
    "condition",
    [
        "a.b",
        "a.b == 1",
        "a.b >= now",
        "a.b >= current - ",
        "a.b >= 1 or 1 >= 0",
        "__import__('os') > 1 2",
    ],
)
def test_what_is_no_condition_is_refused_with_the_recipe(condition: str) -> None:
    with pytest.raises(ValueError, match="must look like"):
        parsed(condition)
    with pytest.raises(CallerError, match=r"\[evaluate\] promote_if"):
        load_recipe(str(RECIPE), [f"evaluate.promote_if=[{json.dumps(condition)}]"])


def test_the_gate_is_no_part_of_the_key() -> None:
    gated = load_recipe(str(RECIPE), [f"evaluate.promote_if={json.dumps(list(GATE))}"])
    assert (
        gated.evaluate.promote_if == GATE
        and gated.evaluate.keyed() == load_recipe(str(RECIPE)).evaluate.keyed()
    )
