"""The built-in recipes are valid, and every key of every section is documented and can be
overridden.
"""

from pathlib import Path
from typing import get_args

import pytest

from flows.config.recipe_file import BUILT_IN
from flows.config.run_config import RunConfig, load_recipe
from flows.orchestration.stages import STAGES, UPSAMPLERS
from flows.runs.stage import sections_of
from infra.errors import CallerError
from infra.settings import Section

RECIPES = sorted(BUILT_IN.glob("*.toml"))


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_built_in_recipe_is_valid_by_path_and_by_name(path: Path) -> None:
    assert load_recipe(str(path)) == load_recipe(path.stem) == load_recipe(path.name)


def test_there_is_a_quickstart() -> None:
    assert "quickstart" in [path.stem for path in RECIPES]


@pytest.mark.parametrize("name", RunConfig.model_fields)
def test_every_key_is_documented_and_every_key_outside_the_content_key_exists(name: str) -> None:
    annotation = RunConfig.model_fields[name].annotation
    section = next((part for part in get_args(annotation) if part is not type(None)), annotation)
    assert isinstance(section, type) and issubclass(section, Section)
    assert [key for key, field in section.model_fields.items() if not field.description] == []
    assert section.outside_key <= section.model_fields.keys()


def test_every_section_belongs_to_a_stage_but_the_cluster() -> None:
    assert {
        name for stage in STAGES for name in stage.sections
    } == RunConfig.model_fields.keys() - {"cluster"}


def test_every_stage_needs_stages_before_it() -> None:
    for place, stage in enumerate(STAGES):
        assert {*stage.needs, *stage.wants} <= {each.name for each in STAGES[:place]}


def test_a_resolved_config_comes_back_from_json() -> None:
    config = load_recipe("quickstart")
    assert RunConfig.model_validate_json(config.model_dump_json()) == config
    for stage in STAGES:
        has_sections = stage.name not in (*UPSAMPLERS, "dedup")  # the quickstart has none of them
        assert all(
            isinstance(section, dict) == has_sections
            for section in sections_of(stage, config).values()
        )


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("clip.widht=3", "quickstart.toml: [clip] widht: no such key"),
        ("decodre.width=3", "quickstart.toml: [decodre]: no such section, did you mean [decoder]?"),
        (
            "data.image_size_px=big",
            'quickstart.toml: [data] image_size_px = "big": should be a valid integer',
        ),
        (
            "data.image_size_px=1",
            "quickstart.toml: [data] image_size_px = 1: should be greater than or equal to",
        ),
        ("data.sources=[]", "quickstart.toml: [data] sources = []: "),
        (
            "evaluate.relations.checks=[0.5, 1.5]",
            "quickstart.toml: [evaluate] relations.checks = [0.5, 1.5]: checks = (0.5, 1.5): each",
        ),
        (
            "evaluate.relations.keep=3",
            'quickstart.toml: [evaluate] relations = {"keep": 3}: keep = 3 must divide samples = '
            "8: survivors",
        ),
    ],
)
def test_a_mistake_is_one_line(override: str, message: str) -> None:
    with pytest.raises(CallerError) as caught:
        load_recipe("quickstart", [override])
    assert str(caught.value).startswith(message) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["decoder.image_size_px=128"],
            "[decoder] image_size_px = 128 but [data] image_size_px = 64: pictures would be "
            "enlarged",
        ),
        (
            ["clip.image_size_px=96"],
            "[clip] image_size_px = 96 but [data] image_size_px = 64: pictures would be enlarged",
        ),
        (
            ["decoder.image_size_px=20"],
            "[decoder] image_size_px = 20 but [decoder] patch_px = 2 with 3 multiples: it must be "
            "a multiple of 8",
        ),
        (["decoder.multiples=[1,2,2,2,2,2]"], "with 6 multiples: it must be a multiple of 64"),
        (
            ["clip.image_size_px=20"],
            '[clip] image_size_px = 20 but [clip] image_tower = "conv": it must be a multiple of 8',
        ),
        (
            ["clip.image_tower=vit", "clip.patch_px=5"],
            "[clip] image_size_px = 32 but [clip] patch_px = 5: the first must be a multiple",
        ),
        (
            ["clip.batch_size=30", "cluster.clip_workers=4"],
            "[clip] batch_size = 30 but [cluster] clip_workers = 4: the first must be",
        ),
        (
            ["cluster.prior_workers=5"],
            "[prior] batch_size = 128 but [cluster] prior_workers = 5: the first must be",
        ),
        (
            ["cluster.decoder_workers=3"],
            "[decoder] batch_size = 64 but [cluster] decoder_workers = 3: the first must be",
        ),
    ],
)
def test_keys_that_disagree_are_both_named(overrides: list[str], message: str) -> None:
    with pytest.raises(CallerError) as caught:
        load_recipe("quickstart", overrides)
    assert (
        str(caught.value).startswith("quickstart.toml: [")
        and message in str(caught.value)
        and "\n" not in str(caught.value)
    )


@pytest.mark.parametrize(
    "overrides",
    [
        ["clip.image_tower=vit", "clip.image_size_px=20", "clip.patch_px=5"],
        ["cluster.clip_workers=4"],
    ],
)
def test_keys_that_agree_are_taken(overrides: list[str]) -> None:
    load_recipe("quickstart", overrides)


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_says_its_command_hardware_and_time(path: Path) -> None:
    header = path.read_text().partition("\n[")[0]
    for word in ("unclip run", "Hardware", "Time"):
        assert word.lower() in header.lower(), f"the header of {path.name} must say: {word}"
