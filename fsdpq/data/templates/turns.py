"""Says which characters of a rendered conversation are whose turn.

A template that marks what the model writes (``generation``) is taken at its word. For all others
the conversation is rendered a second time with probes for contents: what is between them is the
template's own text, and prefixes of the probed conversation show where a turn begins (after the
generation prompt) and ends. Such a plan depends on the roles only, so conversations of like shape
share one, and a row costs one rendering. Where the plan with contents filled in is not the text
itself, because the template looks into contents (Qwen 3 takes reasoning apart), each turn is
located by a probe of its own in the real conversation. A turn that cannot be located for certain
is an error. Positions are those of the text: no token is looked at.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fsdpq.data.templates.jinja_text import ChatTemplate, Message, Span, TemplateError
from fsdpq.data.templates.marks import EndMarks, Turn
from fsdpq.data.templates.probes import Place, ProbedText, probe

MAX_PLANS = 256
"""Shapes of conversations whose plans are kept."""


@dataclass(frozen=True)
class _Plan:
    probed: ProbedText
    turns: Mapping[int, Turn]


class ChatRenderer:
    """Renders conversations by a chat template and locates the turns.

    Args:
        template: what renders.
        added_tokens: texts that are single tokens; the first one behind a content ends its turn.
    """

    def __init__(self, template: ChatTemplate, added_tokens: Iterable[str]) -> None:
        self.template = template
        self.marks = EndMarks(template, added_tokens)
        self._plans: dict[Any, _Plan] = {}

    def render(
        self,
        messages: Sequence[Message],
        wanted: Collection[int],
        tools: Sequence[Any] | None = None,
    ) -> tuple[str, dict[int, Turn]]:
        """Returns the text, and the turns of the messages whose numbers are ``wanted``.

        Raises:
            TemplateError: the template refuses the conversation, leaves a part of it out, or does
                not show where a turn is.
        """
        if self.template.marks_answers(tools):
            text, marks = self.template.render_marked(messages, tools)
            turns = self._marked_turns(text, marks, messages, tools)
        else:
            text, turns = self.template.render(messages, tools), {}
        rest = [number for number in wanted if number not in turns]
        if rest:
            turns |= self._located_turns(text, messages, rest, tools)
        self._check_shown(text, messages, turns, tools)
        return text, {number: turns[number] for number in wanted}

    def render_prompt(self, messages: Sequence[Message], tools: Sequence[Any] | None = None) -> str:
        """Returns the text that asks for the next answer.

        Raises:
            TemplateError: the template refuses the conversation.
        """
        return self.template.render(messages, tools, add_generation_prompt=True)

    def _check_shown(
        self,
        text: str,
        messages: Sequence[Message],
        turns: Mapping[int, Turn],
        tools: Sequence[Any] | None,
    ) -> None:
        """Raises where the template leaves something out without a word."""
        source = self.template.source_for(tools)
        if tools and "tools" not in source:
            raise TemplateError("the chat template does not show `tools`")
        for number, message in enumerate(messages):
            calls = message.get("tool_calls") or ()
            turn = turns.get(number)
            shown = None if turn is None else "".join(text[a:b] for a, b in turn.body)
            names = [str((call.get("function") or call).get("name", "")) for call in calls]
            left_out = shown is not None and not all(name in shown for name in names)
            if calls and ("tool_calls" not in source or left_out):
                what = f"the tool call of message {number + 1}"
                raise TemplateError(f"the chat template does not show {what}")
            if shown is not None and message["role"] != "tool":
                last_word = content_of(message).rsplit(maxsplit=1)[-1:]
                if last_word and last_word[0] not in shown:
                    raise TemplateError(f"the chat template leaves out message {number + 1}")

    # Templates that mark answers

    def _marked_turns(
        self,
        text: str,
        marks: list[Span],
        messages: Sequence[Message],
        tools: Sequence[Any] | None,
    ) -> dict[int, Turn]:
        answers = [n for n, message in enumerate(messages) if message["role"] == "assistant"]
        marks = [span for span in marks if span[0] < span[1]]
        if len(marks) == len(answers):
            groups = {number: [span] for number, span in zip(answers, marks, strict=True)}
        elif len(answers) == 1:
            groups = {answers[0]: marks}
        elif not marks:
            groups = {}
        else:
            groups = self._group_marks(text, marks, messages, answers, tools)
        end_mark = self.marks.of_answers(tools) or ""
        return {n: self.marks.split(text, spans, end_mark) for n, spans in groups.items() if spans}

    def _group_marks(
        self,
        text: str,
        marks: list[Span],
        messages: Sequence[Message],
        answers: list[int],
        tools: Sequence[Any] | None,
    ) -> dict[int, list[Span]]:
        """Returns the marks of every answer where the template marks several parts of one."""
        located = self._located_turns(text, messages, answers, tools)
        ends = {number: located[number].mark[1] for number in answers}
        groups: dict[int, list[Span]] = {number: [] for number in answers}
        for span in marks:
            owner = next((n for n in answers if span[0] < ends[n]), answers[-1])
            groups[owner].append(span)
        return groups

    # Templates that do not

    def _located_turns(
        self,
        text: str,
        messages: Sequence[Message],
        wanted: Collection[int],
        tools: Sequence[Any] | None,
    ) -> dict[int, Turn]:
        turns = self._planned_turns(text, messages, tools)
        if turns is None:
            turns = {}
        for number in wanted:
            is_answer = messages[number]["role"] == "assistant"
            if not is_answer and not content_of(messages[number]).strip():
                turns[number] = Turn((), (0, 0))  # nothing to train, and no way to find it
            elif number not in turns:
                turns[number] = self._turn_alone(text, messages, number, tools)
        return turns

    def _planned_turns(
        self, text: str, messages: Sequence[Message], tools: Sequence[Any] | None
    ) -> dict[int, Turn] | None:
        """Returns turns by the plan of conversations of this shape, None where it does not hold."""
        key = _shape(messages, tools)
        contents = [content_of(message) for message in messages]
        for is_fresh in (False, True):
            plan = self._plans.get(key)
            if plan is None or is_fresh:
                plan = self._make_plan(messages, tools)
                if plan is None:
                    return None
                if len(self._plans) >= MAX_PLANS:
                    self._plans.clear()
                self._plans[key] = plan
            filled, moved = plan.probed.fill(contents)
            if filled == text:
                return {number: _moved(turn, moved) for number, turn in plan.turns.items()}
            if "strftime_now" not in self.template.source_for(tools):
                break
        return None

    def _make_plan(self, messages: Sequence[Message], tools: Sequence[Any] | None) -> _Plan | None:
        probes = [
            {**message, "content": probe(number)} if content_of(message).strip() else message
            for number, message in enumerate(messages)
        ]
        text = self.template.try_render(probes, tools)
        if text is None:
            return None
        probed = ProbedText(text)
        turns: dict[int, Turn] = {}
        for number in range(len(messages)):
            turn = self._locate(text, probed.place_of(number), probes, number, tools)
            if turn is not None:
                turns[number] = turn
        return _Plan(probed, turns)

    def _turn_alone(
        self,
        text: str,
        messages: Sequence[Message],
        number: int,
        tools: Sequence[Any] | None,
    ) -> Turn:
        """Returns the turn of one message by a probe for its content only.

        Raises:
            TemplateError: the texts before and after the probe are not those of the conversation.
        """
        probes: list[Message] = list(messages)
        if content_of(messages[number]).strip():
            probes[number] = {**messages[number], "content": probe(number)}
        probed = self.template.try_render(probes, tools)
        place = ProbedText(probed).place_of(number) if probed is not None else None
        turn = None
        if probed is not None:
            turn = self._locate(probed, place, probes, number, tools)
        if turn is not None and place is None:
            return turn  # nothing was replaced
        if turn is not None and place is not None and probed is not None:
            # What is before the turn and behind its content must be in the text as it is.
            start = self._start_again(text, probed[: turn.body[0][0]], messages, number, tools)
            shift = len(text) - len(probed)
            is_end = text.endswith(probed[place.end :])
            if start is not None and is_end and start <= place.end + shift:
                mark = (turn.mark[0] + shift, turn.mark[1] + shift)
                return Turn(((start, mark[0]),), mark)
        raise TemplateError(f"the chat template does not show where message {number + 1} is")

    def _start_again(
        self,
        text: str,
        probed_start: str,
        messages: Sequence[Message],
        number: int,
        tools: Sequence[Any] | None,
    ) -> int | None:
        """Returns where a turn begins whose content changes the text around it."""
        if messages[number]["role"] == "assistant":
            asked = self.template.try_render(messages[:number], tools, add_generation_prompt=True)
            before = self.template.try_render(messages[:number], tools)
            if asked is not None and text.startswith(asked):
                return len(asked)
            if text.startswith(probed_start):
                return len(probed_start)
            if asked is not None and before is not None and text.startswith(before):
                return self._divergence(asked, text)
        return len(probed_start) if text.startswith(probed_start) else None

    def _locate(
        self,
        text: str,
        place: Place | None,
        messages: Sequence[Message],
        number: int,
        tools: Sequence[Any] | None,
    ) -> Turn | None:
        """Returns the turn of a message in ``text``, which renders ``messages``."""
        if place is None and content_of(messages[number]).strip():
            return None  # the template leaves it out, or writes it twice
        start = self._find_start(text, place, messages, number, tools)
        if start is None:
            return None
        mark = self._find_mark(text, place, messages, number, start, tools)
        if mark is None:
            return None
        if place is None and mark[0] == mark[1]:
            end = max(start, mark[0])
            mark = (end, end)
        if start > mark[0]:
            return None
        if place is not None and not (start <= place.start and place.end <= mark[0]):
            return None
        return Turn(((start, mark[0]),), mark)

    def _find_start(
        self,
        text: str,
        place: Place | None,
        messages: Sequence[Message],
        number: int,
        tools: Sequence[Any] | None,
    ) -> int | None:
        content = None if place is None else place.start
        if messages[number]["role"] != "assistant":
            return content
        asked = self.template.try_render(messages[:number], tools, add_generation_prompt=True)
        before = self.template.try_render(messages[:number], tools)
        if asked is not None and text.startswith(asked):
            return len(asked) if content is None else min(len(asked), content)
        if asked is None or before is None or not asked.startswith(before):
            return content
        if text.startswith(before):  # the prompt holds something that the answer does not
            start = self._divergence(asked, text)
            return start if content is None else min(start, content)
        if content is None:
            return None
        # Earlier turns look different when more follows: find the generation prompt nearby.
        prompt = asked[len(before) :]
        at = text.rfind(prompt, 0, content) if prompt else -1
        is_near = at >= 0 and not ProbedText(text[at:content]).places
        return at + len(prompt) if is_near else content

    def _divergence(self, asked: str, text: str) -> int:
        """Returns where a text leaves the prompt, outside of any token."""
        pairs = enumerate(zip(asked, text, strict=False))
        at = next((place for place, (a, b) in pairs if a != b), min(len(asked), len(text)))
        return self.marks.outside(text, at)

    def _find_mark(
        self,
        text: str,
        place: Place | None,
        messages: Sequence[Message],
        number: int,
        start: int,
        tools: Sequence[Any] | None,
    ) -> Span | None:
        upto = self.template.try_render(messages[: number + 1], tools)
        has_calls = bool(messages[number].get("tool_calls"))
        if place is not None and not has_calls:
            alone = ProbedText(upto).place_of(number) if upto else None
            if upto is None or alone is None:
                return place.end, place.end
            mark = self.marks.first(upto[alone.end :])
            if not text.startswith(mark, place.end):
                mark = self.marks.inside(text[place.end :], tools)
            return place.end, place.end + len(mark)
        end_mark = self.marks.of_answers(tools)
        if upto is not None and text.startswith(upto.rstrip()):
            whole = upto.rstrip()
            mark = self.marks.last(whole[start:])
            if end_mark and whole.endswith(end_mark, start):
                mark = end_mark
            return len(whole) - len(mark), len(whole)
        calls = json.dumps(messages[number].get("tool_calls"), default=str)
        if not end_mark or json.dumps(end_mark)[1:-1] in calls:
            return None
        at = text.find(end_mark, place.end if place else start)
        return None if at < 0 else (at, at + len(end_mark))


def content_of(message: Message) -> str:
    """Returns the text of a message, empty where it has none."""
    content = message.get("content")
    return content if isinstance(content, str) else ""


def _shape(messages: Sequence[Message], tools: Sequence[Any] | None) -> Any:
    """Returns what a plan depends on: everything but the contents."""
    parts: list[Any] = [json.dumps(tools) if tools else None]
    for message in messages:
        content = content_of(message)
        parts.append((message["role"], None if content.strip() else content))
        if len(message) > 2:
            rest = {key: value for key, value in message.items() if key != "content"}
            parts.append(json.dumps(rest, sort_keys=True, default=str))
    return tuple(parts)


def _moved(turn: Turn, moved: Any) -> Turn:
    body = tuple((moved(start), moved(end)) for start, end in turn.body)
    return Turn(body, (moved(turn.mark[0]), moved(turn.mark[1])))
