"""``fsdpq generate``: answers of a trained run, one or many."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from fsdpq.cli.answering.options import LoadLine, answering_options, shown
from fsdpq.cli.answers import echo_json, json_option
from fsdpq.cli.options import RunPath, say, trust_option, warn_of_code
from fsdpq.cli.render import render_notice
from fsdpq.errors import ExitCode, UsageError

if TYPE_CHECKING:
    from fsdpq.launch.generate import Question

_PATH = click.Path(path_type=Path)
_FIELDS = ("answer", "stop", "num_tokens", "num_prompt_tokens", "tokens_per_s")
STDIN = "-"

Events = Iterable[tuple["Question", dict[str, Any]]]


@click.command("generate")
@click.argument("run", type=RunPath())
@click.option("--prompt", help="The user's message; - reads it from standard input.")
@click.option(
    "--file", "file", type=_PATH,
    help="Many: rows with `prompt` or `messages`. Answers are printed as JSON lines.",
)  # fmt: skip
@click.option("--system", help="The system prompt.")
@click.option("--max-new-tokens", type=click.IntRange(min=1), default=64, show_default=True)
@click.option(
    "--temperature", type=click.FloatRange(min=0), default=0.0, show_default=True,
    help="0 takes the likeliest token each time.",
)  # fmt: skip
@answering_options
@click.option("--stream", is_flag=True, help="Print the answer while it comes.")
@json_option
@trust_option
def generate_command(
    run: Path,
    *,
    prompt: str | None,
    file: Path | None,
    system: str | None,
    stream: bool,
    as_json: bool,
    **options: Any,
) -> None:
    """Print the answer of the finished run in the directory RUN."""
    from fsdpq.launch.answers import Choosing, Loading
    from fsdpq.launch.generate import generate, make_question, read_questions

    if (prompt is None) == (file is None):
        raise click.UsageError("give either `--prompt` or `--file`")
    if stream and (as_json or file is not None):
        raise click.UsageError("`--stream` prints text: leave out `--json` and `--file`")
    warn_of_code(options["trust_remote_code"])
    text = sys.stdin.read().removesuffix("\n") if prompt == STDIN else prompt
    questions = read_questions(file, system) if file else [make_question(text or "", system)]
    loading, choosing = split_options(options, Loading(), Choosing())
    line = LoadLine(sys.stderr)
    line.start()
    try:
        events = generate(
            run, questions, choosing, loading, on_load=line.take,
            on_notice=lambda notice: say(render_notice(notice)),
        )  # fmt: skip
        if file is not None:
            _print_rows(events, line)
        elif stream:
            _print_pieces(events, line)
        else:
            _print_answer(events, line, as_json=as_json)
    finally:
        line.clear()


def split_options(options: dict[str, Any], loading: Any, choosing: Any) -> tuple[Any, Any]:
    """Returns both with what the command line says of them."""
    import dataclasses

    def changed(default: Any) -> Any:
        names = {field.name for field in dataclasses.fields(default)}
        return dataclasses.replace(default, **{n: v for n, v in options.items() if n in names})

    return changed(loading), changed(choosing)


def _print_answer(events: Events, line: LoadLine, *, as_json: bool) -> None:
    for _, event in events:
        line.clear()
        if event["event"] == "done":
            if as_json:
                echo_json({name: event[name] for name in _FIELDS})
            else:
                _write(event["answer"] + "\n")
        else:
            _check(event)


def _print_pieces(events: Events, line: LoadLine) -> None:
    for _, event in events:
        line.clear()
        _check(event)
        _write(event["text"] if event["event"] == "text" else "\n")


def _print_rows(events: Events, line: LoadLine) -> None:
    """Prints a row for every question; one without an answer has ``error``."""
    num_refused = 0
    for question, event in events:
        line.clear()
        if event["event"] == "text":
            continue
        if event["event"] == "refused":
            num_refused += 1
            answer = {"error": event["message"]}
        else:
            answer = {name: event[name] for name in _FIELDS}
        click.echo(json.dumps({**question.row, **answer}, ensure_ascii=False))
    if num_refused:
        say(f"{num_refused} of the rows have no answer: see their `error`")
        sys.exit(ExitCode.RUN_FAILED)


def _write(text: str) -> None:
    """Prints an answer: as it is for a program, harmless for a terminal."""
    sys.stdout.write(shown(text, sys.stdout) if sys.stdout.isatty() else text)
    sys.stdout.flush()


def _check(event: dict[str, Any]) -> None:
    if event["event"] == "refused":
        raise UsageError(event["message"], hint=event["hint"])
