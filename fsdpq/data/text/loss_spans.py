"""Decides which characters of a row carry loss: whose turns, and which of their end marks.

A message's own word goes first, then ``data.roles_to_train`` and ``data.turns_to_train``; an end
mark follows ``data.train_on_eos``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from fsdpq.data.templates.jinja_text import Span
from fsdpq.data.templates.marks import Turn
from fsdpq.recipe.sections.data import DataOptions


@dataclass(frozen=True)
class LossPlan:
    """What carries loss in a conversation of these roles, before it is rendered.

    Attributes:
        trained: for each message, whether it carries loss.
        left_out: for each message, whether it carries none whatever the recipe says.
        last: number of the last trained message, -1 where there is none.
        wanted: messages of which the place must be known.
    """

    trained: list[bool]
    left_out: list[bool]
    last: int
    wanted: list[int]


def plan_loss(roles: Sequence[str], flags: Sequence[bool | None], options: DataOptions) -> LossPlan:
    """Returns which messages carry loss.

    Args:
        roles: of the messages.
        flags: what each message says about itself, None where it is silent.
        options: the recipe's ``data``.
    """
    chosen = [number for number, role in enumerate(roles) if role in options.roles_to_train]
    if options.turns_to_train == "last":
        chosen = chosen[-1:]
    by_recipe = set(range(len(roles)) if options.train_on_prompt else chosen)
    trained = [number in by_recipe if flag is None else flag for number, flag in enumerate(flags)]
    left_out = [flag is False for flag in flags]
    last = max((number for number, is_trained in enumerate(trained) if is_trained), default=-1)
    wanted = [number for number, is_trained in enumerate(trained) if is_trained]
    if options.train_on_prompt:
        ends_matter = options.train_on_eos != "turn"
        wanted = [n for n in range(len(roles)) if left_out[n] or (ends_matter and trained[n])]
    return LossPlan(trained, left_out, last, wanted)


def loss_spans(
    text: str, turns: Mapping[int, Turn], plan: LossPlan, options: DataOptions
) -> tuple[list[Span], list[Span]]:
    """Returns the ranges of characters that carry loss, and those that never do.

    Args:
        text: of the whole row.
        turns: where the messages of ``plan.wanted`` are.
        plan: which of them carry loss.
        options: the recipe's ``data``.
    """
    trained: list[Span] = [(0, len(text))] if options.train_on_prompt else []
    never: list[Span] = []
    for number, turn in turns.items():
        if plan.left_out[number]:
            never += (*turn.body, turn.mark)
        elif plan.trained[number]:
            whole = [*turn.body]
            if whole and trains_mark(number, plan, options):
                # One range with the mark: a token may be part of both.
                whole[-1] = (whole[-1][0], turn.mark[1])
            else:
                never.append(turn.mark)
            trained += whole
    return trained, never


def trains_mark(number: int, plan: LossPlan, options: DataOptions) -> bool:
    """Returns whether the end mark of a message carries loss."""
    if not plan.trained[number] or options.train_on_eos == "none":
        return False
    return options.train_on_eos == "turn" or number == plan.last
