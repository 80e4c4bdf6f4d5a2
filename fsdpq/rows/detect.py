"""``data.format: auto``: which format the rows of a source have, told from columns and values.

A row votes for the format that its columns name, the most demanding one first. What cannot be told
is refused with all candidates, since a wrong guess would train on the wrong text without a word.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

from fsdpq.errors import Problem, RecipeError
from fsdpq.recipe.describe import list_words, suggest
from fsdpq.rows.formats import (
    FORMATS,
    GUANACO_ASSISTANT,
    GUANACO_HUMAN,
    NO_COLUMNS,
    DataFormat,
    find_mistake,
    fitting_formats,
    named_columns,
)
from fsdpq.rows.values import as_list, list_names

DETECT_ROWS = 50
"""First rows of every file that are looked at."""

_PLAIN = ("guanaco", "text")
_LISTS = ("messages", "segments")
_MAX_SHOWN = 12


@dataclass(frozen=True)
class Detected:
    """What ``data.format: auto`` found.

    Attributes:
        format: a key of `fsdpq.rows.formats.FORMATS`.
        why: what told so, for people.
    """

    format: str
    why: str


def detect_format(
    rows: Sequence[Mapping[str, Any]],
    columns: Mapping[str, str] = NO_COLUMNS,
    *,
    key: str = "data.format",
    source: str = "the source",
) -> Detected:
    """Returns the format of rows.

    Args:
        rows: the first ones of a file, as they stand there.
        columns: the recipe's ``data.columns``.
        key: of the format in the recipe, for messages.
        source: what the rows are of, for messages.

    Raises:
        RecipeError: no format fits, several fit equally, or the rows are not alike.
    """
    return detect_files({source: rows}, columns, key=key)


def detect_files(
    samples: Mapping[str, Sequence[Mapping[str, Any] | None]],
    columns: Mapping[str, str] = NO_COLUMNS,
    *,
    key: str = "data.format",
) -> Detected:
    """Returns the one format of several files of a source.

    Args:
        samples: name of a file -> its first rows, None for one that cannot be read.
        columns: the recipe's ``data.columns``.
        key: of the format in the recipe, for messages.

    Raises:
        RecipeError: no format fits, several fit equally, or the rows are not alike.
    """
    first: dict[str, tuple[str, int, Mapping[str, Any]]] = {}
    unknown: tuple[str, int, Mapping[str, Any]] | None = None
    for name, rows in samples.items():
        for number, row in enumerate(rows[:DETECT_ROWS], start=1):
            if row is None:
                continue
            candidates = _candidates(row, columns)
            if len(candidates) > 1:
                raise _refuse_several(name, number, row, candidates, key)
            if candidates:
                first.setdefault(candidates[0], (name, number, row))
            elif unknown is None:
                unknown = (name, number, row)
    if len(first) > 1:
        raise _refuse_mixed(first, key)
    for found, (_, _, row) in first.items():
        return Detected(found, _explain(row, found, columns))
    if unknown is None:
        hint = "write the format of the rows that are to come"
        message = f"`{key}: auto` finds no rows in {', '.join(samples)}"
        raise RecipeError([Problem(message, key, None, hint)])
    raise _refuse_unknown(*unknown, columns, key)


def _candidates(row: Mapping[str, Any], columns: Mapping[str, str]) -> list[str]:
    """Returns the formats that the row could be, those left out that another one includes."""
    for by_alias in (False, True):
        fitting = [
            name
            for name in fitting_formats(row, columns, by_alias=by_alias)
            if _knows_columns(FORMATS[name], columns)
            and _looks_like(named_columns(row, name, columns), name)
        ]
        structured = [name for name in fitting if name not in _PLAIN]
        if structured:
            return [name for name in structured if not _is_part_of_other(name, structured)]
    fitting = fitting_formats(row, columns, by_alias=True)
    plain = [
        name
        for name in fitting
        if name in _PLAIN and _looks_like(named_columns(row, name, columns), name)
    ]
    return plain[:1]


def _knows_columns(known: DataFormat, columns: Mapping[str, str]) -> bool:
    """Returns whether every name that the recipe gives another one is of the format."""
    return all(name.partition(".")[0] in (*known.columns, *known.optional) for name in columns)


def _is_part_of_other(name: str, others: Sequence[str]) -> bool:
    return any(set(FORMATS[name].columns) < set(FORMATS[other].columns) for other in others)


def _looks_like(have: Mapping[str, Any], name: str) -> bool:
    """Returns whether the values are of the sort that the format's columns hold."""
    if not all(column in have for column in FORMATS[name].columns):
        return False  # a dotted name leads to nothing
    if name == "guanaco":
        text: Any = have["text"]
        begins = isinstance(text, str) and text.lstrip().startswith(GUANACO_HUMAN)
        return begins and GUANACO_ASSISTANT in text
    values = [have[column] for column in FORMATS[name].columns]
    if name == "prompt_completion" and all(isinstance(value, list) for value in values):
        return all(_holds_objects(value) for value in values)
    if FORMATS[name].columns[0] in _LISTS:
        return _holds_objects(values[0])
    return all(isinstance(value, str) for value in values)


def _holds_objects(value: Any) -> bool:
    items = as_list(value)
    return bool(items) and isinstance(items[0], dict)


def _explain(row: Mapping[str, Any], found: str, columns: Mapping[str, str]) -> str:
    known = FORMATS[found]
    have = named_columns(row, found, columns)
    parts: list[str] = []
    for name in (*known.columns, *known.optional):
        other = _name_in_file(name, row, known, columns)
        if name in have and other:
            parts.append(f"`{name}`" if other == name else f"`{other}` as `{name}`")
    text = f"its rows have {_join(parts)}"
    if found == "guanaco":
        text += f" that begins with `{GUANACO_HUMAN}`"
    if found == "prompt_completion" and isinstance(have["prompt"], list):
        text += ", both lists of messages"
    if found not in _PLAIN and "text" in row:
        text += "; `text`, which they have too, is not used (`format: text` trains on it)"
    return text


def _join(words: Sequence[str]) -> str:
    if len(words) < 2:
        return "".join(words)
    return f"{', '.join(words[:-1])} and {words[-1]}"


def _name_in_file(
    name: str, row: Mapping[str, Any], known: DataFormat, columns: Mapping[str, str]
) -> str:
    if name in columns:
        return columns[name]
    if name in row:
        return name
    return next((o for o, column in known.aliases.items() if column == name and o in row), "")


def _refuse_several(
    name: str, number: int, row: Mapping[str, Any], candidates: Sequence[str], key: str
) -> RecipeError:
    what = list_words(candidates, "and")
    message = f"`{key}: auto` cannot choose: row {number} of {name} fits {what} ({_shown(row)})"
    hint = f"write `format: {candidates[0]}` or another one of them"
    return RecipeError([Problem(message, key, None, hint)])


def _refuse_mixed(first: Mapping[str, tuple[str, int, Mapping[str, Any]]], key: str) -> RecipeError:
    (one, (one_file, one_row, _)), (two, (two_file, two_row, _)) = list(first.items())[:2]
    message = (
        f"`{key}: auto` finds rows that are not alike: row {one_row} of {one_file} is `{one}`, "
        f"row {two_row} of {two_file} is `{two}`"
    )
    hint = "make each of them a part of `data.mixture`, or write the `format` that all are to have"
    return RecipeError([Problem(message, key, None, hint)])


def _refuse_unknown(
    name: str, number: int, row: Mapping[str, Any], columns: Mapping[str, str], key: str
) -> RecipeError:
    message = f"`{key}: auto` knows no format for row {number} of {name} ({_shown(row)})"
    renamed = next(_near_misses(row, columns), "")
    hint = renamed or "`fsdpq kinds data` lists the formats; `columns` gives their columns a name"
    return RecipeError([Problem(message, key, None, hint)])


def _shown(row: Mapping[str, Any]) -> str:
    names = list(row)
    more = f" and {len(names) - _MAX_SHOWN} more" if len(names) > _MAX_SHOWN else ""
    return f"it has {list_names(names[:_MAX_SHOWN]) or 'no columns'}{more}"


def _near_misses(row: Mapping[str, Any], columns: Mapping[str, str]) -> Iterator[str]:
    """Yields what is wrong or to write so that a format fits, the nearest format first."""
    for name in fitting_formats(row, columns, by_alias=True):
        mistake = find_mistake(row, name, columns)
        if mistake:
            yield f"as `{name}` it has a mistake: {mistake}"
    lists = [name for name, value in row.items() if _holds_objects(value)]
    if lists:
        has_labels = "label" in cast("list[dict[str, Any]]", as_list(row[lists[0]]))[0]
        column, name = ("segments", "input_output") if has_labels else ("messages", "messages")
        yield _rename_hint(name, {column: lists[0]}, columns)
    texts = [
        name for name, value in row.items()
        if isinstance(value, str) and name not in columns.values()
    ]  # fmt: skip
    for name, known in FORMATS.items():
        have = named_columns(row, name, columns)
        missing = [column for column in known.columns if column not in have]
        is_near = len(missing) == 1 < len(known.columns) and missing != ["instruction"]
        if is_near and _knows_columns(known, columns):
            other = _meant(missing[0], [text for text in texts if text not in known.columns])
            if other:
                yield _rename_hint(name, {missing[0]: other}, columns)
    if not columns:
        yield from _guess_plain(texts)


def _guess_plain(texts: Sequence[str]) -> Iterator[str]:
    prompt = _meant("prompt", texts)
    answer = _meant("completion", [text for text in texts if text != prompt])
    if prompt and answer:
        yield _rename_hint("prompt_completion", {"prompt": prompt, "completion": answer}, {})
    elif texts:
        yield _rename_hint("text", {"text": texts[0]}, {})


_ASKED = ("prompt", "question", "query", "instruction", "problem", "input", "source", "src")
_ANSWERED = (
    "answer", "response", "completion", "output", "reply", "solution", "chosen", "target", "tgt",
)  # fmt: skip


def _meant(column: str, free: Sequence[str]) -> str | None:
    """Returns which of the columns ``free`` holds what the format calls ``column``."""
    words = _ASKED if column in _ASKED else _ANSWERED if column in _ANSWERED else ()
    found = next((word for word in words if word in free), None) or suggest(column, free)
    return found or (free[0] if len(free) == 1 else None)


def _rename_hint(name: str, renamed: Mapping[str, str], columns: Mapping[str, str]) -> str:
    pairs = ", ".join(f"{column}: {other}" for column, other in {**columns, **renamed}.items())
    return f"write `format: {name}` and `columns: {{{pairs}}}`, if that is what they hold"
