"""The flow of ``fsdpq generate``: questions in, answers of a trained run out, one load for all."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fsdpq.errors import Location, Problem, RecipeError
from fsdpq.launch.answers import (
    ANSWERER,
    AnswerSession,
    Choosing,
    Event,
    Loading,
    stop_signals_raised,
)
from fsdpq.recipe.load import load_resolved
from fsdpq.rows.files.kinds import read_file
from fsdpq.rows.files.row import FileError, FileRow
from fsdpq.rows.messages import read_conversation
from fsdpq.rows.values import MistakeError
from fsdpq.run_files.paths import RunFiles

MAX_PROBLEMS = 20


@dataclass(frozen=True)
class Question:
    """What to ask.

    Attributes:
        messages: ``role`` and ``content``, the user's last.
        row: the row of a file that it came from, else empty.
    """

    messages: list[dict[str, Any]]
    row: Mapping[str, Any] = dataclasses.field(default_factory=dict[str, Any])


def make_question(prompt: str, system: str | None = None) -> Question:
    """Returns the question of one prompt."""
    first = [] if system is None else [{"role": "system", "content": system}]
    return Question([*first, {"role": "user", "content": prompt}])


def read_questions(path: Path, system: str | None = None) -> list[Question]:
    """Returns the questions in a file of rows: ``prompt``, or ``messages`` as training rows.

    A last message of the assistant is left out: it is what is asked for.

    Args:
        path: of any format that training reads.
        system: the system prompt of rows without one.

    Raises:
        RecipeError: a row has no question; names its line.
    """
    questions: list[Question] = []
    problems: list[Problem] = []
    hint = 'a row is `{"prompt": "..."}` or `{"messages": [...]}`, the user\'s message last'
    try:
        for row in read_file(path):
            if len(problems) == MAX_PROBLEMS:
                break
            try:
                questions.append(_read_question(row, system))
            except MistakeError as error:
                place = Location(str(path), row.line, 1, row.text, max(1, len(row.text)))
                where = "" if row.line else f"row {row.number}: "
                problems.append(Problem(f"{where}{error}", "", place, hint))
    except FileError as error:
        place = Location(str(path), error.line)
        raise RecipeError([Problem(f"`{path}` {error}", "", place, error.hint)]) from error
    if problems:
        raise RecipeError(problems)
    if not questions:
        raise RecipeError([Problem(f"`{path}` has no rows", "", Location(str(path)), hint)])
    return questions


def _read_question(row: FileRow, system: str | None) -> Question:
    if row.mistake:
        raise MistakeError(row.mistake)
    content = row.content
    if "messages" in content:
        messages = read_conversation({**content, "tools": None}).messages
    elif isinstance(content.get("prompt"), str):
        messages = make_question(content["prompt"]).messages
    else:
        raise MistakeError("no `prompt` with a text, and no `messages`")
    if messages[-1]["role"] == "assistant":
        messages = messages[:-1]
    if not messages or messages[-1]["role"] != "user":
        raise MistakeError("the last message is not the user's")
    own = content.get("system") if isinstance(content.get("system"), str) else system
    if own is not None and messages[0]["role"] != "system":
        messages = [{"role": "system", "content": own}, *messages]
    return Question(messages, content)


def generate(
    run_dir: Path,
    questions: Sequence[Question],
    choosing: Choosing,
    loading: Loading,
    *,
    on_load: Callable[[int, int], None] = lambda _done, _total: None,
    on_notice: Callable[[str], None] = lambda _notice: None,
    worker: Sequence[str] = ANSWERER,
) -> Iterator[tuple[Question, Event]]:
    """Yields the events of every answer, in order: ``text``, and ``done`` or ``refused`` last.

    Every answer starts with the same seed, that of the run where none is given, so it does not
    depend on the others.

    Raises:
        UsageError: there is nothing to answer with.
        FsdpqError: whatever the worker reports.
    """
    with (
        stop_signals_raised(),
        AnswerSession(run_dir, loading, on_notice=on_notice, worker=worker) as session,
    ):
        if choosing.seed is None:
            seed = load_resolved(RunFiles(run_dir).resolved).training.seed
            choosing = dataclasses.replace(choosing, seed=seed)
        for notice in session.wait_ready(on_load).notices:
            on_notice(notice)
        for question in questions:
            session.ask(question.messages, choosing)
            while True:
                event = session.next_event()
                yield question, event
                if event["event"] != "text":
                    break
