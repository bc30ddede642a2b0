"""A condition of promotion is split into its parts."""

import pytest

from flows.config.promotion_conditions import parsed


@pytest.mark.parametrize(
    ("condition", "parts"),
    [
        ("a.b >= 0.1", ("a.b", ">=", "0.1", None, None)),
        (" a.b<-1e-3 ", ("a.b", "<", "-1e-3", None, None)),
        ("a.b > current", ("a.b", ">", None, None, None)),
        ("a.b <= current - 0.05", ("a.b", "<=", None, "-", "0.05")),
        ("a.b >= current*1.1", ("a.b", ">=", None, "*", "1.1")),
    ],
)
def test_a_condition_is_a_figure_a_comparison_and_a_bound(
    condition: str, parts: tuple[str | None, ...]
) -> None:
    assert parsed(condition) == parts
