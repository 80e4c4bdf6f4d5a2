"""What ``fsdpq eval`` is asked about: a run or a recipe, its checkpoint, the rows to measure.

A run's recipe is settled. What cannot change what is measured, or is what the user wants to measure
otherwise, may be overridden (`OPEN_KEYS`); the rest is refused, because it would be ignored.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from fsdpq.errors import Problem, RecipeError, UsageError
from fsdpq.fetch.data import fetch_data
from fsdpq.fetch.row_files import is_pattern
from fsdpq.launch.question import Question
from fsdpq.launch.runs.trained_run import check_is_run, read_lock
from fsdpq.launch.screen import Screen
from fsdpq.recipe.load import LoadedRecipe, load_recipe, load_resolved, override_resolved
from fsdpq.recipe.root import Recipe
from fsdpq.recipe.sections.data import DataOptions
from fsdpq.recipe.sections.launch import LaunchOptions
from fsdpq.recipe.sections.output import MetricsOptions
from fsdpq.recipe.sections.source import SourceOptions
from fsdpq.recipe.sections.training import CheckpointOptions
from fsdpq.rows.files.kinds import kind_of
from fsdpq.rows.source import DataSources
from fsdpq.run_files.paths import RunFiles

OPEN_KEYS = (
    "data.packing", "data.roles_to_train", "data.seq_len", "data.train_on_eos",
    "data.train_on_prompt", "data.truncation", "data.turns_to_train", "evaluation.", "fsdp.",
    "launch.", "model.attn_implementation", "model.dtype", "model.use_liger_kernel",
    "quantization.", "training.compile", "training.micro_batch_size",
)  # fmt: skip
"""Keys that an evaluation of a run can change; a dot at the end is a whole section."""

NAMED_ROWS_KEYS = (
    "data.columns", "data.columns.", "data.config", "data.format", "data.max_rows",
    "data.on_bad_row", "data.revision", "data.split",
)  # fmt: skip
"""The same for rows that the command line names; those of a run are settled."""

RECIPE_KEYS = ("data.", "model.")
"""What else an evaluation of a recipe can change."""

HELD_OUT, OWN_EVAL, NAMED, NONE = "held_out", "own_eval", "named", "none"
"""Which rows are measured: those held out from training, all of ``data.eval`` of a streamed run,
those that the command line names, none."""


@dataclass(frozen=True)
class Subject:
    """What is measured, and how.

    Attributes:
        loaded: its recipe, changed for an evaluation; not resolved for this machine yet.
        run: the run directory, None for a recipe.
        lock: the run's lock, empty for a recipe.
        rows: one of `HELD_OUT`, `OWN_EVAL`, `NAMED`, `NONE`.
    """

    loaded: LoadedRecipe
    run: RunFiles | None
    lock: dict[str, Any]
    rows: str

    @property
    def sources(self) -> DataSources | None:
        """The run's rows, None for a recipe."""
        data = self.lock.get("inputs", {}).get("data")
        return DataSources.from_json(data) if data else None


def open_subject(
    target: Path, overrides: Sequence[str], question: Question, *, num_gpus: int
) -> Subject:
    """Returns what the user named, its recipe changed by the question and the overrides.

    Args:
        target: a run directory or a recipe.
        overrides: from the command line.
        question: what to measure.
        num_gpus: of this machine.

    Raises:
        UsageError: it is neither, or the base model of the run is gone.
        RecipeError: an override is wrong, or of a key that cannot change.
    """
    keys = [*OPEN_KEYS, *(NAMED_ROWS_KEYS if question.data else ())]
    check_open(overrides, keys if target.is_dir() else [*keys, *RECIPE_KEYS])
    if target.is_dir():
        files = RunFiles(target)
        check_is_run(files, hint="name a directory that `fsdpq train` made, or a recipe file")
        lock = read_lock(files)
        recipe = load_resolved(files.resolved)
        path = files.resolved
    else:
        if question.checkpoint:
            hint = "name a run directory, or leave `--checkpoint` out"
            raise UsageError(f"`{target}` is a recipe: it has no checkpoints", hint=hint)
        files, lock, path = None, {}, target
        recipe = load_recipe(target).recipe
    rows = _rows_of(recipe, question)
    changed = measured(recipe, question, rows, num_gpus=num_gpus)
    loaded = override_resolved(changed, overrides, path=path)
    return Subject(loaded, files, lock, rows)


def _rows_of(recipe: Recipe, question: Question) -> str:
    if question.data:
        return NAMED
    if question.tasks:
        return NONE
    return OWN_EVAL if recipe.data.streaming and recipe.data.eval is not None else HELD_OUT


def check_open(overrides: Sequence[str], keys: Sequence[str]) -> None:
    """Checks that an evaluation reads what ``overrides`` change.

    Args:
        overrides: from the command line.
        keys: those that it reads; a dot at the end is all below.

    Raises:
        RecipeError: it does not.
    """
    problems: list[Problem] = []
    for text in overrides:
        key = text.lstrip("+~").partition("=")[0]
        if not any(key == name or (name[-1] == "." and key.startswith(name)) for name in keys):
            message = f"`{key}` has no effect on an evaluation: it is settled"
            known = ", ".join(f"`{name}*`" if name[-1] == "." else f"`{name}`" for name in keys)
            hint = f"name other rows with `--data`; what can be changed is {known}"
            problems.append(Problem(message, key, None, hint))
    if problems:
        raise RecipeError(problems)


def measured(recipe: Recipe, question: Question, rows: str, *, num_gpus: int) -> Recipe:
    """Returns the recipe of an evaluation: the same model, on this machine, over other rows."""
    evaluation = recipe.evaluation.model_copy(update={"tasks": tuple(question.tasks)})
    if not question.tasks:
        evaluation = type(evaluation)()
    changed: dict[str, Any] = {
        "data": _measured_data(recipe.data, question, rows),
        "evaluation": evaluation,
        "checkpoint": CheckpointOptions(),
        "metrics": MetricsOptions(),
        "launch": _launch_here(recipe.launch, num_gpus),
        "training": recipe.training.model_copy(update={"compile": False}),
    }
    return recipe.model_copy(update=changed)


def _launch_here(launch: LaunchOptions, num_gpus: int) -> LaunchOptions:
    """Returns as many ranks as the run had where this machine has them."""
    fits = launch.device == "cpu" or (
        launch.nproc_per_node != "auto" and launch.nproc_per_node <= num_gpus
    )
    if not fits:
        return LaunchOptions()
    return LaunchOptions(device=launch.device, nproc_per_node=launch.nproc_per_node)


def _measured_data(options: DataOptions, question: Question, rows: str) -> DataOptions:
    """Returns ``data`` over the rows that are measured."""
    if rows == NAMED:
        return _with_source(options, _source_options(question))
    if rows == OWN_EVAL and options.eval is not None:
        return _with_source(options, options.eval)
    return options


def _with_source(options: DataOptions, source: SourceOptions) -> DataOptions:
    """Returns ``data`` with one source instead of its own, all of it to be measured."""
    kept = options.model_dump()
    for name in ("mixture", "mixture_stopping", "eval", "eval_fraction", "streaming",
                 "stream_window", "shuffle"):  # fmt: skip
        kept.pop(name)
    return DataOptions(**(kept | source.model_dump()))


def _source_options(question: Question) -> SourceOptions:
    named, path = question.data, Path(question.data).expanduser()
    is_path = path.exists() or is_pattern(named) or kind_of(path) is not None
    if not is_path and not named.startswith((".", "/", "~")):
        return SourceOptions(dataset=named, format="text" if question.stride else "auto")
    is_text = question.stride is not None or kind_of(path) == ".txt"
    return SourceOptions(path=str(path.absolute()), format="text" if is_text else "auto")


def find_sources(subject: Subject, *, screen: Screen) -> DataSources | None:
    """Returns the rows to measure; None where none are measured.

    Raises:
        UsageError: nothing was held out.
        FsdpqError: they cannot be had.
    """
    options, known = subject.loaded.recipe.data, subject.sources
    if subject.rows == NONE:
        return None
    if subject.rows == HELD_OUT and not options.eval_fraction and options.eval is None:
        hint = "name rows with `--data`, or use `data.eval_fraction` or `data.eval`"
        raise UsageError("no rows were held out for evaluation", hint=hint)
    if known is not None and subject.rows == HELD_OUT:
        return known
    if known is not None and known.eval is not None and subject.rows == OWN_EVAL:
        return replace(known, train=(known.eval,), eval=None)
    # A run's template file stands in its lock; its path may be gone.
    fetched = options if known is None else options.model_copy(update={"chat_template": None})
    found = fetch_data(
        fetched, base_dir=subject.loaded.base_dir, report=screen.report, marks=subject.loaded.marks
    )
    return found if known is None else replace(found, chat_template=known.chat_template)
