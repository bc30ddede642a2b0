"""An evaluation's figures are those of its models, whatever the data lacks, and its report keeps to
the published schema.
"""

import json
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest
from pydantic import ValidationError

import indexing
from indexing.evaluation.evaluate import EvaluateConfig, class_phrase, evaluate
from tests.helpers.evaluation_run import (
    DIM,
    HOSTILE,
    encode_images,
    encode_texts,
    generate,
    manifest,
    row,
    subject,
    usual_rows,
    write_run,
)

SCHEMA = json.loads((Path(indexing.__file__).parent / "report" / "report.schema.json").read_text())
METRICS = {
    "clip": [
        {"images_seen": 256 * step, "loss": 4.0 / step, "seconds": step} for step in range(1, 30)
    ]
}


def run(
    folder: Path,
    config: EvaluateConfig | None = None,
    texts: Any = encode_texts,
    images: Any = encode_images,
) -> dict[str, Any]:
    """Evaluate what stands in the folder; the report must keep to the schema and hold what was
    returned.
    """
    out = folder / "out"
    out.mkdir(exist_ok=True)
    config = config or EvaluateConfig(
        prompts=("colour 3", "colour 7", "colour 14"), count=2, resamples=200
    )
    stages = [manifest("ingest"), manifest("clip", {"ingest": "abc"})]
    returned = evaluate(
        config, {"config": {}}, stages, METRICS, subject(folder, texts, images), generate
    )
    written = json.loads((out / "report.json").read_text())
    jsonschema.Draft202012Validator(SCHEMA).validate(written)
    assert written == json.loads(json.dumps(returned))
    assert list(written) == ["run", "stages", "zero_shot", "retrieval", "generation", "sections"]
    assert (out / "report.html").read_text().rstrip().endswith("</html>")
    return written


def test_the_schema_is_one() -> None:
    jsonschema.Draft202012Validator.check_schema(SCHEMA)


def test_a_perfect_model_is_perfect(tmp_path: Path) -> None:
    rows = usual_rows()
    write_run(tmp_path, [rows[place] for place in np.random.default_rng(0).permutation(len(rows))])
    report = run(tmp_path)
    for split, n, names in (("held_out_concept", 8, 4), ("held_out_style", 16, 16)):
        named = report["zero_shot"][split]["name"]
        assert named["top_1"] == named["top_1"] | {
            "value": 1.0,
            "n": n,
            "groups": names,
            "chance": 1 / names,
        }
        assert named["top_1"]["low"] < 1  # so few concepts prove little
        found = report["retrieval"][split]
        assert (found["pictures"], found["captions"]) == (n, names)
        assert (
            found["image_to_text"]["recall@1"]["value"]
            == found["text_to_image"]["recall@1"]["value"]
            == 1.0
        )
        every = found["all_captions"]  # "colour N" and "a colour N", which lie alike
        assert (every["n"], every["pictures"], every["captions"]) == (2 * n, n, 2 * names)
        assert (
            every["image_to_text"]["recall@1"]["value"]
            == every["text_to_image"]["recall@1"]["value"]
            == 1.0
        )
        assert (
            every["text_to_image"]["recall@1"]["n"] == 2 * names
            and every["image_to_text"]["recall@1"]["n"] == n
        )
        for example in found["examples"]:
            assert [each["is_right"] for each in example["results"]] == [
                each["caption"] == example["caption"] for each in example["results"]
            ]
            assert example["results"][0]["is_right"]
    assert report["zero_shot"]["held_out_concept"]["category"]["classes"] == 2
    drawn = report["generation"]
    assert (drawn["n"], drawn["side_px"]) == (6, 16)
    assert drawn["clip_score"]["value"] == pytest.approx(100, abs=0.1)
    assert drawn["mismatched"]["value"] < 60
    assert drawn["own_prompt_first"]["value"] == 1.0
    assert drawn["real_pairs"]["value"] == pytest.approx(100, abs=0.1)
    assert [each["is_training_caption"] for each in drawn["prompts"]] == [True, True, False]
    for each in drawn["prompts"][:2]:
        for sample in each["samples"]:
            assert (
                sample["nearest"]["cosine"]["caption"]
                == sample["nearest"]["rms"]["caption"]
                == each["prompt"]
            )
            assert sample["nearest"]["cosine"]["value"] == pytest.approx(1, abs=1e-3)
    near = drawn["nearest_training"]
    assert near["cosine"]["unseen"]["n"] == 8
    assert near["cosine"]["unseen"]["value"] < near["cosine"]["samples"]["value"]
    assert all(
        (tmp_path / "out" / sample["picture"]).is_file()
        for each in drawn["prompts"]
        for sample in each["samples"]
    )


def test_classes_are_asked_for_by_the_names_of_their_members(tmp_path: Path) -> None:
    # "warm and bright" and "cold" are words without meaning to this model, but the held-out
    # pictures lie near trained ones of their class.
    rows = usual_rows()
    near = np.array(
        [
            encode_texts(
                [f"colour {each['number'] - 10 if each['number'] >= 12 else each['number']}"]
            )[0]
            for each in rows
        ]
    )
    write_run(tmp_path, rows, near)
    found = run(tmp_path)["zero_shot"]["held_out_concept"]
    assert found["category_by_members"]["top_1"]["value"] == 1.0
    assert found["category_by_members"]["members"] == 12  # plain and framed have one caption
    assert found["category"]["top_1"]["value"] < 1.0


def test_a_constant_model_is_at_nothing_everywhere(tmp_path: Path) -> None:
    write_run(tmp_path, usual_rows(), np.ones((48, DIM)) / np.sqrt(DIM))

    def same(things: Any) -> np.ndarray:
        return np.ones((len(things), DIM), np.float32) / np.sqrt(DIM)

    report = run(tmp_path, texts=same, images=same)
    assert {
        found["top_1"]["value"]
        for labels in report["zero_shot"].values()
        for found in labels.values()
    } == {0.0}
    for found in report["retrieval"].values():
        assert (
            found["text_to_image"]["recall@1"]["value"]
            == found["image_to_text"]["recall@1"]["value"]
            == 0.0
        )
    assert report["generation"]["own_prompt_first"]["value"] == 0.0


def test_no_held_out_pairs_are_said_to_be_none(tmp_path: Path) -> None:
    write_run(tmp_path, [each for each in usual_rows() if each["split"] == "train"])
    report = run(tmp_path)
    assert report["zero_shot"]["held_out_concept"] == {
        label: {"n": 0, "classes": count, "note": "no pairs"}
        for label, count in (("category", 2), ("subcategory", 3), ("name", 0))
    }
    assert report["retrieval"]["held_out_style"] == {"n": 0, "note": "no pairs"}
    assert report["generation"]["real_pairs"]["value"] is None
    assert report["generation"]["nearest_training"]["rms"]["unseen"]["n"] == 0
    page = (tmp_path / "out" / "report.html").read_text()
    assert "Not measured: no pairs." in page
    assert "Held-out concepts: no pairs" in page


def test_no_training_pairs_are_no_error(tmp_path: Path) -> None:
    write_run(tmp_path, [each for each in usual_rows() if each["split"] != "train"])
    report = run(tmp_path)
    assert "nearest" not in report["generation"]["prompts"][0]["samples"][0]
    assert "category_by_members" not in report["zero_shot"]["held_out_concept"]
    assert "There are no training pictures" in (tmp_path / "out" / "report.html").read_text()


def test_pairs_without_labels_say_so(tmp_path: Path) -> None:
    none = {"category": "", "subcategory": "only", "concept": ""}
    write_run(
        tmp_path,
        [
            row(number, "plain", split, **none)
            for number in range(6)
            for split in ("train", "held_out_concept")
        ],
    )
    found = run(tmp_path)["zero_shot"]["held_out_concept"]
    assert found["category"] == {"n": 0, "classes": 0, "note": "no pair has a category"}
    assert found["subcategory"] == {
        "n": 6,
        "classes": 1,
        "note": "one subcategory only: nothing to tell apart",
    }
    assert found["name"]["top_1"]["groups"] == 6
    assert "not measured: no pair has a category" in (tmp_path / "out" / "report.html").read_text()


def test_one_held_out_pair_and_one_prompt(tmp_path: Path) -> None:
    write_run(tmp_path, [row(1, "plain", "train"), row(2, "plain", "held_out_concept")])
    report = run(tmp_path, EvaluateConfig(prompts=("colour 1",), count=1, resamples=100))
    assert (
        report["zero_shot"]["held_out_concept"]["name"]["note"]
        == "one name only: nothing to tell apart"
    )
    assert report["generation"]["mismatched"]["value"] is None


def test_a_split_may_be_judged_by_a_sample(tmp_path: Path) -> None:
    write_run(tmp_path, usual_rows())
    report = run(
        tmp_path,
        EvaluateConfig(
            prompts=("colour 1",), count=1, pairs_at_most=6, pixel_pool=5, resamples=100
        ),
    )
    assert (
        report["retrieval"]["held_out_style"]["n"]
        == report["zero_shot"]["held_out_style"]["name"]["n"]
        == 6
    )
    assert report["run"]["data"]["held_out_style"]["pairs"] == 16
    assert report["generation"]["nearest_training"]["pixel_pool"] == 5


def test_the_same_evaluation_writes_the_same_report(tmp_path: Path) -> None:
    files = []
    for name in ("one", "two"):
        write_run(tmp_path / name, usual_rows())
        run(tmp_path / name)
        out = tmp_path / name / "out"
        files.append(
            {
                path.relative_to(out): path.read_bytes()
                for path in sorted(out.rglob("*"))
                if path.is_file()
            }
        )
    assert files[0] == files[1]
    assert len(files[0]) > 10


def test_labels_are_put_into_words() -> None:
    assert class_phrase("Food & Drink") == "food and drink"
    assert class_phrase("animal-bird") == "animal bird"
    assert class_phrase("") == ""


@pytest.mark.parametrize(
    "wrong",
    [
        {"prompts": []},
        {"prompts": ["a", " "]},
        {"templates": ["no place"]},
        {"templates": ["{} {}"]},
        {"count": 0},
        {"colour": 1},
    ],
)
def test_a_wrong_section_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        EvaluateConfig.model_validate(wrong)


def test_a_hostile_prompt_is_a_prompt() -> None:
    assert EvaluateConfig(prompts=(HOSTILE,)).prompts == (HOSTILE,)
