"""Environment variables are as before once the block has ended, also where it raised."""

import os

import pytest

from infra.environment import changed_environment


def test_variables_are_set_hidden_and_restored(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("UNCLIP_TEST_OLD", "old")
    monkeypatch.setenv("UNCLIP_TEST_HIDDEN", "hidden")
    before = dict(os.environ)
    changed = {"UNCLIP_TEST_OLD": "new", "UNCLIP_TEST_ADDED": "added"}
    with pytest.raises(KeyError), changed_environment(changed, without="UNCLIP_TEST_"):
        inside = {name: text for name, text in os.environ.items() if "UNCLIP_TEST_" in name}
        assert inside == changed
        raise KeyError
    assert dict(os.environ) == before
