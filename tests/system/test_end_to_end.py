"""The whole pipeline through the real command line, with real Prefect, Ray and two CLIP workers, on
shapes that are drawn here.

It is killed as a machine kills it, at moments drawn by chance, and run again: nothing committed is
lost or mixed. (That it runs in one go
is seen by tests/infra/storage/test_s3.py.)
"""

import json
import random
import signal
import subprocess
import time
from pathlib import Path

import pytest
from PIL import Image

from flows.config.run_config import load_recipe
from flows.orchestration.stages import STAGES
from flows.runs.planning import plan, stages_of
from infra.storage import store
from tests.flows.orchestration.test_stages import assert_whole
from tests.helpers.tiny_run import LIMIT_S, RECIPE, prepare, ran, start

pytestmark = [pytest.mark.slow, pytest.mark.timeout(LIMIT_S * 2)]
STAGE_NAMES = [stage.name for stage in stages_of(load_recipe(str(RECIPE)), (), STAGES)]
KILLS = (("run", 10), ("curate", 8), ("index", 6))
"""After which line on the terminal, and at most how many seconds later: in start-up or ingest,
in CLIP, in what follows the index.
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which the tiny recipe was killed three times and then ran to its end."""
    folder = tmp_path_factory.mktemp("tiny")
    drawn = prepare(folder)
    chance = random.Random()
    kept: dict[str, str] = {}
    moments = []
    for line, limit_s in KILLS:
        moments.append((line, round(chance.uniform(0, limit_s), 2)))
        print("killed", *moments[-1])
        kill(start(folder, "run", "tiny.toml", "--root", "root"), *moments[-1])
        after = assert_whole(folder / "root")
        assert kept.items() <= after.items(), (
            f"killed {moments}: a committed file has changed or gone"
        )
        kept = after
    code, out, err = ran(folder, "run", "tiny.toml", "--root", "root", "--json")
    assert code == 0 and "Traceback" not in err, f"killed {moments}: {err}"
    after = assert_whole(folder / "root")
    assert len(after) > 20 and kept.items() <= after.items(), (
        f"killed {moments}: a committed file has changed or gone"
    )
    committed = {name.split("/")[0] for name in kept if name.endswith("/manifest.json")}
    stages = json.loads(out)["stages"]
    assert [(each["stage"], each["state"]) for each in stages] == [
        (name, "current" if name in committed else "ran") for name in STAGE_NAMES
    ]
    manifest = json.loads(
        (folder / "root" / "ingest" / stages[0]["key"] / "manifest.json").read_text()
    )
    assert manifest["counts"]["out"] == drawn
    return folder


def kill(process: "subprocess.Popen[str]", line: str, delay_s: float) -> None:
    """Kill a run some time after a line on its terminal; the leader alone, as a kernel short of
    memory does: its children must notice.
    """
    assert process.stderr
    while process.stderr.readline().split(" ")[0] != line:
        assert process.poll() is None, f"the run ended before the line {line}"
    time.sleep(delay_s)
    process.kill()
    process.communicate(timeout=60)
    assert process.returncode in (-signal.SIGKILL, 0)


def test_a_killed_run_ends_with_every_stage_current_and_made_once(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    root = store.open_root("root", for_writing=False)
    config = load_recipe("tiny.toml")
    stages = stages_of(config, (), STAGES)
    assert [each.state for each in plan(root, config, stages)] == ["current"] * len(stages)
    assert all(
        len(store.list_names(root, stage.name)) == 1 for stage in stages
    )  # every key was made once
    assert list((folder / "root" / "work" / "aside").iterdir()) == []


def test_the_report_is_there(folder: Path) -> None:
    record = json.loads((folder / "root" / "runs" / "tiny.json").read_text())
    report = Path(record["report"])
    assert report.name == "report.html" and "<html" in report.read_text().lower()
    result = json.loads((report.parent / "report.json").read_text())
    assert result.keys() >= {"run", "stages", "zero_shot", "retrieval", "generation"}
    assert list((report.parent / "pictures").glob("*.png"))


def test_a_second_run_and_status_find_everything_current_and_start_nothing(folder: Path) -> None:
    logs = list((folder / "root" / "logs").iterdir())
    for command in ("run", "status"):
        code, out, err = ran(folder, command, "tiny.toml", "--root", "root", "--json")
        assert (
            code == 0 and err == "" and list((folder / "root" / "logs").iterdir()) == logs
        )  # neither Prefect nor Ray was started
        result = json.loads(out)
        assert {each["state"] for each in result["stages"]} == {"current"} and result[
            "report"
        ].endswith("/report.html")


def test_search_finds_by_text_and_by_picture(folder: Path) -> None:
    for query in (["a red disc"], ["--image", "pictures/filled/red-disc-1_0.png"]):
        code, out, err = ran(folder, "search", *query, "--root", "root", "-k", "5", "--json")
        assert (code, err) == (0, "")
        found = json.loads(out)
        assert len(found) == 5 and all(
            each.keys() >= {"key", "score", "caption", "url"} for each in found
        )
        assert [each["score"] for each in found] == sorted(
            (each["score"] for each in found), reverse=True
        )


def test_generate_draws_the_same_for_the_same_seed(folder: Path) -> None:
    drawn = {}
    for out, seed in (("a", 0), ("b", 0), ("c", 1)):
        code, text, err = ran(
            folder,
            "generate",
            "a red disc",
            "--count",
            "2",
            "--seed",
            str(seed),
            "--out",
            out,
            "--root",
            "root",
            "--json",
        )
        assert code == 0, err
        result = json.loads(text)
        assert result.keys() == {"seed", "settings", "files", "grid"} and len(result["files"]) == 2
        drawn[out] = [
            Image.open(folder / file).convert("RGB").tobytes() for file in result["files"]
        ]
        assert len(drawn[out][0]) == 16 * 16 * 3
    assert (
        drawn["a"] == drawn["b"]
        and not set(drawn["a"]) & set(drawn["c"])
        and drawn["a"][0] != drawn["a"][1]
    )


def test_a_recipe_with_a_mistake_is_one_line_and_changes_nothing(folder: Path) -> None:
    root = store.open_root(str(folder / "root"), for_writing=False)
    before = {name: store.list_names(root, name) for name in STAGE_NAMES}
    (folder / "bad.toml").write_text('extends = "tiny.toml"\n[clip]\nwidht = 3\n')
    code, out, err = ran(folder, "run", "bad.toml", "--root", "root")
    assert (code, out) == (2, "") and err.count("\n") == 1
    assert err.startswith("unclip: bad.toml: [clip] widht: no such key, did you mean width?")
    assert before == {name: store.list_names(root, name) for name in STAGE_NAMES}
