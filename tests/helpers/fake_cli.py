"""The command line over the fake stages, for tests that need a process of their own: `python -m
tests.helpers.fake_cli run RECIPE …`.
"""

import sys
import types

import flows.orchestration.stages
from flows.config.recipe_file import find_recipe, read_recipe, validated
from tests.helpers.fake_stages import FAKES, FakeConfig


def load_recipe(recipe: str, overrides: list[str]) -> FakeConfig:
    """Load a recipe of the fake sections."""
    path = find_recipe(recipe)
    return validated(read_recipe(path, overrides), FakeConfig, path.name)


def install() -> None:
    """Put the fake sections and stages in the place of the real ones."""
    config = types.ModuleType("flows.config.run_config")
    config.load_recipe = load_recipe  # type: ignore[attr-defined]
    sys.modules["flows.config.run_config"] = config
    flows.orchestration.stages.STAGES = FAKES  # type: ignore[assignment]


if __name__ == "__main__":
    install()
    from flows.cli.main import main

    main()
