"""The command line's surface: commands, exit codes, one-line complaints, what `--json` prints, and
that it answers at once.
"""

import json
import subprocess
import sys
import tomllib
from dataclasses import replace
from pathlib import Path

import pytest

import flows.orchestration.stages
from flows.cli.main import main
from flows.cli.options import run_name
from flows.runs.records import find_run, write_run
from infra.errors import CallerError
from infra.storage import store
from tests.helpers import fake_cli
from tests.helpers.fake_stages import FAKES, FakeConfig, FakeSection, run_all

HERE = Path(__file__).parents[3]


@pytest.fixture
def fakes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """The fake stages behind the commands, and a recipe for them in the working directory."""
    monkeypatch.setitem(
        sys.modules, "flows.config.run_config", sys.modules.get("flows.config.run_config")
    )
    monkeypatch.setattr(flows.orchestration.stages, "STAGES", flows.orchestration.stages.STAGES)
    monkeypatch.delenv("UNCLIP_ROOT", raising=False)
    fake_cli.install()
    monkeypatch.chdir(tmp_path)
    (tmp_path / "fake.toml").write_text('[data]\nword = "x"\n')
    return tmp_path


def ran(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    """Run the command line in this process; return exit code, stdout, stderr."""
    with pytest.raises(SystemExit) as left:
        main(list(arguments))
    captured = capsys.readouterr()
    return int(left.value.code or 0), captured.out, captured.err


def test_help_imports_nothing_heavy_and_names_every_command() -> None:
    code = "import atexit, sys; atexit.register(lambda: print(*sys.modules, file=sys.stderr)); "
    code += "from flows.cli.main import main; main(['--help'])"
    shown = subprocess.run([sys.executable, "-c", code], cwd=HERE, capture_output=True, text=True)
    assert shown.returncode == 0 and not {
        "torch",
        "ray",
        "prefect",
        "faiss",
        "pyarrow",
        "numpy",
    } & set(shown.stderr.split())
    commands = {
        line.split()[0]
        for line in shown.stdout.partition("Commands:")[2].splitlines()
        if line.startswith("  ") and line.split()
    }
    assert commands >= {
        "run",
        "status",
        "ingest",
        "curate",
        "train",
        "embed",
        "index",
        "evaluate",
        "search",
        "generate",
    }


def test_the_version_is_the_packages(capsys: pytest.CaptureFixture[str]) -> None:
    declared = tomllib.loads((HERE / "pyproject.toml").read_text())["project"]["version"]
    assert ran(capsys, "--version") == (0, f"unclip {declared}\n", "")


def test_nothing_heavy_is_imported_before_a_command_needs_it() -> None:
    heavy = ("torch", "ray", "prefect", "faiss", "img2dataset")
    code = f"import sys, flows.cli.main; print([name for name in {heavy} if name in sys.modules])"
    assert (
        subprocess.run(
            [sys.executable, "-c", code], cwd=HERE, capture_output=True, text=True
        ).stdout
        == "[]\n"
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run"], "Missing argument"),
        (["bogus"], "No such command 'bogus'"),
        (["run", "fake.toml", "--bogus"], "No such option: --bogus"),
        (["run", "nope"], "there is no recipe nope: give a TOML file or one of"),
        (["run", "fake.toml", "--name", "../x"], "--name ../x: use letters, digits"),
        (
            ["run", "fake.toml", "--set", "data.wrd=b"],
            "fake.toml: [data] wrd: no such key, did you mean word?",
        ),
        (
            ["status", "fake.toml", "--set", "data.word=3"],
            "fake.toml: [data] word = 3: should be a valid string",
        ),
        (["run", "fake.toml", "--root", "fake.toml"], "--root fake.toml is a file: give a folder"),
        (
            ["run", "fake.toml", "--root", "gopher://x"],
            "--root gopher://x: Protocol not known: gopher",
        ),
        (["search"], "search needs a text, --image FILE or --key KEY"),
        (["search", "x", "--image", "y"], "search needs a text, --image FILE or --key KEY"),
        (["search", " "], "search: the text is empty"),
        (["search", "--image", "nope.png"], "--image nope.png: there is no such file"),
        (["search", "a red heart"], "has no run: make one with `unclip run"),
        (["search", "x", "-k", "0"], "Invalid value for '-k'"),
        (["generate", ""], "generate: the text is empty"),
        (["generate", "x", "--count", "0"], "Invalid value for '--count'"),
        (["generate", "x", "--run", "nope"], "has no run nope"),
        (["vary", "nope.png"], "nope.png: there is no such file"),
        (["vary", "."], ".: there is no such file"),
        (["interpolate", "fake.toml", "nope.png"], "nope.png: there is no such file"),
        (["textdiff", "fake.toml", "a cat", "a cat"], "there is no difference to follow"),
        (["textdiff", "fake.toml", "", "a cat"], "textdiff: the text is empty"),
        (
            ["textdiff", "fake.toml", "a cat", "a dog", "--theta", "2"],
            "Invalid value for '--theta'",
        ),
        (
            ["reconstruct", "fake.toml", "--pca-dims", "3,x"],
            "--pca-dims 3,x: give up to 64 whole numbers",
        ),
    ],
)
def test_a_callers_mistake_is_one_line_and_exit_code_2(
    arguments: list[str], message: str, fakes: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, err = ran(capsys, *arguments)
    assert (code, out) == (2, "")
    assert err.startswith("unclip: ") and message in err and err.count("\n") == 1
    assert not (fakes / "unclip-data").exists()  # a mistake makes no ROOT


def test_a_root_that_cannot_be_written_is_one_line_and_exit_code_1(
    fakes: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (fakes / "file").touch()
    code, out, err = ran(capsys, "run", "fake.toml", "--root", "file/root")
    assert (code, out) == (1, "") and err.count("\n") == 1 and "choose another --root" in err


def test_debug_shows_the_traceback(fakes: Path) -> None:
    with pytest.raises(CallerError):
        main(["run", "nope", "--debug"])


def test_status_says_missing_then_current_then_stale_and_why(
    fakes: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def states(*more: str) -> list[tuple[str, str]]:
        code, out, _ = ran(capsys, "status", "fake.toml", "--json", *more)
        result = json.loads(out)
        assert (
            code == 0
            and result.keys() == {"run", "root", "report", "stages"}
            and result["run"] == "fake"
        )
        assert all(each.keys() == {"stage", "key", "state", "why"} for each in result["stages"])
        return [(each["state"], each["why"]) for each in result["stages"]]

    assert states() == [("missing", "")] * 4
    assert not (fakes / "unclip-data").exists()
    run_all(store.open_root("unclip-data"), FakeConfig(data=FakeSection(word="x")))
    assert states() == [("current", "")] * 4
    assert states("--set", "data.word=y")[:2] == [
        ("stale", "[data] word: 'x' -> 'y'"),
        ("stale", "data changed"),
    ]
    code, out, _ = ran(capsys, "status", "fake.toml", "--set", "data.word=y")
    assert code == 0 and "stale" in out and "[data] word: 'x' -> 'y'" in out


def test_status_with_checksums_finds_a_changed_byte(
    fakes: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made = run_all(store.open_root("unclip-data"), FakeConfig(data=FakeSection(word="x")))
    assert ran(capsys, "status", "fake.toml", "--checksums")[0] == 0
    file = made["embed"].committed.local_folder / "parts" / "05.bin"
    file.write_bytes(b"\0" + file.read_bytes()[1:])
    code, _, err = ran(capsys, "status", "fake.toml", "--checksums")
    assert code == 1 and "parts/05.bin has another checksum" in err and err.count("\n") == 1


def test_a_dry_run_counts_parameters_and_runs_nothing(
    fakes: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "flows.orchestration.capacity_plan.capacity", lambda *_: {}
    )  # fake stages have no models to plan for
    model = replace(FAKES[1], parameters=lambda config: 1_234_567 * len(config.clip.word))
    flows.orchestration.stages.STAGES = (FAKES[0], model, *FAKES[2:])  # type: ignore[assignment]
    code, out, _ = ran(capsys, "run", "fake.toml", "--dry-run", "--json")
    stages = json.loads(out)["stages"]
    assert code == 0 and {each["state"] for each in stages} == {"missing"}
    assert [each.get("parameters") for each in stages] == [None, 1_234_567, None, None]
    code, out, _ = ran(capsys, "run", "fake.toml", "--dry-run", "--set", "clip.word=aa")
    assert code == 0 and "2.47 M parameters" in out
    assert not (fakes / "unclip-data").exists()


def test_a_run_that_is_current_records_itself_and_needs_no_prefect(
    fakes: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = store.open_root("unclip-data")
    made = run_all(root, FakeConfig(data=FakeSection(word="x")))
    code, out, err = ran(capsys, "run", "fake.toml", "--json", "--name", "second")
    assert (code, err) == (0, "") and {each["state"] for each in json.loads(out)["stages"]} == {
        "current"
    }
    assert find_run(root, "second")["stages"] == {name: each.key for name, each in made.items()}
    assert not (fakes / "unclip-data" / "logs").exists()


def test_runs_are_listed_the_last_finished_first(
    fakes: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = store.open_root("unclip-data")
    code, out, err = ran(capsys, "runs")
    assert (code, out) == (0, "") and "has no run: make one with `unclip run quickstart" in err
    write_run(root, "first", "r.toml", "", {})
    write_run(root, "second", "r.toml", "", run_all(root, FakeConfig(data=FakeSection(word="x"))))
    code, out, _ = ran(capsys, "runs")
    lines = [line.split() for line in out.splitlines()]
    assert (
        code == 0
        and [line[0] for line in lines] == ["second", "first"]
        and "followed" in lines[0]
        and "followed" not in lines[1]
    )
    assert "0 stages, no report" in out
    _, out, _ = ran(capsys, "runs", "--json")
    assert [(each["name"], each["followed"]) for each in json.loads(out)["runs"]] == [
        ("second", True),
        ("first", False),
    ]


def test_the_latest_run_is_the_one_that_finished_last(tmp_path: Path) -> None:
    root = store.open_root(str(tmp_path))
    for name in ("b", "c", "a"):
        write_run(root, name, "r.toml", "", {})
    assert find_run(root)["name"] == "a"
    assert find_run(root, "c")["name"] == "c"


def test_a_recipe_of_any_name_names_a_run() -> None:
    assert run_name("my-recipe_2.toml", None) == "my-recipe_2"
    names = [
        run_name(f"{name}.toml", None) for name in ("mein größer", "mein grösser", "写真", "-")
    ]
    assert len(set(names)) == 4 and names[0].startswith("mein-grosser-")
    with pytest.raises(CallerError, match="--name a b"):
        run_name("my.toml", "a b")
