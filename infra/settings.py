"""The base of every config section: frozen, no unknown keys, every field documented by the docstring below it.

A section lives beside the code that it configures; `flows/config.py` collects the sections into one recipe.
"""

from pydantic import BaseModel, ConfigDict


class Section(BaseModel):
    """One section of a recipe."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", use_attribute_docstrings=True, validate_default=True, allow_inf_nan=False
    )
