"""A recipe says what is wrong with it in one line that names recipe, section, key, value and the
mend.
"""

from pathlib import Path
from typing import Annotated, Literal

import pytest
from pydantic import Field, model_validator

from flows.config.recipe_file import find_recipe, read_recipe, validated
from infra.errors import CallerError
from infra.settings import Section


class Near(Section):
    """A source of one kind."""

    kind: Literal["near"]
    path: str


class Far(Section):
    """A source of another kind."""

    kind: Literal["far"]
    url: str


class Clip(Section):
    """A section with every type of key."""

    width: int = Field(default=64, ge=8, le=4096)
    rate: float = 0.1
    loss: Literal["softmax", "sigmoid"] = "softmax"
    sizes: tuple[int, ...] = (1, 2)
    flip: bool = False
    sources: tuple[Annotated[Near | Far, Field(discriminator="kind")], ...] = ()

    @model_validator(mode="after")
    def _is_even(self) -> "Clip":
        if self.width % 2:
            raise ValueError("width must be even")
        return self


class Whole(Section):
    """A whole recipe."""

    clip: Clip = Clip()
    prior: Clip | None = None


def complaint(text: str, tmp_path: Path, *overrides: str) -> str:
    """Return what is said about a recipe."""
    (tmp_path / "my.toml").write_text(text)
    with pytest.raises(CallerError) as caught:
        validated(read_recipe(tmp_path / "my.toml", overrides), Whole, "my.toml")
    assert "\n" not in str(caught.value) and caught.value.exit_code == 2
    return str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[clip]\nwidht = 3", "my.toml: [clip] widht: no such key, did you mean width?"),
        ("[prior]\nrat = 3", "my.toml: [prior] rat: no such key, did you mean rate?"),
        ("[clpi]\nwidth = 3", "my.toml: [clpi]: no such section, did you mean [clip]?"),
        ("[zzz]\nwidth = 3", "my.toml: [zzz]: no such section; there are [clip], [prior]"),
        ("width = 3", "my.toml: [width]: no such section"),
        ('[clip]\nwidth = "64"', 'my.toml: [clip] width = "64": should be a valid integer'),
        ("[clip]\nwidth = true", "my.toml: [clip] width = true: should be a valid integer"),
        ("[clip]\nwidth = 64.5", "my.toml: [clip] width = 64.5: should be a valid integer"),
        ("[clip]\nwidth = 4", "my.toml: [clip] width = 4: should be greater than or equal to 8"),
        ("[clip]\nwidth = 9", "my.toml: [clip]: width must be even"),
        ("[clip]\nrate = inf", "my.toml: [clip] rate = Infinity: should be a finite number"),
        (
            '[clip]\nloss = "hinge"',
            "my.toml: [clip] loss = \"hinge\": should be 'softmax' or 'sigmoid'",
        ),
        ("[clip]\nsizes = 3", "my.toml: [clip] sizes = 3: should be a valid array"),
        ('[clip]\nsizes = [1, "x"]', 'my.toml: [clip] sizes[1] = "x": should be a valid integer'),
        ("clip = 3", "my.toml: [clip]: should be an object"),
        (
            '[[clip.sources]]\nkind = "near"\npth = "x"',
            "my.toml: [clip] sources[0].pth: no such key, did you mean path? (and 1 more)",
        ),
        ('[[clip.sources]]\nkind = "far"', "my.toml: [clip] sources[0].url: must be given"),
        (
            '[[clip.sources]]\nkind = "fra"',
            'my.toml: [clip] sources[0] = {"kind": "fra"}: tag \'fra\' found',
        ),
        (
            "[clip]\nwidth = 4\nrate = true",
            "my.toml: [clip] width = 4: should be greater than or equal to 8 (and 1 more)",
        ),
        ("[clip\nwidth = 4", "is not TOML: "),
    ],
)
def test_what_is_wrong_is_named(text: str, message: str, tmp_path: Path) -> None:
    assert message in complaint(text, tmp_path)


def test_an_unknown_key_in_a_list_of_sections_has_a_suggestion_too(tmp_path: Path) -> None:
    text = '[[clip.sources]]\nkind = "near"\npath = "x"\npats = "y"'
    assert (
        complaint(text, tmp_path)
        == "my.toml: [clip] sources[0].pats: no such key, did you mean path?"
    )


def test_a_list_stands_for_a_tuple_and_an_integer_for_a_float(tmp_path: Path) -> None:
    (tmp_path / "my.toml").write_text("[clip]\nsizes = [3, 4]\nrate = 1")
    whole = validated(read_recipe(tmp_path / "my.toml"), Whole, "my.toml")
    assert whole.clip.sizes == (3, 4) and whole.clip.rate == 1.0 and whole.prior is None


def test_overrides_are_toml_values_or_bare_words_and_the_last_one_wins(tmp_path: Path) -> None:
    (tmp_path / "my.toml").write_text("[clip]\nwidth = 64")
    overrides = [
        "clip.width=128",
        "clip.width = 256",
        "clip.loss=sigmoid",
        "clip.sizes=[5]",
        "prior.flip=true",
    ]
    whole = validated(read_recipe(tmp_path / "my.toml", overrides), Whole, "my.toml")
    assert (whole.clip.width, whole.clip.loss, whole.clip.sizes) == (256, "sigmoid", (5,))
    assert whole.prior and whole.prior.flip is True


@pytest.mark.parametrize(
    "override", ["width=3", "clip.width", "clip.=3", ".width=3", "clip.width.deep=3"]
)
def test_an_override_that_cannot_be_applied_is_named(override: str, tmp_path: Path) -> None:
    assert f"--set {override}: " in complaint("[clip]\nwidth = 64", tmp_path, override)


def test_a_recipe_extends_another_key_by_key(tmp_path: Path) -> None:
    (tmp_path / "small.toml").write_text("[clip]\nwidth = 64\nrate = 0.5")
    (tmp_path / "big.toml").write_text('extends = "small.toml"\n[clip]\nwidth = 128')
    assert read_recipe(tmp_path / "big.toml") == {"clip": {"width": 128, "rate": 0.5}}


def test_a_recipe_that_extends_itself_or_nothing_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.toml").write_text('extends = "b.toml"')
    (tmp_path / "b.toml").write_text('extends = "a.toml"')
    with pytest.raises(CallerError, match=r"a\.toml extends itself"):
        read_recipe(tmp_path / "a.toml")
    (tmp_path / "c.toml").write_text('extends = "nothing.toml"')
    with pytest.raises(CallerError, match=r"there is no recipe nothing\.toml"):
        read_recipe(tmp_path / "c.toml")


def test_a_recipe_that_is_not_there_lists_those_that_are() -> None:
    with pytest.raises(
        CallerError, match="there is no recipe quikstart: give a TOML file or one of"
    ):
        find_recipe("quikstart")


@pytest.mark.parametrize(
    "url",
    [
        "s3://AKIA:hush-hush@bucket/list.parquet",
        "https://me:hush-hush@example.org/list.csv",
        "https://bucket.s3.amazonaws.com/list?X-Amz-Credential=AKIA&X-Amz-Signature=hush-hush",
        "https://storage.googleapis.com/list?x-goog-signature=hush-hush",
        "https://blob.example.org/list?sv=1&sig=hush-hush",
    ],
)
def test_an_url_with_credentials_is_refused_without_showing_them(url: str, tmp_path: Path) -> None:
    source = f'[[clip.sources]]\nkind = "far"\nurl = "https://example.org/list"\n[[clip.sources]]\nkind = "far"\nurl = "{url}"\n'  # noqa: E501
    said = complaint(source, tmp_path)
    assert (
        said.startswith("my.toml: [clip] sources[1].url holds credentials")
        and "hush-hush" not in said
        and "environment" in said
    )
    overridden = complaint("", tmp_path, f"clip.loss={url}")
    assert "[clip] loss holds credentials" in overridden and "hush-hush" not in overridden


def test_an_url_without_credentials_is_none(tmp_path: Path) -> None:
    for url in (
        "s3://bucket/a@b.parquet",
        "https://example.org/list?page=2&signed=no",
        "me@example.org",
        "unclip (+https://x.org; a@b.org)",
    ):
        (tmp_path / "my.toml").write_text(f'[[clip.sources]]\nkind = "far"\nurl = "{url}"\n')
        assert read_recipe(tmp_path / "my.toml")["clip"]["sources"][0]["url"] == url


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-8"])
def test_a_byte_order_mark_is_no_part_of_a_recipe(tmp_path: Path, encoding: str) -> None:
    (tmp_path / "my.toml").write_text('[clip]\nloss = "ä"\n', encoding=encoding)
    assert read_recipe(tmp_path / "my.toml") == {"clip": {"loss": "ä"}}
    (tmp_path / "latin.toml").write_text('loss = "ä"\n', encoding="latin-1")
    with pytest.raises(CallerError, match=r"latin\.toml is not TOML: the text is not utf-8"):
        read_recipe(tmp_path / "latin.toml")


def test_a_relative_source_is_relative_to_the_recipe_that_names_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a" / "b").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    paths = ["pairs.parquet", "../x/*.csv", "/abs", "~/home", "s3://bucket/l", "zip://a::b.zip"]
    sources = "".join(f'[[data.sources]]\npath = "{path}"\n' for path in paths)
    (tmp_path / "a" / "base.toml").write_text(f'[data]\nopt_out = ["no.txt"]\n{sources}')
    (tmp_path / "a" / "b" / "my.toml").write_text('extends = "../base.toml"\n')
    data = read_recipe(Path("a/b/my.toml"))["data"]
    assert [source["path"] for source in data["sources"]] == [
        f"{tmp_path}/a/pairs.parquet",
        f"{tmp_path}/a/../x/*.csv",
        *paths[2:],
    ]
    assert data["opt_out"] == [f"{tmp_path}/a/no.txt"]
    given = read_recipe(Path("a/base.toml"), ['data.opt_out=["mine.txt"]'])["data"]
    assert given["opt_out"] == ["mine.txt"]
