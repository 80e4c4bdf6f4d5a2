"""Docstrings of fields are read like pydantic reads them, and only when somebody asks."""

import subprocess
import sys

from pydantic import BaseModel, ConfigDict

from fsdpq.recipe.describe import list_sections
from fsdpq.recipe.explain import UNITS
from fsdpq.recipe.field_docs import field_docs
from fsdpq.recipe.root import Recipe
from fsdpq.recipe.sections.lr_scheduler import CosineScheduleOptions
from fsdpq.recipe.sections.output import ProfileOptions, WandbOptions
from fsdpq.recipe.sections.source import MixturePart


class Documented(BaseModel):
    first: int = 1
    """One line."""

    second: int = 2
    """Two lines,
    with ``code`` and an indent:

        like this
    """

    third: int = 3


def test_every_field_has_documentation() -> None:
    kinds = [k for section in list_sections().values() for k in section.kinds.values()]
    for options in [Recipe, WandbOptions, ProfileOptions, *kinds]:
        assert set(field_docs(options)) == set(options.model_fields), options


def test_documentation_is_inherited() -> None:
    docs = field_docs(CosineScheduleOptions)
    assert docs["warmup_ratio"] == "The same as a share of all steps, rounded up."
    assert docs["kind"] == "Selects this schedule."


def test_documentation_is_what_pydantic_reads() -> None:
    class Theirs(Documented):
        model_config = ConfigDict(use_attribute_docstrings=True)

        first: int = 1
        """One line."""

        second: int = 2
        """Two lines,
        with ``code`` and an indent:

            like this
        """

        third: int = 3

    read = {name: info.description for name, info in Theirs.model_fields.items()}
    assert dict(field_docs(Documented)) == {name: text for name, text in read.items() if text}


def test_reading_a_recipe_parses_no_source() -> None:
    code = "import sys, fsdpq.recipe.load; print('fsdpq.recipe.field_docs' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"


def test_units_belong_to_fields() -> None:
    kinds = [k for section in list_sections().values() for k in section.kinds.values()]
    names = {
        name for options in [*kinds, MixturePart, ProfileOptions] for name in options.model_fields
    }
    assert set(UNITS) <= names
