"""`unclip recipe` shows every key with its meaning, and what it shows is that recipe."""

from pathlib import Path

import pytest
from pydantic import Field

from flows.cli.main import main
from flows.cli.recipe import _lines, _parts
from flows.config.recipe_file import BUILT_IN
from flows.config.run_config import RunConfig, load_recipe
from infra.settings import Section

RECIPES = sorted(path.stem for path in BUILT_IN.glob("*.toml"))


def shown(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    with pytest.raises(SystemExit) as left:
        main(["recipe", *arguments])
    captured = capsys.readouterr()
    assert (left.value.code, captured.err) == (0, "")
    return captured.out


@pytest.mark.parametrize("name", RECIPES)
def test_what_is_shown_is_the_recipe_again(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "again.toml").write_text(
        shown(capsys, name, "--set", 'curate.held_out_styles=["a \\"quoted\\" one"]')
    )
    again = load_recipe(str(tmp_path / "again.toml")).model_dump_json()
    first = load_recipe(name, ['curate.held_out_styles=["a \\"quoted\\" one"]'])
    # Paths are relative to the recipe's folder; those of our own recipes to the working directory.
    assert again.replace(f"{tmp_path}/", "") == first.model_dump_json()


def sections(model: type[Section]) -> set[type[Section]]:
    inner = {
        part
        for field in model.model_fields.values()
        for part in _parts(field.annotation)
        if isinstance(part, type)
    }
    return {model}.union(*(sections(part) for part in inner if issubclass(part, Section)))


def test_every_key_that_can_be_set_says_what_it_means() -> None:
    silent = {
        f"{section.__name__}.{name}"
        for section in sections(RunConfig) - {RunConfig}
        for name, field in section.model_fields.items()
        if not field.description and name != "kind"
    }
    assert silent == set()


def test_one_section_and_what_it_allows(capsys: pytest.CaptureFixture[str]) -> None:
    out = shown(capsys, "quickstart", "--section", "tokenizer")
    assert (
        out.startswith("# How captions become tokens.\n[tokenizer]\n")
        and "(259 to 1,048,576)\nvocab_size = 2048\n" in out
    )
    assert out.count("[") == 1


def test_a_section_that_a_recipe_lacks_is_shown_with_its_defaults_as_comments(
    capsys: pytest.CaptureFixture[str],
) -> None:
    lines = shown(capsys, "quickstart", "--section", "dedup").splitlines()
    assert {"# [dedup]", "# semantic = true"} <= set(lines) and all(
        line.startswith("#") for line in lines
    )
    kinds = shown(capsys, "quickstart", "--section", "data").split("[[data.sources]]\n")
    assert (
        'kind = "packages"' in kinds[1]
        and '# kind = "urls"\n' in kinds[2]
        and '# url_column = "url"\n' in kinds[2]
    )


def test_a_section_that_does_not_exist_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        main(["recipe", "quickstart", "--section", "clipp"])
    assert (
        left.value.code == 2
        and "--section clipp: there are data, curate" in capsys.readouterr().err
    )


class Awkward(Section):
    """Values of every kind."""

    name: str = 'a "name"\nof two lines'
    share: float = Field(1e-5, gt=0)
    none: int | None = None
    table: dict[str, int] = Field(default={"a b": 1})
    """A table."""


def test_values_of_every_kind_are_toml() -> None:
    assert list(_lines(Awkward, dict(Awkward()), "x.")) == [
        'name = "a \\"name\\"\\nof two lines"',
        "# (more than 0)",
        "share = 1e-05",
        "# none =",
        "# A table.",
        'table = { "a b" = 1 }',
    ]
