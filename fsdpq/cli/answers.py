"""Answers as JSON: the data of a verb, and its errors with the same fields as on the terminal."""

from __future__ import annotations

import json
from typing import Any

import click

from fsdpq.cli.render import problem_fields
from fsdpq.errors import FsdpqError, Problem, RecipeError

json_option = click.option("--json", "as_json", is_flag=True, help="Print the answer as JSON.")
"""Adds ``--json`` to a verb."""


def echo_json(data: Any) -> None:
    """Prints ``data`` as JSON on stdout."""
    click.echo(json.dumps(data, indent=2, ensure_ascii=False))


def error_fields(error: FsdpqError | None) -> dict[str, Any]:
    """Returns ``error`` as plain data; None is an answer without problems."""
    problems: list[Problem] = []
    if isinstance(error, RecipeError):
        problems = error.problems
    elif error is not None:
        problems = [Problem(error.message, hint=error.hint)]
    return {"ok": error is None, "problems": [problem_fields(problem) for problem in problems]}
