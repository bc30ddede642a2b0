"""What is written as TOML is read back equal by the standard library."""

import tomllib
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from infra.settings import Section
from infra.toml_text import toml_value

SCALARS = (
    st.booleans()
    | st.integers(-(2**63), 2**63 - 1)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(exclude_categories=["Cs"]))
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner) | st.dictionaries(st.text("aß .\"'"), inner),
    max_leaves=8,
)


@given(VALUES)
def test_a_value_is_read_back_equal(value: Any) -> None:
    assert tomllib.loads(f"value = {toml_value(value)}")["value"] == value


def test_a_section_is_a_table_without_its_unset_fields() -> None:
    class Shape(Section):
        side_px: int = 3
        name: str | None = None

    assert toml_value(Shape()) == '{ "side_px" = 3 }'
    assert toml_value(()) == "[]" and toml_value({}) == "{}"
