"""Hydra's sweep grammar: ``8,16,32``, ``choice``, ``range``, ``interval``, ``glob``, ``shuffle``.

Hydra's own parser reads it; what it means is decided here, because Hydra leaves that to its
sweepers: an interval has no values but a place between its ends, ``log`` is a tag as in Hydra's
Optuna plugin, ``shuffle`` follows the sweep's seed and not the clock. The grammar is at
https://hydra.cc/docs/advanced/override_grammar/extended/.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from decimal import Decimal
from itertools import islice
from typing import Any, cast

from fsdpq.errors import Location, Problem
from fsdpq.recipe.compose import COMMAND_LINE

MAX_VALUES = 10_000
SIGNIFICANT_DIGITS = 6
"""Of a value that is drawn from an interval: what is trained should be short enough to copy."""

_MEANT = re.compile(r"[\w.]+=(?:(?:[a-z]+\()|[^\"'\[{]*,)")
"""What cannot be parsed and is meant to be a sweep: it begins with a function, or has a comma."""

_QUOTE = "quote what is not a plain word: `'key=\"two words\",other'`"
_MAPPING = "one value is one word, number or list: for more, sweep over recipe files (`recipe=a,b`)"


@dataclass(frozen=True)
class Interval:
    """Every number between two ends.

    Attributes:
        low: smallest.
        high: largest.
        log: whether magnitudes are drawn evenly, instead of numbers.
        whole: whether only whole numbers count.
    """

    low: float
    high: float
    log: bool = False
    whole: bool = False

    def at(self, place: float) -> int | float:
        """Returns the value at ``place``, 0 (the lowest) to 1."""
        if self.whole and not self.log:
            return int(min(self.low + place * (self.high - self.low + 1), self.high))
        if self.log:
            value = self.low * (self.high / self.low) ** place
        else:
            value = self.low + place * (self.high - self.low)
        value = min(max(value, self.low), self.high)
        return round(value) if self.whole else float(f"{value:.{SIGNIFICANT_DIGITS}g}")


@dataclass(frozen=True)
class Patterns:
    """``glob(...)``: names that match one of ``include`` and none of ``exclude``."""

    include: tuple[str, ...]
    exclude: tuple[str, ...] = ()


@dataclass(frozen=True)
class Parameter:
    """One key and what is tried for it.

    Attributes:
        key: of the recipe; the name of a section means its ``kind``; ``recipe`` means the file.
        values: in order; empty where it has an interval or patterns.
        interval: numbers that cannot be listed.
        patterns: names that are still to be found.
        shuffle: whether a seed decides about the order of the values.
        location: where it was written.
        places: where each value was written, empty where they share `location`.
    """

    key: str
    values: tuple[Any, ...] = ()
    interval: Interval | None = None
    patterns: Patterns | None = None
    shuffle: bool = False
    location: Location | None = None
    places: tuple[Location | None, ...] = ()

    def problem(self, message: str, hint: str) -> Problem:
        """Returns a Problem with this parameter."""
        return Problem(message, self.key, self.location, hint)

    def place(self, index: int) -> Location | None:
        """Returns where the value number ``index`` was written."""
        return self.places[index] if self.places else self.location


@dataclass(frozen=True)
class Sorted:
    """Words of a command line, sorted by what they do.

    Attributes:
        sweeps: key -> text of its values.
        fixed: what all trials have in common.
        typed: key of a sweep -> the whole word.
        problems: what is neither.
    """

    sweeps: dict[str, str]
    fixed: tuple[str, ...]
    typed: dict[str, str]
    problems: tuple[Problem, ...]


def sort_words(texts: Sequence[str]) -> Sorted:
    """Sorts ``texts`` into sweeps and overrides.

    What Hydra's parser refuses is a sweep where it looks like one, else an override: `parse_sweeps`
    or `fsdpq.recipe.compose` says what is wrong with it.
    """
    if not texts:
        return Sorted({}, (), {}, ())
    parser = _parser()
    sweeps: dict[str, str] = {}
    typed: dict[str, str] = {}
    fixed: list[str] = []
    problems: list[Problem] = []
    for text in texts:
        parsed = _parse(parser, text)
        key = text.partition("=")[0]
        is_sweep = (
            _MEANT.match(text) is not None
            if isinstance(parsed, str)
            else parsed.is_sweep_override() or key == "recipe"
        )
        if not is_sweep:
            fixed.append(text)
        elif key in sweeps:
            at = on_command_line(text)
            hint = "give all its values once"
            problems.append(Problem(f"`{key}` is given twice", key, at, hint))
        else:
            sweeps[key], typed[key] = text.partition("=")[2], text
    return Sorted(sweeps, tuple(fixed), typed, tuple(problems))


def parse_sweeps(
    sweeps: Sequence[tuple[str, str, Location | None]],
) -> tuple[list[Parameter], list[Problem]]:
    """Parses keys and texts of values; a text that is one value is a parameter with one value.

    Args:
        sweeps: a key, the text of its values, and where they were written.
    """
    parameters: list[Parameter] = []
    problems: list[Problem] = []
    parser = _parser() if sweeps else None
    for key, text, location in sweeps:
        found = _parse_values(parser, key, text, location)
        if isinstance(found, Parameter):
            parameters.append(found)
        else:
            problems.append(found)
    return parameters, problems


def write_override(key: str, value: Any) -> str:
    """Returns the override that sets ``key`` to plain data, as the command line reads it."""
    return f"{key}={_write(value)}"


def write_patterns(patterns: Patterns) -> str:
    """Returns ``glob(...)`` as the grammar reads it."""
    include, exclude = (_write(list(names)) for names in (patterns.include, patterns.exclude))
    return f"glob({include},exclude={exclude})" if patterns.exclude else f"glob({include})"


def _parser() -> Any:
    from hydra.core.override_parser.overrides_parser import OverridesParser

    return OverridesParser.create()


def _parse(parser: Any, text: str) -> Any:
    """Returns what Hydra reads in ``text``, or why it cannot: empty where the reason is grammar."""
    from hydra.errors import HydraException

    try:
        return parser.parse_override(text)
    except (HydraException, RecursionError) as error:
        inside = str(error).partition("while evaluating")[2].partition("\n")[0]
        return inside.partition("': ")[2]


def _parse_values(
    parser: Any, key: str, text: str, location: Location | None
) -> Parameter | Problem:
    def refuse(message: str, hint: str) -> Problem:
        return Problem(message, key, location, hint)

    if not text.isprintable():
        return refuse(f"the values of `{key}` hold characters that cannot be printed", _QUOTE)
    if key[:1] in "+~":
        hint = f"leave the `{key[:1]}` out: `{key.lstrip('+~')}`"
        return refuse(f"`{key}`: a sweep sets a key, it neither adds nor deletes one", hint)
    parsed = _parse(parser, f"{key}={text}")
    if isinstance(parsed, str):
        reason = f": {parsed}" if parsed else ""
        return refuse(f"`{key}={text}` cannot be read{reason}", _hint(text))
    try:
        return _read(key, parsed, location)
    except _RefusedError as error:
        return refuse(error.message, error.hint)


class _RefusedError(Exception):
    """Message and hint of values that cannot be tried."""

    def __init__(self, message: str, hint: str) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint


def _hint(text: str) -> str:
    return "close the bracket" if text.count("(") > text.count(")") else _QUOTE


def _read(key: str, parsed: Any, location: Location | None) -> Parameter:
    from hydra.core.override_parser.types import ChoiceSweep, Glob, IntervalSweep, RangeSweep

    value = parsed._value
    tags: set[str] = set(getattr(value, "tags", ()))
    unknown = sorted(tags - {"log"} if isinstance(value, IntervalSweep) else tags)
    if unknown:
        message = f"the tag `{unknown[0]}` of `{key}` means nothing here"
        raise _RefusedError(message, "only `tag(log, interval(...))` is known")
    if isinstance(value, IntervalSweep):
        return Parameter(key, interval=_interval(key, value, tags), location=location)
    if isinstance(value, Glob):
        patterns = Patterns(
            tuple(str(_plain(key, name)) for name in value.include),
            tuple(str(_plain(key, name)) for name in value.exclude),
        )
        return Parameter(key, patterns=patterns, location=location)
    if isinstance(value, RangeSweep):
        values, shuffle = _range(key, value), value.shuffle
    elif isinstance(value, ChoiceSweep):
        values, shuffle = [_plain(key, item) for item in value.list], value.shuffle
    else:
        values, shuffle = [_plain(key, value)], False
    return Parameter(key, tuple(values), shuffle=shuffle, location=location)


def _interval(key: str, value: Any, tags: set[str]) -> Interval:
    low, high = value.start, value.end
    text = f"interval({low:g},{high:g})"
    if not (math.isfinite(low) and math.isfinite(high)):
        raise _RefusedError(f"`{key}`: {text} has no end", "give two finite numbers")
    if not low < high:
        raise _RefusedError(f"`{key}`: {text} holds no numbers", "give the smaller number first")
    if "log" in tags and low <= 0:
        message = f"`{key}`: {text} reaches down to {low:g}, which has no magnitude"
        raise _RefusedError(message, "start above 0, or leave `tag(log, ...)` out")
    whole = isinstance(low, int) and isinstance(high, int)
    return Interval(low, high, log="log" in tags, whole=whole)


def _range(key: str, value: Any) -> list[int | float]:
    """Returns the numbers of a range, its end not among them; decimal steps stay decimal."""
    numbers = (value.start, value.stop, value.step)
    whole = all(isinstance(number, int) for number in numbers)
    start, stop, step = (Decimal(str(number)) for number in numbers)
    text = f"range({start},{stop},{step})"
    if not all(number.is_finite() for number in (start, stop, step)) or step == 0:
        raise _RefusedError(f"`{key}`: {text} has no end", "give finite numbers, and a step")
    count = max(0, math.ceil((stop - start) / step))
    if count == 0:
        raise _RefusedError(f"`{key}`: {text} is empty", "the first number comes before the second")
    if count > MAX_VALUES:
        message = f"`{key}`: {text} has {count} values, more than {MAX_VALUES}"
        raise _RefusedError(message, "give a larger `step=`")
    found = islice((start + index * step for index in range(count)), count)
    return [int(number) if whole else float(number) for number in found]


def _plain(key: str, value: Any) -> Any:
    from hydra.core.override_parser.types import QuotedString

    if isinstance(value, QuotedString):
        return value.text
    if isinstance(value, list):
        return [_plain(key, item) for item in cast("list[Any]", value)]
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise _RefusedError(f"a value of `{key}` is a mapping", _MAPPING)


def _write(value: Any) -> str:
    from hydra.core.override_parser.types import Quote, QuotedString

    if value is None:
        return "null"
    if isinstance(value, list | tuple):
        return f"[{','.join(_write(item) for item in cast('list[Any]', value))}]"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int | float):
        return repr(value)
    text = str(value)
    return text if _is_plain_word(text) else QuotedString(text, Quote.single).with_quotes()


def _is_plain_word(text: str) -> bool:
    """Whether Hydra reads ``text`` without quotes, as this text and nothing else."""
    if text.lower() in ("null", "true", "false", "nan", "inf"):
        return False
    letters = text.replace("_", "").replace(".", "").replace("/", "").replace("-", "")
    return letters.isascii() and letters.isalnum() and text[:1].isalpha()


def on_command_line(text: str) -> Location:
    """Returns the place of a word of the command line."""
    return Location(COMMAND_LINE, text=text, length=len(text))
