"""Finds out where a template puts the contents of messages, by rendering probes in their place.

A probe is a text that no template writes: its number between two characters of private use, within
two white-space characters that show whether the template strips contents. What it becomes in the
rendered text tells where the content goes and in which form.
"""

from __future__ import annotations

import json
import re
from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate

_EDGE = "\x1f"  # white space to `str.strip`, and in no template
_PROBE = re.compile(r"(\x1f|\\u001f)?\ue0f0(\d+)\ue0f1(\x1f|\\u001f)?")


def probe(number: int) -> str:
    """Returns the probe of message ``number``."""
    return f"{_EDGE}\ue0f0{number}\ue0f1{_EDGE}"


@dataclass(frozen=True)
class Place:
    """Where a content is rendered.

    Attributes:
        number: of its message, from 0.
        start: of its probe in the probed text.
        end: of its probe, exclusive.
        form: what the template makes of the content: as it is, stripped, quoted for JSON.
    """

    number: int
    start: int
    end: int
    form: Callable[[str], str]


def find_places(text: str) -> list[Place]:
    """Returns the places of all probes in a rendered text, in order."""
    return [
        Place(int(found[2]), found.start(), found.end(), _FORMS[found[1], found[3]])
        for found in _PROBE.finditer(text)
        if (found[1], found[3]) in _FORMS
    ]


def _same(content: str) -> str:
    return content


def _json_text(content: str) -> str:
    return json.dumps(content, ensure_ascii=False)[1:-1]


_FORMS: Mapping[tuple[str | None, str | None], Callable[[str], str]] = {
    (_EDGE, _EDGE): _same,
    (None, _EDGE): str.lstrip,
    (_EDGE, None): str.rstrip,
    (None, None): str.strip,
    ("\\u001f", "\\u001f"): _json_text,
}


class ProbedText:
    """A text with probes, to be filled with contents.

    Args:
        text: rendered from probes.
    """

    def __init__(self, text: str) -> None:
        self.text = text
        self.places = find_places(text)
        ends = [place.end for place in self.places]
        starts = [*(place.start for place in self.places), len(text)]
        self._ends = ends
        self._literals = [text[a:b] for a, b in zip([0, *ends], starts, strict=True)]

    def place_of(self, number: int) -> Place | None:
        """Returns the one place of a message's content, None where there are none or several."""
        found = [place for place in self.places if place.number == number]
        return found[0] if len(found) == 1 else None

    def fill(self, contents: Sequence[str]) -> tuple[str, Callable[[int], int]]:
        """Returns the text with contents in place of probes, and where its positions went.

        Args:
            contents: of all messages, by number.

        Returns:
            The text, and a function from a position in the probed text, outside of probes, to the
            position in this one.
        """
        filled = [place.form(contents[place.number]) for place in self.places]
        pieces = [self._literals[0]]
        for value, literal in zip(filled, self._literals[1:], strict=True):
            pieces += (value, literal)
        grown = (
            len(value) - (place.end - place.start)
            for value, place in zip(filled, self.places, strict=True)
        )
        shifts = [0, *accumulate(grown)]

        def moved(position: int) -> int:
            return position + shifts[bisect_right(self._ends, position)]

        return "".join(pieces), moved
