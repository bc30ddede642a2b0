"""Stage keys: what a stage is named by, whatever the code is called and wherever it lies."""

import json
from pathlib import Path

import pytest

from flows.config.recipe_file import BUILT_IN
from flows.config.run_config import load_recipe
from flows.orchestration.stages import STAGES
from flows.runs.planning import plan, stages_of
from infra.storage.store import open_root

RECORDED_KEYS: dict[str, dict[str, str]] = json.loads(
    Path(__file__).with_name("stage_keys.json").read_text()
)


def test_every_bundled_recipe_has_its_keys_recorded() -> None:
    assert set(RECORDED_KEYS) == {path.stem for path in BUILT_IN.glob("*.toml")}


@pytest.mark.parametrize("recipe", RECORDED_KEYS)
def test_a_recipe_has_the_keys_that_it_had_before(recipe: str, tmp_path: Path) -> None:
    """A key that changes retrains everybody's models: raise a stage's version on purpose, and
    record the keys anew.
    """
    config = load_recipe(recipe, [])
    plans = plan(open_root(str(tmp_path)), config, stages_of(config, (), STAGES))
    assert {one.stage.name: one.key for one in plans} == RECORDED_KEYS[recipe]
