"""`unclip diffusion across-time | shared-latents | interpolate` on a small system: what they draw,
print and refuse.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from flows.runs.records import write_run as write_record
from infra.storage import commits, manifests, store
from tests.flows.cli.test_main import ran
from tests.helpers import evaluation_run
from tests.helpers.manifest_facts import FACTS
from tests.helpers.small_systems import write_system


def write_root(folder: Path, rows: list[dict[str, Any]]) -> str:
    """Write a ROOT with the record of a run `small` over these pairs and return where it is."""
    root, made = store.open_root(str(folder / "root")), write_system(folder / "made")
    evaluation_run.write_run(folder / "made" / "run", rows)
    (made / "ingest").mkdir()
    (made / "run" / "shards").rename(made / "ingest" / "shards")
    (made / "run" / "embed").rename(made / "embed")
    facts = FACTS | {"started": manifests.now()}
    stages = ("ingest", "clip", "embed", "prior", "decoder")
    committed = {
        stage: commits.commit(root, stage, f"{stage}-key", made / stage, facts) for stage in stages
    }
    write_record(root, "small", "small.toml", manifests.now(), committed)
    return str(folder / "root")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_root(tmp_path_factory.mktemp("small"), evaluation_run.usual_rows())


def told(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    """Run a command of `unclip diffusion` with --json and return what it printed."""
    code, out, err = ran(capsys, "diffusion", *arguments, "--json")
    assert code == 0, err
    result: dict[str, Any] = json.loads(out)
    assert result.keys() == {"seed", "settings", "figures", "files", "grid"}
    assert all(Path(file).is_file() for file in [*result["files"], result["grid"]])
    return result


def drawn(result: dict[str, Any]) -> np.ndarray:
    return np.stack([np.asarray(Image.open(file)) for file in result["files"]])


def test_across_time_follows_each_prompt_in_two_rows(
    root: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = (
        "across-time",
        "a red heart",
        "blue",
        "--columns",
        "4",
        "--steps",
        "12",
        "--root",
        root,
        "--out",
        str(tmp_path),
    )
    result = told(capsys, *arguments)
    assert result["settings"]["times"] == [50, 33, 17, 0] and len(result["files"]) == 2 * 2 * 4
    pictures = drawn(result)
    assert np.array_equal(pictures[3], pictures[7]) and not np.array_equal(
        pictures[7], pictures[15]
    )
    about = Image.open(result["grid"]).text  # type: ignore[attr-defined]
    assert json.loads(about["row_labels"])[:2] == [
        "a red heart: x_t",
        "a red heart: x_0 predicted from it",
    ]
    assert json.loads(about["column_labels"]) == ["t = 50", "t = 33", "t = 17", "t = 0"]
    assert (about["run"], about["decoder"], about["seed"], about["steps"]) == (
        "small",
        "decoder-key",
        "0",
        "12",
    )
    assert np.array_equal(drawn(told(capsys, *arguments)), pictures)
    assert not np.array_equal(drawn(told(capsys, *arguments, "--seed", "1")), pictures)


def test_shared_latents_of_held_out_pictures(
    root: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = (
        "shared-latents",
        "--root",
        root,
        "--out",
        str(tmp_path),
        "--count",
        "3",
        "--samples",
        "2",
        "--t",
        "40",
        "--t",
        "5",
    )
    result = told(capsys, *arguments)
    assert (
        result["settings"]["times"] == [5, 40] and result["settings"]["steps"] == 50
    )  # as many as this T has
    assert len(result["files"]) == 3 * (1 + 2 * 3) and len(set(result["settings"]["pictures"])) == 3
    near, far = result["figures"]["rms"]
    assert near["t"] == 5 and near["between_samples"] < far["between_samples"]
    about = Image.open(result["grid"]).text  # type: ignore[attr-defined]
    assert all(
        label in {f"colour {number}" for number in range(12, 16)}
        for label in json.loads(about["row_labels"])
    )
    original = drawn(result)[0]
    middle = evaluation_run.colour(int(json.loads(about["row_labels"])[0].split()[-1]))
    assert np.abs(original[4, 4].astype(int) - middle).max() <= 1
    code, out, _ = ran(capsys, "diffusion", *arguments)
    assert (
        code == 0
        and out.splitlines()[0].startswith("t = 5 ")
        and out.splitlines()[-1].startswith(result["grid"])
    )


def test_interpolation_of_held_out_pairs_and_of_given_pictures(
    root: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = (
        "interpolate",
        "--root",
        root,
        "--out",
        str(tmp_path / "out"),
        "--columns",
        "3",
        "--t",
        "25",
    )
    result = told(capsys, *base, "--count", "2")
    assert len(result["files"]) == 2 * (3 + 2) and [
        len(keys) for keys in result["settings"]["pictures"]
    ] == [2, 2]
    for name, colour in (("a", (255, 0, 0)), ("b", (0, 0, 255))):
        Image.new("RGB", (30, 30), colour).save(tmp_path / f"{name}.png")
    files = (str(tmp_path / "a.png"), str(tmp_path / "b.png"))
    given = drawn(told(capsys, *base, *files))
    assert (
        given.shape == (5, 8, 8, 3)
        and given[0].reshape(-1, 3).max(0).tolist() == [255, 0, 0]
        and given[-1, 4, 4].tolist() == [0, 0, 255]
    )
    assert not np.array_equal(drawn(told(capsys, *base, *files, "--told")), given)


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (("across-time", " "), "the text is empty"),
        (("across-time", "blue", "--steps", "51"), "--steps 51: this decoder has 50"),
        (
            ("across-time", "blue", "--steps", "5", "--columns", "9"),
            "--columns 9: 5 steps have 6 times at most",
        ),
        (("shared-latents", "--t", "51"), "--t 51: this decoder's times are 1 to 50"),
        (("shared-latents", "--t", "0"), "should be greater than or equal to 1"),
        (("shared-latents", "nowhere.png"), "nowhere.png: there is no such file"),
        (("interpolate", "a.png"), "1 picture given: give two, or none for held-out ones"),
        (("interpolate", "--run", "other"), "has no run other"),
    ],
)
def test_a_mistake_is_one_line(
    root: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    arguments: tuple[str, ...],
    complaint: str,
) -> None:
    code, out, err = ran(
        capsys, "diffusion", *arguments, "--root", root, "--out", str(tmp_path / "out")
    )
    assert (code, out) == (2, "") and err.count("\n") == 1 and complaint in err
    assert not (tmp_path / "out").exists()


def test_a_run_that_holds_nothing_out_asks_for_pictures(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    one = [evaluation_run.row(number, "plain", "train") for number in range(3)]
    for rows, complaint in (
        (one, "holds out no concept"),
        ([*one, evaluation_run.row(5, "plain", "held_out_concept")], "one concept only"),
    ):
        place = write_root(tmp_path / str(len(rows)), rows)
        code, out, err = ran(
            capsys, "diffusion", "interpolate", "--root", place, "--out", str(tmp_path / "out")
        )
        assert (code, out) == (2, "") and complaint in err
