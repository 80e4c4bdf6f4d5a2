"""What a sweep varies, and what can be wrong with that before any recipe is looked at."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, cast

from fsdpq.errors import Problem
from fsdpq.recipe.compose import Override
from fsdpq.recipe.describe import Section, list_words, suggest
from fsdpq.recipe.marks import KeyPath, Marks
from fsdpq.sweep.choosing.document import SweepSpec
from fsdpq.sweep.choosing.grammar import Parameter, parse_sweeps
from fsdpq.sweep.results.measures import explain_unknown, is_known

WIDE = 10
"""An interval whose ends are so many times apart is one of magnitudes."""


def override_path(key: str, sections: dict[str, Section]) -> tuple[str, ...]:
    """Returns where the values of ``key`` go: the name of a section with kinds means its kind."""
    section = sections.get(key)
    has_kinds = section is not None and "" not in section.kinds
    return (key, "kind") if has_kinds else tuple(key.split("."))


def check_values(data: dict[str, Any], marks: Marks) -> Iterator[Problem]:
    """Yields a Problem for what stands under ``parameters`` and is no list of values."""
    parameters: Any = data.get("parameters", {})
    if not isinstance(parameters, dict):
        place, hint = marks.key(("parameters",)), "write `section.field: [value, value]` lines"
        yield Problem("`parameters` must be a mapping of keys", "parameters", place, hint)
        return
    for key, values in cast("dict[str, Any]", parameters).items():
        path: KeyPath = ("parameters", key)
        if key == "recipe":
            hint = "write the files under `recipe`"
            yield Problem("`recipe` stands beside `parameters`", key, marks.key(path), hint)
        elif isinstance(values, dict):
            inner = next(iter(cast("dict[str, Any]", values)), "field")
            message = f"`{key}` must be a list of values, not a mapping"
            yield Problem(
                message, key, marks.key(path), f"write whole keys: `{key}.{inner}: [...]`"
            )
        elif isinstance(values, list):
            yield from _check_items(key, cast("list[Any]", values), marks)


def _check_items(key: str, values: list[Any], marks: Marks) -> Iterator[Problem]:
    if not values:
        place = marks.value(("parameters", key))
        yield Problem(f"`{key}` has no values", key, place, "list them, or delete the key")
    for index, value in enumerate(values):
        nested = cast("list[Any]", value) if isinstance(value, list) else [value]
        if any(isinstance(item, dict | list) for item in nested):
            place = marks.value(("parameters", key, index))
            hint = "one value is one word, number or list: for more, list recipe files (`recipe`)"
            yield Problem(f"value {index + 1} of `{key}` is a mapping", key, place, hint)


def list_parameters(spec: SweepSpec, marks: Marks) -> tuple[list[Parameter], list[Problem]]:
    """Returns what the spec varies, in order, with the places of its values."""
    texts = [
        (key, value, marks.value(("parameters", key)))
        for key, value in spec.parameters.items()
        if isinstance(value, str)
    ]
    parsed, problems = parse_sweeps(texts)
    found = {parameter.key: parameter for parameter in parsed}
    for key, values in spec.parameters.items():
        if isinstance(values, str):
            continue
        path: KeyPath = ("parameters", key)
        listed = values if isinstance(values, tuple) else (values,)
        plain = tuple(list(value) if isinstance(value, tuple) else value for value in listed)
        places = tuple(marks.value((*path, index)) for index in range(len(plain)))
        found[key] = Parameter(key, plain, location=marks.key(path), places=places)
    return [found[key] for key in spec.parameters if key in found], problems


def check_keys(
    parameters: Sequence[Parameter], fixed: Sequence[Override], sections: dict[str, Section]
) -> Iterator[Problem]:
    """Yields a Problem for what is no key of a recipe, and for what is said twice."""
    seen = {override.path: f"by the override `{override.text}` too" for override in fixed}
    for parameter in parameters:
        key = parameter.key
        path = override_path(key, sections)
        if not all(path) or any(character in key for character in "/@ ,=()[]"):
            yield parameter.problem(f"`{key}` is no key of a recipe", "write `section.field`")
        elif path[0] in ("defaults", "version"):
            hint = "list recipe files instead (`recipe`)"
            yield parameter.problem(f"`{key}` cannot be varied", hint)
        elif path in seen:
            yield parameter.problem(f"`{key}` is set {seen[path]}", "delete one of the two")
        seen[path] = f"by `{key}` too"


def check_groups(
    spec: SweepSpec, parameters: Sequence[Parameter], marks: Marks
) -> Iterator[Problem]:
    """Yields a Problem for every zipped group whose keys cannot vary together."""
    known = {parameter.key: parameter for parameter in parameters}
    used: set[str] = set()
    for number, group in enumerate(spec.zip):
        place = marks.value(("zip", number))
        for key in group:
            if key in spec.parameters and key not in known:
                continue  # its values cannot be read, which was told
            message, hint = _check_member(key, known, used)
            used.add(key)
            if message:
                yield Problem(message, "zip", place, hint)
        sizes = [(key, len(known[key].values)) for key in group if key in known]
        if len({size for _, size in sizes if size}) > 1:
            counted = ", ".join(f"`{key}` has {size}" for key, size in sizes)
            message = f"keys that vary together need as many values each: {counted}"
            yield Problem(message, "zip", place, "give them as many values, or take one out")


def _check_member(key: str, known: dict[str, Parameter], used: set[str]) -> tuple[str, str]:
    """Returns what is wrong with a key of a zipped group, and what to do; empty where nothing."""
    parameter = known.get(key)
    if parameter is None:
        guess = suggest(key, known)
        hint = f"did you mean `{guess}`?" if guess else f"what varies is {list_words(known, 'and')}"
        return f"`{key}` does not vary, so it cannot vary with others", hint
    if key in used:
        return f"`{key}` is in two groups", "take it out of one"
    if parameter.interval is not None:
        return f"`{key}` is an interval: it has no first value to put beside others", "list values"
    if parameter.shuffle:
        return f"`shuffle` would pair the values of `{key}` at random", "leave `shuffle` out"
    return "", ""


def check_strategy(spec: SweepSpec, parameters: Sequence[Parameter]) -> Iterator[Problem]:
    """Yields a Problem for what the strategy cannot do, and for what it would ignore."""
    kind = spec.strategy.kind
    for parameter in parameters:
        if kind == "grid" and parameter.interval is not None:
            message = f"`{parameter.key}` is an interval, and a grid needs values"
            hint = "list values, or draw them: `--strategy random --trials 20`"
            yield parameter.problem(message, hint)
        if kind != "grid" and parameter.shuffle:
            message = f"`shuffle` of `{parameter.key}` says nothing: `{kind}` has its own order"
            yield parameter.problem(message, "leave `shuffle` out")


def check_goal(spec: SweepSpec, marks: Marks) -> Iterator[Problem]:
    """Yields a Problem where the goal is nothing that is measured."""
    if not is_known(spec.goal.measure):
        message, hint = explain_unknown(spec.goal.measure)
        yield Problem(message, "goal.measure", marks.value(("goal", "measure")), hint)


def note_intervals(parameters: Sequence[Parameter]) -> Iterator[str]:
    """Yields a notice for every wide interval that is not drawn by magnitude."""
    for parameter in parameters:
        interval = parameter.interval
        if interval is None or interval.log or interval.low <= 0 or interval.whole:
            continue
        if interval.high >= WIDE * interval.low:
            text = f"interval({interval.low:g},{interval.high:g})"
            middle = interval.high / WIDE
            yield (
                f"`{parameter.key}` is drawn evenly, so nine of ten are above {middle:g}: "
                f"`tag(log,{text})` draws every magnitude as often"
            )
