"""The real pipeline is killed as a machine kills it, at moments drawn by chance, and run again: nothing committed is lost or mixed."""

import json
import random
import signal
import subprocess
import time
from pathlib import Path

import pytest

from flows.config import load_recipe
from flows.planning import plan, stages_of
from flows.stages import STAGES
from infra import storage
from tests.test_stages import assert_whole
from tests.tiny import LIMIT_S, prepare, ran, start

KILLS = (("run", 15), ("curate", 12), ("index", 8))
"""After which line on the terminal, and at most how many seconds later: in start-up or ingest, in CLIP, in what follows the index."""


@pytest.mark.slow
@pytest.mark.timeout(LIMIT_S * 2)
def test_a_run_killed_at_random_moments_goes_on_and_ends_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prepare(tmp_path)
    chance = random.Random()
    kept: dict[str, str] = {}
    moments = []
    for line, limit_s in KILLS:
        moments.append((line, round(chance.uniform(0, limit_s), 2)))
        print("killed", *moments[-1])
        kill(start(tmp_path, "run", "tiny.toml", "--root", "root"), *moments[-1])
        after = assert_whole(tmp_path / "root")
        assert kept.items() <= after.items(), f"killed {moments}: a committed file has changed or gone"
        kept = after
    code, out, err = ran(tmp_path, "run", "tiny.toml", "--root", "root", "--json")
    assert code == 0, f"killed {moments}: {err}"
    after = assert_whole(tmp_path / "root")
    assert kept.items() <= after.items(), f"killed {moments}: a committed file has changed or gone"
    committed = {name.split("/")[0] for name in kept if name.endswith("/manifest.json")}
    assert {each["stage"] for each in json.loads(out)["stages"] if each["state"] == "current"} == committed
    monkeypatch.chdir(tmp_path)
    root = storage.open_root("root", for_writing=False)
    config = load_recipe("tiny.toml")
    stages = stages_of(config, (), STAGES)
    assert [each.state for each in plan(root, config, stages)] == ["current"] * len(stages)
    assert all(len(storage.list_names(root, stage.name)) == 1 for stage in stages)  # every key was made once
    assert list((tmp_path / "root" / "work" / "aside").iterdir()) == []


def kill(process: "subprocess.Popen[str]", line: str, delay_s: float) -> None:
    """Kill a run some time after a line on its terminal; the leader alone, as a kernel short of memory does: its children must notice."""
    assert process.stderr
    while process.stderr.readline().split(" ")[0] != line:
        assert process.poll() is None, f"the run ended before the line {line}"
    time.sleep(delay_s)
    process.kill()
    process.communicate(timeout=60)
    assert process.returncode in (-signal.SIGKILL, 0)
