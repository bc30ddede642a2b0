"""The built-in recipes are valid, and every key of every section is documented and can be overridden."""

from pathlib import Path

import pytest

from flows.config import RunConfig, load_recipe
from flows.recipe import BUILT_IN
from flows.stages import STAGES, sections_of
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
    section = RunConfig.model_fields[name].annotation
    assert isinstance(section, type) and issubclass(section, Section)
    assert [key for key, field in section.model_fields.items() if not field.description] == []
    assert section.outside_key <= section.model_fields.keys()


def test_every_section_belongs_to_a_stage_but_the_cluster() -> None:
    assert {name for stage in STAGES for name in stage.sections} == RunConfig.model_fields.keys() - {"cluster"}


def test_every_stage_needs_stages_before_it() -> None:
    for place, stage in enumerate(STAGES):
        assert set(stage.needs) <= {each.name for each in STAGES[:place]}


def test_a_resolved_config_comes_back_from_json() -> None:
    config = load_recipe("quickstart")
    assert RunConfig.model_validate_json(config.model_dump_json()) == config
    for stage in STAGES:
        assert all(isinstance(section, dict) for section in sections_of(stage, config).values())


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("clip.widht=3", "quickstart.toml: [clip] widht: no such key"),
        ("decodre.width=3", "quickstart.toml: [decodre]: no such section, did you mean [decoder]?"),
        ("data.image_size_px=big", 'quickstart.toml: [data] image_size_px = "big": should be a valid integer'),
        ("data.image_size_px=1", "quickstart.toml: [data] image_size_px = 1: should be greater than or equal to"),
        ("data.sources=[]", "quickstart.toml: [data] sources = []: "),
    ],
)
def test_a_mistake_is_one_line(override: str, message: str) -> None:
    with pytest.raises(CallerError) as caught:
        load_recipe("quickstart", [override])
    assert str(caught.value).startswith(message) and "\n" not in str(caught.value)


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_says_its_command_hardware_and_time(path: Path) -> None:
    header = path.read_text().partition("\n[")[0]
    for word in ("unclip run", "Hardware", "Time"):
        assert word.lower() in header.lower(), f"the header of {path.name} must say: {word}"
