"""What ends a turn: the tokens that a template writes behind contents."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from fsdpq.data.templates.jinja_text import ChatTemplate, Span
from fsdpq.data.templates.probes import ProbedText, probe

_ASKED = {"role": "user", "content": probe(0)}
_ANSWERED = {"role": "assistant", "content": probe(1)}


@dataclass(frozen=True)
class Turn:
    """One message in a rendered conversation.

    Attributes:
        body: ranges of its characters: all that the model writes before the end mark, for other
            roles than the assistant the content.
        mark: range of what ends it (``<|im_end|>``), empty where nothing does.
    """

    body: tuple[Span, ...]
    mark: Span


class EndMarks:
    """Finds the end marks of a template's turns.

    Args:
        template: what renders.
        added_tokens: texts that are single tokens: those right behind a content end its turn.
    """

    def __init__(self, template: ChatTemplate, added_tokens: Iterable[str]) -> None:
        self.template = template
        longest_first = sorted({token for token in added_tokens if token.strip()}, key=len)[::-1]
        self._added = "|".join(map(re.escape, longest_first)) or "(?!)"
        self._of_answers: dict[bool, str | None] = {}

    def of_answers(self, tools: Sequence[Any] | None = None) -> str | None:
        """Returns what ends an answer, empty where nothing does, None where it cannot be told."""
        key = bool(tools)
        if key not in self._of_answers:
            whole = self.template.try_render([_ASKED, _ANSWERED], tools)
            place = ProbedText(whole).place_of(1) if whole else None
            self._of_answers[key] = self.first(whole[place.end :]) if whole and place else None
        return self._of_answers[key]

    def first(self, behind: str) -> str:
        """Returns what ends a turn, given what a template writes behind the last content."""
        found = re.search(f"(?:{self._added})+", behind)
        return behind[: found.end()] if found else behind.rstrip()

    def last(self, text: str) -> str:
        """Returns the tokens that a text ends in, empty where it ends in none."""
        found = re.search(f"(?:{self._added})+$", text)
        return found[0] if found else ""

    def outside(self, text: str, at: int) -> int:
        """Returns ``at``, or the start of the token that this position is in the middle of."""
        for found in re.finditer(self._added, text):
            if found.start() < at < found.end():
                return found.start()
            if found.start() >= at:
                break
        return at

    def inside(self, behind: str, tools: Sequence[Any] | None) -> str:
        """Returns what ends an answer that is not the last, where only the last has its mark.

        That is the token that ends a user's message too, unless it begins the next message.
        """
        found = re.match(self._added, behind)
        alone = self.template.try_render([_ASKED], tools)
        prompt = self.template.try_render([_ASKED], tools, add_generation_prompt=True)
        place = ProbedText(alone).place_of(0) if alone else None
        if found is None or alone is None or prompt is None or place is None:
            return ""
        ends_user = alone.startswith(found[0], place.end)
        return found[0] if ends_user and found[0] not in prompt[len(alone) :] else ""

    def split(self, text: str, spans: list[Span], end_mark: str) -> Turn:
        """Returns a turn of marked ranges, the end mark at or behind their end told apart.

        Args:
            text: of the conversation.
            spans: what the template marks as one answer.
            end_mark: what ends answers.
        """
        *first, (start, end) = spans
        at = text.rfind(end_mark, start, end) if end_mark else -1
        if at >= 0 and re.fullmatch(f"(?:{self._added}|\\s)*", text[at + len(end_mark) : end]):
            return Turn((*first, (start, at)), (at, end))
        behind = end + len(end_mark) if text.startswith(end_mark, end) else end
        return Turn((*first, (start, end)), (end, behind))
