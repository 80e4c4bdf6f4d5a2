"""``data``: what the model is trained on."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from fsdpq.recipe.sections.source import MixturePart, SourceOptions


class DataOptions(SourceOptions):
    """Training data: ``path``, ``dataset`` or ``mixture``, or ``format: dummy`` alone."""

    mixture: tuple[MixturePart, ...] = Field(default=(), max_length=100)
    """Several sources instead of one, each with ``path`` or ``dataset``, its own ``format``,
    ``columns``, ``split``, ``max_rows`` and a ``weight``."""

    mixture_stopping: Literal["first_exhausted", "all_exhausted"] = "first_exhausted"
    """With weights, how long an epoch of a mixture is: ``first_exhausted`` uses no row twice and
    leaves out rows of the other parts; ``all_exhausted`` uses every row at least once and repeats
    rows of the other parts."""

    seq_len: int = Field(default=512, ge=8)
    """Longest row in tokens."""

    truncation: Literal["truncate_end", "truncate_start", "drop", "error"] = "truncate_end"
    """What happens to a longer row: it is cut at its end or start, left out, or ends the run. Rows
    cut or left out are counted and reported."""

    on_bad_row: Literal["error", "skip"] = "error"
    """What happens to a row that is not of its ``format``; ``skip`` leaves it out and counts it. A
    file of which more than half is bad stays an error."""

    packing: Literal["none", "best_fit"] = "none"
    """``best_fit`` puts several rows into one sequence of ``seq_len`` tokens; none sees another.
    Batch sizes and ``training.epochs`` then count sequences, not rows."""

    chat_template: str | None = Field(default=None, min_length=1, max_length=200)
    """What renders conversations: null is the tokenizer's own template where it has one, else the
    plain texts of the formats; a name is a built-in one (``fsdpq kinds data`` lists them), ``none``
    the plain texts, a path that ends in ``.jinja`` a file, relative to the recipe."""

    train_on_prompt: bool = False
    """Compute the loss on every token instead of the answers only. Answers include the mark that
    ends them."""

    roles_to_train: tuple[Literal["system", "user", "assistant", "tool"], ...] = Field(
        default=("assistant",), min_length=1
    )
    """Whose messages carry loss. A message's own ``train: true`` or ``train: false`` goes before
    it."""

    turns_to_train: Literal["all", "last"] = "all"
    """``last`` computes the loss on the last turn of ``roles_to_train`` in every conversation
    only."""

    train_on_eos: Literal["turn", "last", "none"] = "turn"
    """Which end marks carry loss: that of every trained turn, that of the last one only, or none
    (the model then does not learn to stop)."""

    shuffle: bool = True
    """Train on the rows in an order drawn anew each epoch from ``training.seed``; false takes them
    as they come."""

    streaming: bool = False
    """Read, tokenize and pack the rows while training, window by window, instead of ahead: memory
    and disk do not grow with the data. Needs ``training.steps``; rows for evaluation come from
    ``eval`` alone."""

    stream_window: int = Field(default=10_000, ge=100, le=10_000_000)
    """With ``streaming``, rows that are shuffled and packed together; about three windows of tokens
    are in memory."""

    eval_fraction: float = Field(default=0.0, ge=0.0, lt=1.0)
    """Share of the rows held out from training for evaluation."""

    eval: SourceOptions | None = None
    """Rows for evaluation from a source of their own, instead of ``eval_fraction``."""
