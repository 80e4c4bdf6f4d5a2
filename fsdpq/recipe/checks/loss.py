"""Rules about what renders rows and which tokens carry loss."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from fsdpq.cards.chat_templates import BUILT_IN_TEMPLATES, NO_TEMPLATE, TEMPLATE_FILE
from fsdpq.errors import Problem
from fsdpq.recipe.checks.facts import has_no_effect, is_default, sources_of
from fsdpq.recipe.describe import list_words, suggest
from fsdpq.recipe.root import Recipe

ONE_ANSWER = {"alpaca", "qna", "qna_no_ctx"}
"""Formats of one question and one answer."""

NO_TURNS = {"text", "input_output", "dummy"}
"""Formats that no template renders."""


def check_chat_template(recipe: Recipe, base_dir: Path) -> Iterator[Problem]:
    """A ``data.chat_template`` that is no built-in name, no ``none`` and no ``.jinja`` file."""
    name = recipe.data.chat_template
    if name is None or name == NO_TEMPLATE or name in BUILT_IN_TEMPLATES:
        return
    if name.endswith(TEMPLATE_FILE):
        path = base_dir / Path(name).expanduser()
        if not path.is_file():
            message = f"`data.chat_template`: there is no file `{path}`"
            hint = "a relative path starts from the recipe's directory"
            yield Problem(message, "data.chat_template", hint=hint)
        return
    known = [*BUILT_IN_TEMPLATES, NO_TEMPLATE]
    guess = suggest(name, known)
    hint = f"did you mean `{guess}`?" if guess else f"there are {list_words(known)}."
    message = f"`data.chat_template: {name}` is no template"
    yield Problem(message, "data.chat_template", hint=f"{hint} A file ends in `.jinja`")


def check_turns_exist(recipe: Recipe, _base_dir: Path) -> Iterator[Problem]:
    """``chat_template``, ``roles_to_train`` or ``turns_to_train`` of rows that have no turns."""
    formats = _formats(recipe)
    if formats <= NO_TURNS:
        reason = f"with `data.format: {min(formats)}`: its rows have no turns"
        for field in ("chat_template", "roles_to_train", "turns_to_train"):
            yield from has_no_effect(recipe, "data", field, reason)
    elif recipe.data.train_on_prompt:
        reason = "with `data.train_on_prompt: true`: every turn is trained"
        for field in ("roles_to_train", "turns_to_train"):
            yield from has_no_effect(recipe, "data", field, reason)


def check_several_turns(recipe: Recipe, _base_dir: Path) -> Iterator[Problem]:
    """``turns_to_train`` or ``train_on_eos: last`` of rows that have one answer."""
    data = recipe.data
    formats = _formats(recipe)
    if not formats <= ONE_ANSWER or data.train_on_prompt or not is_default(data, "roles_to_train"):
        return
    reason = f"with `data.format: {min(formats)}`: its rows have one answer"
    yield from has_no_effect(recipe, "data", "turns_to_train", reason)
    if data.train_on_eos == "last":
        yield from has_no_effect(recipe, "data", "train_on_eos", reason)


def check_roles_exist(recipe: Recipe, _base_dir: Path) -> Iterator[Problem]:
    """A role in ``roles_to_train`` that rows of the format do not have."""
    formats = _formats(recipe)
    if not formats <= {*ONE_ANSWER, "guanaco"} or recipe.data.train_on_prompt:
        return
    for role in recipe.data.roles_to_train:
        if role in ("system", "tool"):
            message = f"`data.roles_to_train`: rows of `{min(formats)}` have no role `{role}`"
            yield Problem(message, "data.roles_to_train", hint=f"delete `{role}`")


def check_end_marks_exist(recipe: Recipe, _base_dir: Path) -> Iterator[Problem]:
    """``train_on_eos`` of rows to which no end mark is added."""
    formats = _formats(recipe)
    if formats <= {"input_output", "dummy"}:
        reason = f"with `data.format: {min(formats)}`: nothing is added to its rows"
        yield from has_no_effect(recipe, "data", "train_on_eos", reason)
    elif formats == {"text"} and recipe.data.train_on_eos == "last":
        reason = "with `data.format: text`: its rows have one end"
        yield from has_no_effect(recipe, "data", "train_on_eos", reason)


def check_prompts_exist(recipe: Recipe, _base_dir: Path) -> Iterator[Problem]:
    """``train_on_prompt`` of rows that have no prompt, or that say themselves what is trained."""
    formats = _formats(recipe)
    if formats <= NO_TURNS:
        reason = f"with `data.format: {min(formats)}`: its rows have no prompt"
        if formats == {"input_output"}:
            reason = "with `data.format: input_output`: the segments say what carries loss"
        yield from has_no_effect(recipe, "data", "train_on_prompt", reason)


def _formats(recipe: Recipe) -> set[str]:
    """Returns the formats of the rows that are trained on."""
    if not recipe.data.mixture:
        return {recipe.data.format}
    return {source.format for key, source in sources_of(recipe) if "mixture" in key}


CHECKS = (
    check_chat_template,
    check_turns_exist,
    check_several_turns,
    check_roles_exist,
    check_end_marks_exist,
    check_prompts_exist,
)
