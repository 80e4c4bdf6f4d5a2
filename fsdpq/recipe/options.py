"""The base class of every section of a recipe.

A field's docstring is its documentation: it becomes the ``description`` in the JSON Schema.
"""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class Options(BaseModel):
    """Options of one section: frozen, and unknown keys are mistakes."""

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        use_attribute_docstrings=True,
        strict=False,
        allow_inf_nan=False,
        ser_json_inf_nan="null",
    )
