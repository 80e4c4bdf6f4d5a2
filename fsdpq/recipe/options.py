"""The base class of every section of a recipe.

A field's docstring is its documentation: it becomes the ``description`` in the JSON Schema.
"""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, GetJsonSchemaHandler
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema


class Options(BaseModel):
    """Options of one section: frozen, and unknown keys are mistakes.

    Validators are built at first use (``defer_build``): ``fsdpq validate`` needs the one of the
    whole recipe only, so a default that is itself an Options is made by ``model_construct``.
    """

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        strict=False,
        allow_inf_nan=False,
        ser_json_inf_nan="null",
        defer_build=True,
    )

    @classmethod
    def __get_pydantic_json_schema__(
        cls, core_schema: CoreSchema, handler: GetJsonSchemaHandler, /
    ) -> JsonSchemaValue:
        """Returns the JSON Schema, with the docstrings of the fields as their descriptions."""
        from fsdpq.recipe.field_docs import field_docs

        schema = handler(core_schema)
        properties = handler.resolve_ref_schema(schema)["properties"]
        for name, text in field_docs(cls).items():
            properties[name]["description"] = text
        return schema
