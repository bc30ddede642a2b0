"""The report's section on the decoder: every figure is that of the measurement, hostile captions
stay texts, what lacks is said.
"""

import json
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from PIL import Image
from pydantic import ValidationError

import indexing
from flows.evaluation import decoder_section
from indexing.evaluation.evaluate import EvaluateConfig
from indexing.report import page as report_page
from tests.helpers.evaluation_run import HOSTILE, row, usual_rows, write_run
from tests.helpers.small_systems import write_system
from tests.helpers.stage_folders import shards_in
from tests.indexing.report.test_page import Page, assert_stands_alone
from training.generation import latents, reconstruction
from training.generation.unclip import Unclip

SCHEMA = json.loads((Path(indexing.__file__).parent / "report" / "report.schema.json").read_text())
QUICK = EvaluateConfig(
    prompts=("blue", HOSTILE),
    latent_prompts=2,
    latent_steps=6,
    likelihood_pictures=3,
    likelihood_draws=2,
    inversion_pictures=2,
    inversion_steps=(3, 5, 60),
    resamples=200,
)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Unclip:
    folder = write_system(tmp_path_factory.mktemp("run"))
    return Unclip.load(folder / "clip", folder / "prior", folder / "decoder")


def made(
    folder: Path, model: Unclip, rows: list[dict[str, Any]], config: EvaluateConfig = QUICK
) -> dict[str, Any]:
    """Return the section, which must keep to the report's schema."""
    write_run(folder, rows)
    found = decoder_section.section(
        config, model, folder / "embed", shards_in(folder), folder / "out"
    )
    written = json.loads(json.dumps(found, allow_nan=False))
    jsonschema.Draft202012Validator(
        {**SCHEMA["properties"]["sections"], "$defs": SCHEMA["$defs"]}
    ).validate([written])
    return written


def page_of(section: dict[str, Any], folder: Path) -> Page:
    """Render the section into a page that holds nothing else."""
    facts = {
        "run": {
            "config": {},
            "started": None,
            "finished": None,
            "seconds": 0,
            "packages": {},
            "data": {},
            "licences": {},
        },
        "stages": [],
        "zero_shot": {},
        "retrieval": {},
        "sections": [section],
        "generation": {
            "n": 0,
            "seed": 0,
            "steps": None,
            "guidance": None,
            "side_px": 8,
            "sheet": "",
            "prompts": [],
            "nearest_training": {"pixel_pool": 0, "training_pictures": 0},
            **{
                name: {"value": None, "low": None, "high": None, "n": 0, "groups": 0}
                for name in ("clip_score", "mismatched", "own_prompt_first", "real_pairs")
            },
        },
    }
    return Page(report_page.render(facts, folder / "out"))


def test_the_figures_are_those_of_the_measurements(tmp_path: Path, model: Unclip) -> None:
    found = made(tmp_path, model, usual_rows())
    assert found["title"] == decoder_section.TITLE
    likelihood, inversion, shared = found["tables"]

    def read(split: str, count: int) -> reconstruction.Described:
        return reconstruction.read(
            tmp_path / "embed", shards_in(tmp_path), split, model.tokenizer, 8, count, 0
        )

    bits = reconstruction.likelihood(
        model.decoder, read("held_out_concept", 4).first(3), read("train", 1), 2, 0
    )
    for cells, told in zip(likelihood["rows"], ("told_all", "told_nothing"), strict=False):
        figure = cells[1]
        assert (
            figure["value"] == pytest.approx(bits[told]["bits_per_dim"])
            and figure["n"] == cells[-1] == 3
        )
        half = 1.959964 * bits[told]["standard_error"]
        assert (figure["high"] - figure["value"], figure["value"] - figure["low"]) == pytest.approx(
            (half, half)
        )
        assert sum(cells[3:6]) == pytest.approx(figure["value"])
    assert likelihood["rows"][2][1] == pytest.approx(bits["png_bits_per_dim"])
    for words in (
        "T = 50 steps",
        "3 network calls a picture",
        "1 training pictures",
        "may be held against PNG",
    ):
        assert words in likelihood["caption"]
    assert [cells[0] for cells in inversion["rows"]] == ["3", "5"]  # T is 50
    assert inversion["head"] == ["Steps", "plain", "one refinement"]
    rows = reconstruction.inversion(model.decoder, read("held_out_concept", 4).first(2), (3, 5))
    assert (
        inversion["rows"][1][2]["value"] == pytest.approx(sum(rows[3]["psnr_db"]) / 2)
        and inversion["rows"][1][2]["unit"] == "dB"
    )
    assert [cells[0] for cells in shared["rows"]] == ["12", "25", "38"]
    alike = latents.sharing(
        model.decoder, read("held_out_concept", 4).x_0, [12, 25, 38], decoder_section.SAMPLES, 6, 0
    )  # told nothing
    assert [cells[1] for cells in shared["rows"]] == pytest.approx(alike.between_samples_rms)
    assert [cells[2] for cells in shared["rows"]] == pytest.approx(alike.to_image_rms)


def test_pictures_know_their_settings_and_are_described(tmp_path: Path, model: Unclip) -> None:
    found = made(tmp_path, model, usual_rows())
    assert [each["picture"] for each in found["pictures"]] == [
        f"pictures/{name}.png" for name in ("across-time", "shared-latents", "interpolation")
    ]
    for shown in found["pictures"]:
        with Image.open(tmp_path / "out" / shown["picture"]) as opened:
            assert json.loads(opened.text["steps"]) == 6 and json.loads(opened.text["row_labels"])  # type: ignore[attr-defined]
            assert opened.width > 300
        assert shown["caption"]
    assert found["pictures"][1]["alt"].count("colour 1") == 4  # each held-out picture is named
    again = made(tmp_path / "again", model, usual_rows())
    assert again == found
    for shown in found["pictures"]:
        assert (tmp_path / "out" / shown["picture"]).read_bytes() == (
            tmp_path / "again" / "out" / shown["picture"]
        ).read_bytes()


def test_hostile_captions_stay_texts_on_the_page(tmp_path: Path, model: Unclip) -> None:
    rows = [
        row(number, "plain", split, caption=HOSTILE, captions=[HOSTILE])
        for number in (1, 2)
        for split in ("train", "held_out_concept")
    ]
    page = page_of(made(tmp_path, model, rows), tmp_path)
    assert_stands_alone(page)
    described = [attributes["alt"] for tag, attributes in page.tags if tag == "img"]
    assert len(described) == 3 and all(HOSTILE in alt for alt in described)


def test_every_figure_is_on_the_page(tmp_path: Path, model: Unclip) -> None:
    found = made(tmp_path, model, usual_rows())
    page = page_of(found, tmp_path)
    for table in found["tables"]:
        assert table["caption"] in page.text
        for cells in table["rows"]:
            for value in cells[1:]:
                number = value["value"] if isinstance(value, dict) else value
                assert number is None or any(
                    f"{number:{how}}" in page.text for how in (".3g", ".4g", ",.1f")
                )
    assert found["pictures"][0]["caption"] in page.text


def test_no_held_out_concept_is_said_and_generation_is_shown_all_the_same(
    tmp_path: Path, model: Unclip
) -> None:
    found = made(tmp_path, model, [each for each in usual_rows() if each["split"] == "train"])
    assert found["text"] == [
        "No pair of a held-out concept: the decoder is not measured on unseen pictures."
    ]
    assert found["tables"] == [] and [each["picture"] for each in found["pictures"]] == [
        "pictures/across-time.png"
    ]


def test_no_training_pairs_are_said_to_lack(tmp_path: Path, model: Unclip) -> None:
    found = made(tmp_path, model, [each for each in usual_rows() if each["split"] != "train"])
    assert len(found["tables"]) == 2 and "no training pictures" in found["text"][1]


def test_one_held_out_concept_is_not_interpolated(tmp_path: Path, model: Unclip) -> None:
    found = made(tmp_path, model, [row(1, "plain", "train"), row(2, "plain", "held_out_concept")])
    assert (
        len(found["pictures"]) == 2 and found["tables"][0]["rows"][0][2] is None
    )  # no standard error of one picture
    assert found["tables"][0]["rows"][0][1]["low"] is None


def test_what_is_not_wanted_is_left_out(tmp_path: Path, model: Unclip) -> None:
    none = QUICK.model_copy(
        update={"likelihood_pictures": 0, "inversion_pictures": 0, "latent_pictures": 0}
    )
    found = made(tmp_path, model, usual_rows(), none)
    assert found["tables"] == [] and len(found["pictures"]) == 1


@pytest.mark.parametrize(
    "wrong",
    [
        {"latent_times": [0.5, 0]},
        {"latent_times": [1.5]},
        {"inversion_steps": [0]},
        {"latent_prompts": 0},
    ],
)
def test_a_wrong_setting_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        EvaluateConfig.model_validate(wrong)
