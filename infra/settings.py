"""The base of every config section: frozen, no unknown keys, every field documented by the
docstring below it.

A section lives beside the code that it configures; `flows/config/run_config.py` collects the
sections into one recipe.
"""

from typing import Any, ClassVar

from pydantic import BaseModel, ConfigDict


class Section(BaseModel):
    """One section of a recipe."""

    outside_key: ClassVar[frozenset[str]] = frozenset()
    """Fields that change how a stage runs but not its output (threads, time limits): changing one
    makes no stage stale."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        use_attribute_docstrings=True,
        validate_default=True,
        allow_inf_nan=False,
    )

    def keyed(self) -> dict[str, Any]:
        """Return the fields that a stage's content key depends on, JSON-able."""
        return self.model_dump(mode="json", exclude=set(self.outside_key))
