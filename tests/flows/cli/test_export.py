"""An exported folder draws what the run draws, without Ray, Prefect and the rest; its card tells
where it comes from.
"""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from flows.cli.main import main
from flows.runs.export_bundle import write_export
from flows.runs.model_card import card, plain
from flows.runs.records import committed_of, find_run
from infra.errors import CallerError, StorageError
from infra.storage.store import Root
from tests.helpers.small_systems import write_root
from training.generation.unclip import Unclip
from training.jobs.train import write_model
from training.models.upsampler import Upsampler
from training.sections.upsampler_section import UpsamplerConfig

HERE = Path(__file__).parents[3]
BLOCKED = (
    "ray",
    "prefect",
    "faiss",
    "img2dataset",
    "typer",
    "fsspec",
    "s3fs",
    "fastapi",
    "pyarrow",
    "pandas",
    "matplotlib",
    "cv2",
    "PIL",
    "jinja2",
    "flows",
    "indexing",
    "requests",
    "httpx",
    "aiohttp",
)
THREE_LINES = """
import sys
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {blocked}:
            raise ImportError("blocked: " + name)
sys.meta_path.insert(0, Blocked())
import socket
socket.socket.connect = socket.create_connection = None
from training.generation.unclip import Unclip
model = Unclip.load(sys.argv[1])
pictures = model.generate(["a red heart", "blue"], count=2, seed=5, upsample=len(sys.argv) > 3)
import numpy as np
np.save(sys.argv[2], pictures)
"""


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Root:
    return write_root(tmp_path_factory.mktemp("place"))


@pytest.fixture(scope="module")
def folder(root: Root, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("out") / "small"
    with pytest.raises(SystemExit) as left:
        main(["export", str(folder), "--root", root.uri, "--run", "small"])
    assert not left.value.code
    return folder


def test_it_draws_the_runs_pictures_with_torch_alone(
    root: Root, folder: Path, tmp_path: Path
) -> None:
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            THREE_LINES.format(blocked=set(BLOCKED)),
            str(folder),
            str(tmp_path / "x.npy"),
        ],
        cwd=HERE,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    record = find_run(root)
    model = Unclip.load(
        *(committed_of(root, record, stage).local_folder for stage in ("clip", "prior", "decoder"))
    )
    assert np.array_equal(
        np.load(tmp_path / "x.npy"), model.generate(["a red heart", "blue"], count=2, seed=5)
    )


def test_its_up_samplers_come_along(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(CallerError, match="this system has no up-sampler"):
        Unclip.load(folder).generate(["blue"], upsample=True)
    whole = shutil.copytree(folder, tmp_path / "whole")
    for name, side_px in (("upsampler", 16), ("upsampler_2", 32)):
        config = UpsamplerConfig(
            image_size_px=side_px,
            factor=2,
            crop_fraction=1,
            width=8,
            multiples=(1,),
            depth=1,
            T=50,
            sampling_steps=2,
        )
        torch.manual_seed(1)
        model = Upsampler(config).requires_grad_(False)
        model.leave.weight.normal_(std=0.1)
        (whole / name).mkdir()
        write_model("upsampler", model, model.state_dict(), config, whole / name)
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            THREE_LINES.format(blocked=set(BLOCKED)),
            str(whole),
            str(tmp_path / "x.npy"),
            "upsample",
        ],
        cwd=HERE,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    found = np.load(tmp_path / "x.npy")
    assert found.shape == (2, 2, 32, 32, 3)
    again = Unclip.load(whole).generate(["blue"], count=2, seed=5, upsample=True)[0]
    assert np.abs(found[1].astype(int) - again).max() <= 1, (
        "a picture depends on its own prompt, seed and place"
    )


def test_the_folder_is_whole_and_nothing_stands_beside_it(folder: Path) -> None:
    files = {str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file()}
    models = {
        f"{stage}/{name}"
        for stage in ("clip", "prior", "decoder")
        for name in ("config.json", "weights.safetensors")
    }
    assert files == models | {"clip/tokenizer.json", "lineage.json", "README.md"}
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]
    lineage = json.loads((folder / "lineage.json").read_text())
    assert (
        lineage["stages"]["decoder"]["key"] == "decoder-key" and lineage["run"]["name"] == "small"
    )
    text = (folder / "README.md").read_text()
    for words in ("| MIT | 40 |", "not evaluated", "`decoder-key`", "(1, 4, 8, 8, 3)"):
        assert words in text


def test_it_overwrites_nothing_and_refuses_a_changed_file(
    root: Root, folder: Path, tmp_path: Path
) -> None:
    with pytest.raises(CallerError, match="is there already"):
        write_export(root, find_run(root), folder)
    copy = write_root(tmp_path)
    weights = committed_of(copy, find_run(copy), "prior").local_folder / "weights.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    with pytest.raises(
        StorageError, match=r"prior/prior-key/weights.safetensors is not what its manifest says"
    ):
        write_export(copy, find_run(copy), tmp_path / "new")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["made", "root"]


def test_a_folder_without_models_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(
        CallerError, match="holds no model: use a folder written by `unclip export`"
    ):
        Unclip.load(tmp_path)


def test_a_card_tells_the_measured_figures(folder: Path) -> None:
    lineage = json.loads((folder / "lineage.json").read_text())
    facts = {
        stage: json.loads((folder / stage / "config.json").read_text())
        for stage in ("clip", "prior", "decoder")
    }
    figure = {"value": 0.42, "low": 0.4, "high": 0.45, "n": 30, "groups": 3, "chance": 0.125}
    score = {"value": 31.25, "low": None, "high": None, "n": 6, "groups": 1}
    report: dict[str, Any] = {
        "zero_shot": {
            "held_out_style": {
                "name": {"n": 30, "classes": 8, "top_1": figure},
                "category": {"n": 0, "note": "no pairs"},
            }
        },
        "retrieval": {"held_out_style": {"text_to_image": {"recall@10": figure}}},
        "generation": dict.fromkeys(("clip_score", "mismatched", "real_pairs"), score)
        | {"own_prompt_first": figure},
    }
    text = card(lineage["run"], lineage["stages"], facts, {"style": {"<b>|evil": 3}}, report)
    assert (
        "| zero-shot name, held out style: top-1 of 8 | 42.0 % (40.0 to 45.0) | 30 | 12.5 % |"
        in text
    )
    assert "| CLIP score of samples (its own CLIP) | 31.2 | 6 |  |" in text
    assert "upsample" not in text
    facts |= {
        "upsampler": {"upsampler": {"image_size_px": 16}},
        "upsampler_2": {"upsampler": {"image_size_px": 32}},
    }
    more = dict.fromkeys(("upsampler", "upsampler_2"), lineage["stages"]["decoder"])
    assert "`generate(..., upsample=True)` enlarges what it draws to 32 px." in card(
        lineage["run"], lineage["stages"] | more, facts, {}, None
    )
    assert "<b>" not in text and plain("<b>|x\ny") == "&#60;b&#62;&#124;x y"
