"""Readers of single values, as lenient as the tools that the values were written for.

Those tools read YAML 1.1 and convert what they get, so ``"1e-4"``, ``yes`` and ``16.0`` mean a
number, true and 16 there. A recipe is strict; the conversion happens here.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, cast

_TRUE = ("true", "yes", "on", "1")
_FALSE = ("false", "no", "off", "0")

MAX_NUMBER = 10**18
Reader = Callable[[Any], Any]


class UnusableError(Exception):
    """A value that the key cannot have; the text says what it could be."""


def boolean(value: Any) -> bool:
    """Returns a truth value.

    Raises:
        UnusableError: it is none.
    """
    word = str(value).lower()
    if word in _TRUE:
        return True
    if word in _FALSE:
        return False
    raise UnusableError("must be true or false")


def number(value: Any) -> float | int:
    """Returns a finite number.

    Raises:
        UnusableError: it is none.
    """
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        raise UnusableError("must be a number")
    try:
        found = value if isinstance(value, int) else float(value)
    except ValueError:
        raise UnusableError("must be a number") from None
    if not math.isfinite(found) or abs(found) > MAX_NUMBER:
        raise UnusableError("must be a number of at most 18 digits")
    return found


def whole(value: Any) -> int:
    """Returns a whole number.

    Raises:
        UnusableError: it is none.
    """
    found = number(value)
    if found != int(found):
        raise UnusableError("must be a whole number")
    return int(found)


def numbers(value: Any) -> list[float | int]:
    """Returns a list of numbers.

    Raises:
        UnusableError: it is none.
    """
    if not isinstance(value, list):
        raise UnusableError("must be a list of numbers")
    return [number(item) for item in cast("list[Any]", value)]


def text(value: Any) -> str:
    """Returns a string.

    Raises:
        UnusableError: it is a list, a mapping or empty.
    """
    if isinstance(value, list | dict) or value is None or value == "":
        raise UnusableError("must be a string")
    return str(value)


def names(value: Any) -> list[str]:
    """Returns a list of names, out of a list or of ``a,b``.

    Raises:
        UnusableError: it is neither.
    """
    found: Any = value.split(",") if isinstance(value, str) else value
    items = cast("list[Any]", found) if isinstance(found, list) else [None]
    if not all(isinstance(name, str) for name in items):
        raise UnusableError("must be a list of names")
    stripped = [str(name).strip() for name in items]
    return list(dict.fromkeys(name for name in stripped if name))


def mapping(value: Any) -> dict[str, Any]:
    """Returns a mapping.

    Raises:
        UnusableError: it is none.
    """
    if not isinstance(value, dict):
        raise UnusableError("must be a mapping of keys")
    return cast("dict[str, Any]", value)


def is_off(value: Any) -> bool:
    """Returns whether a value asks for nothing: null, false, zero, empty, ``no``, ``none``."""
    if isinstance(value, str):
        return value.lower() in ("", "no", "none", "off", "false")
    return not value
