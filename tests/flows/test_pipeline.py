"""The flow on Prefect's own server, in processes of their own as people start them: retries,
artifacts, chatter, kills.
"""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from flows.scheduling.prefect_server import prefect_server
from infra.errors import CallerError, DataError, StorageAwayError, StorageError
from infra.storage import manifests, store
from tests.helpers.tiny_run import PERSONS
from tests.infra.storage.test_store import full_disk  # noqa: F401

HERE = Path(__file__).parents[2]
pytestmark = pytest.mark.slow


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    """A recipe of the fake sections."""
    (tmp_path / "fake.toml").write_text('[data]\nword = "x"\n')
    return tmp_path / "fake.toml"


@pytest.fixture(scope="module", autouse=True)
def _no_server_from_outside() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        for name in [name for name in os.environ if name.startswith("PREFECT_")]:
            patch.delenv(name)
        yield


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """Run one Prefect server for the tests that ask nothing of it; gives what a run needs to use
    it.
    """
    with prefect_server(tmp_path_factory.mktemp("prefect")):
        settings = {
            name: os.environ[name]
            for name in ("PREFECT_API_URL", "PREFECT_API_AUTH_STRING", "PREFECT_HOME")
        }
        with pytest.MonkeyPatch.context() as patch:
            for name in settings:
                patch.delenv(name)
            yield settings


@pytest.fixture
def shared(server: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Have the runs of a test use that server."""
    for name, value in server.items():
        monkeypatch.setenv(name, value)


def start(recipe: Path, *more: str) -> "subprocess.Popen[str]":
    """Start `unclip run` over the fake stages."""
    command = [
        sys.executable,
        "-m",
        "tests.helpers.fake_cli",
        "run",
        str(recipe),
        "--root",
        str(recipe.parent / "root"),
        *more,
    ]
    return subprocess.Popen(
        command, cwd=HERE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **PERSONS
    )


def finished(process: "subprocess.Popen[str]") -> tuple[int, str, str]:
    """Return exit code, stdout and stderr."""
    out, err = process.communicate(timeout=120)
    return process.returncode, out, err


def processes(words: str) -> list[int]:
    """Return the processes whose command line holds the words."""
    found = []
    for folder in Path("/proc").iterdir():
        try:
            if folder.name.isdigit() and words in (folder / "environ").read_bytes().decode(
                errors="replace"
            ):
                found.append(int(folder.name))
        except OSError:
            continue
    return found


def test_a_run_ends_with_its_result_on_stdout_and_only_its_own_lines_on_stderr(
    recipe: Path,
) -> None:
    code, out, err = finished(start(recipe, "--json", "--name", "mine"))
    assert code == 0, err
    result = json.loads(out)
    root = recipe.parent / "root"
    assert (result["run"], result["root"], result["report"]) == ("mine", str(root), None)
    assert [each["stage"] for each in result["stages"]] == ["data", "clip", "embed", "prior"]
    assert all(
        each.keys() == {"stage", "key", "state", "seconds"} and each["state"] == "ran"
        for each in result["stages"]
    )
    lines = err.splitlines()
    assert len(lines) == 5 and lines[0].startswith(f"run mine in {root}, log ")
    assert [line.split()[:2] for line in lines[1:]] == [
        [name, "ran"] for name in ("data", "clip", "embed", "prior")
    ]
    log = Path(lines[0].partition(", log ")[2]).read_text()
    assert "prefect" in log and lines[1] in log
    record = json.loads((root / "runs" / "mine.json").read_text())
    assert (
        record.keys() == {"name", "recipe", "started", "finished", "gated", "stages", "report"}
        and not record["gated"]
    )
    assert record["stages"] == {each["stage"]: each["key"] for each in result["stages"]}
    _check_prefect_has_run_and_artifacts(root, result)
    assert processes(str(root)) == []
    logs = list((root / "logs").iterdir())
    code, out, err = finished(start(recipe, "--json", "--name", "mine"))
    assert code == 0 and err == ""
    assert {each["state"] for each in json.loads(out)["stages"]} == {"current"}
    assert (
        list((root / "logs").iterdir()) == logs
    )  # all current: neither Prefect nor Ray was started


def _check_prefect_has_run_and_artifacts(root: Path, result: dict[str, Any]) -> None:
    with prefect_server(root / "work" / "prefect") as url:
        user, _, password = os.environ["PREFECT_API_AUTH_STRING"].partition(":")
        with httpx.Client(auth=(user, password)) as client:
            runs, tasks, artifacts = (
                client.post(f"{url}/{kind}/filter", json={}).json()
                for kind in ("flow_runs", "task_runs", "artifacts")
            )
    assert [(run["name"], run["state_type"]) for run in runs] == [("mine", "COMPLETED")]
    steps = ["open", "compact", *(each["stage"] for each in result["stages"]), "record", "promote"]
    assert sorted((task["name"], task["state_type"]) for task in tasks) == sorted(
        (step, "COMPLETED") for step in steps
    )
    (table,) = [each for each in artifacts if each["key"] == "stages"]
    assert json.loads(table["data"]) == result["stages"]


def test_a_passing_fault_and_a_store_that_was_away_are_tried_again_and_a_callers_mistake_is_not(
    recipe: Path, shared: None
) -> None:
    recipe.write_text('[data]\nword = "flaky"\n[clip]\nword = "away"\n[prior]\nword = "refused"\n')
    code, out, err = finished(start(recipe))
    assert (code, out) == (2, "")
    assert [line[:13] for line in err.splitlines()[1:4]] == [
        "data      ran",
        "clip      ran",
        "embed     ran",
    ] and err.splitlines()[-1] == "unclip: prior: [fake] word = refused: choose another"
    assert "Traceback" not in err
    log = next((recipe.parent / "root" / "logs").iterdir()).read_text()
    assert "ConnectionResetError: the store hung up" in log and "Retry 1/4 will start" in log
    assert (
        log.count("Retry ") >= 2 and "Retry " not in log.partition("refused: choose another")[2]
    ), "a caller's mistake gets none"
    recipe.write_text(
        '[data]\nword = "flaky"\n[clip]\nword = "away"\n'
    )  # and what was committed before it stays
    code, out, err = finished(start(recipe, "--json"))
    assert code == 0 and [each["state"] for each in json.loads(out)["stages"]] == [
        "current"
    ] * 3 + ["ran"]


def test_a_store_that_is_away_is_tried_for_longer_than_any_other_fault() -> None:
    from prefect.client.schemas.objects import TaskRun
    from prefect.states import Failed

    from flows.pipeline import is_worth_retrying, step

    def is_worth(error: Exception, failures: int) -> bool:
        return is_worth_retrying(
            step, TaskRun(run_count=failures, task_key="x", dynamic_key="0"), Failed(data=error)
        )

    assert [is_worth(ConnectionResetError("hung up"), failures) for failures in (1, 2, 3)] == [
        True,
        True,
        False,
    ]
    assert [is_worth(StorageAwayError("s3://x: SlowDown"), failures) for failures in (1, 3, 4)] == [
        True
    ] * 3 and step.retries == 4
    for hopeless in (
        StorageError("no space left"),
        CallerError("no"),
        DataError("no"),
        AssertionError("no"),
    ):
        assert not is_worth(hopeless, 1)


# Prefect reads its settings when it is imported, so this has a process of its own. Each part meets
# a store that is away the first time.
AWAY = """
import json, sys
from pathlib import Path
from flows.scheduling.prefect_server import prefect_server
from infra.errors import StorageAwayError
from tests.helpers import fake_cli

recipe = Path(sys.argv[1])
fake_cli.install()
with prefect_server(recipe.parent / "prefect"):
    from flows import pipeline
    from flows import recipe_run
    pipeline.step = pipeline.step.with_options(retry_delay_seconds=0)
    called = []

    def away_at_first(function):
        def call(*arguments):
            called.append(function.__name__)
            if called.count(function.__name__) == 1:
                raise StorageAwayError("cannot use s3://bucket: SlowDown")
            return function(*arguments)
        return call

    for part in sys.argv[2:]:
        module = pipeline if hasattr(pipeline, part) else recipe_run
        setattr(module, part, away_at_first(getattr(module, part)))
    result = pipeline.run_pipeline(str(recipe), str(recipe.parent / "root"), "nightly")
    print(json.dumps({"called": called, "stages": [each["state"] for each in result["stages"]]}))
"""


def test_a_store_that_is_away_at_the_beginning_or_the_end_of_a_run_is_waited_for(
    recipe: Path, shared: None
) -> None:
    parts = ["open_root", "compact", "write_run", "promote_if_passed"]
    done = subprocess.run(
        [sys.executable, "-c", AWAY, str(recipe), *parts], cwd=HERE, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    told = json.loads(
        next(line for line in done.stdout.splitlines() if line.startswith('{"called"'))
    )
    assert told == {"called": [part for part in parts for _ in range(2)], "stages": ["ran"] * 4}
    assert (recipe.parent / "root" / "runs" / "nightly.json").exists()


def test_a_failure_is_one_line_with_the_stage_the_reason_and_the_log(
    recipe: Path, shared: None
) -> None:
    recipe.write_text('[clip]\nword = "broken"\n')
    code, out, err = finished(start(recipe))
    assert (code, out) == (1, "")
    last = err.splitlines()[-1]
    assert last.startswith(
        "unclip: clip: AssertionError: and the reason on another; details are in "
    )
    log = Path(last.rpartition(" ")[2]).read_text()
    assert "Traceback" not in err and "Traceback" in log and "in write_chunks" in log


def test_a_full_disk_is_one_line_also_when_neither_log_nor_prefect_can_write(
    recipe: Path,
    full_disk: Path,  # noqa: F811
) -> None:
    subprocess.run(["mount", "-o", "remount,size=30m", str(full_disk)], check=True)
    recipe.write_text('[clip]\nword = "huge"\n')
    code, out, err = finished(start(recipe, "--root", str(full_disk)))
    assert (code, out) == (1, "") and len(err.splitlines()) == 3
    assert err.splitlines()[-1].startswith("unclip: clip: no space left to write ")
    store.remove(store.open_root(str(full_disk), for_writing=False), "work/clip")
    recipe.write_text("")
    code, out, err = finished(start(recipe, "--root", str(full_disk), "--json"))
    assert code == 0 and [each["state"] for each in json.loads(out)["stages"]] == [
        "current",
        "ran",
        "ran",
        "ran",
    ]


@pytest.mark.parametrize("word", ["a", "clumsy"])
def test_an_interrupted_run_says_so_in_one_line_and_leaves_no_process(
    recipe: Path, word: str
) -> None:
    """Also where a library makes another error of the Ctrl-C, which would otherwise be tried
    again.
    """
    recipe.write_text(f'[clip]\nword = "{word}"\nseconds = 30\n')
    process = start(recipe)
    assert process.stderr
    while not process.stderr.readline().startswith("data      ran"):
        assert process.poll() is None
    while word == "clumsy" and not list(recipe.parent.glob("root/work/clip/*/*.done")):
        time.sleep(0.1)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does on Ctrl-C
    code, out, err = finished(process)
    assert (code, out, err) == (
        130,
        "",
        "unclip: interrupted; the same command resumes from here\n",
    )
    assert processes(str(recipe.parent / "root")) == []


def test_a_killed_run_takes_prefects_server_with_it_and_the_next_goes_on(recipe: Path) -> None:
    recipe.write_text("[data]\nseconds = 0\n[clip]\nseconds = 30\n")
    root = recipe.parent / "root"
    process = start(recipe)
    assert process.stderr
    while not process.stderr.readline().startswith("data      ran"):
        assert process.poll() is None
    assert len(processes(str(root))) >= 1
    process.kill()
    process.communicate()
    limit = time.monotonic() + 10
    while processes(str(root)):
        assert time.monotonic() < limit, "Prefect's server outlives a killed run"
        time.sleep(0.1)
    opened = store.open_root(str(root))
    kept = manifests.newest(opened, "data")
    recipe.write_text("[data]\nseconds = 0\n")
    code, out, err = finished(start(recipe, "--json"))
    assert code == 0, err
    assert [each["state"] for each in json.loads(out)["stages"]] == ["current", "ran", "ran", "ran"]
    again = manifests.newest(opened, "data")
    assert kept and again and kept.manifest == again.manifest and manifests.verify(again) == []
