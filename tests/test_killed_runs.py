"""The real pipeline is killed as a machine kills it, at moments drawn by chance, and run again: nothing committed is lost or mixed."""

import json
import random
import signal
import time
from pathlib import Path

import pytest

from flows.config import load_recipe
from flows.stages import STAGES, plan
from infra import storage
from tests.test_stages import assert_whole
from tests.tiny import LIMIT_S, prepare, ran, start

KILLS = 3
MOMENTS_S = (6, 30)
"""A kill falls this long after its run started: from ingest's start-up to the middle of a training."""


@pytest.mark.slow
@pytest.mark.timeout(LIMIT_S * 2)
def test_a_run_killed_at_random_moments_goes_on_and_ends_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prepare(tmp_path)
    chance = random.Random()
    kept: dict[str, str] = {}
    moments = [round(chance.uniform(*MOMENTS_S), 2) for _ in range(KILLS)]
    print(f"killed after {moments} s")
    for moment_s in moments:
        process = start(tmp_path, "run", "tiny.toml", "--root", "root")
        time.sleep(moment_s)
        process.kill()  # the leader alone, as the kernel short of memory does: its children must notice by themselves
        _, err = process.communicate(timeout=60)
        assert process.returncode in (-signal.SIGKILL, 0), err
        after = assert_whole(tmp_path / "root") if (tmp_path / "root").exists() else {}
        assert kept.items() <= after.items(), f"killed after {moments} s, a committed file has changed or gone"
        kept = after
    code, out, err = ran(tmp_path, "run", "tiny.toml", "--root", "root", "--json")
    assert code == 0, f"killed after {moments} s: {err}"
    after = assert_whole(tmp_path / "root")
    assert kept.items() <= after.items(), f"killed after {moments} s, a committed file has changed or gone"
    committed = {name.split("/")[0] for name in kept if name.endswith("/manifest.json")}
    assert {each["stage"] for each in json.loads(out)["stages"] if each["state"] == "current"} == committed
    monkeypatch.chdir(tmp_path)
    root = storage.open_root("root", for_writing=False)
    assert [each.state for each in plan(root, load_recipe("tiny.toml"), STAGES)] == ["current"] * len(STAGES)
    assert all(len(storage.list_names(root, stage.name)) == 1 for stage in STAGES)  # every key was made once
    assert list((tmp_path / "root" / "work" / "aside").iterdir()) == []
