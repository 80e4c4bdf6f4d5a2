"""Tokenizes rendered rows, with loss masks that are exact.

The mask comes from character positions: `fsdpq.data.render` says which characters carry loss, the
tokenizer's offsets say which tokens lie wholly inside. Nothing is tokenized twice, so a token that
merges across a boundary cannot shift the mask; it begins in the prompt and carries no loss.
"""

from __future__ import annotations

import hashlib
import itertools
import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
from transformers import PreTrainedTokenizerBase

from fsdpq.data.render import Rendered, TemplateError, is_templated, render_prompt, render_row
from fsdpq.data.templates.choose import ChatTemplate, choose_template
from fsdpq.errors import FsdpqError, Problem, RecipeError
from fsdpq.recipe.sections.data import DataOptions
from fsdpq.rows.formats import DUMMY_ROWS

TEMPLATE_HINT = "change the row, set `data.train_on_prompt: true`, or use another model"
BATCH_ROWS = 1000
"""Rows handed to the tokenizer at once: it uses all cores for a batch."""


@dataclass(frozen=True, eq=False)
class Row:
    """One tokenized row, or several packed into one sequence.

    Attributes:
        input_ids: token ids, ``(tokens,)``, int32.
        loss_mask: for each token, whether predicting it carries loss, ``(tokens,)``, uint8; a
            document's first never does.
        document_lengths: tokens of each packed document, in order; empty for a single one.
    """

    input_ids: npt.NDArray[np.int32]
    loss_mask: npt.NDArray[np.uint8]
    document_lengths: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        # Sequences of numbers are taken too; arrays of these types are not copied.
        object.__setattr__(self, "input_ids", np.asarray(self.input_ids, dtype=np.int32))
        object.__setattr__(self, "loss_mask", np.asarray(self.loss_mask, dtype=np.uint8))

    def __len__(self) -> int:
        return len(self.input_ids)

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, Row)
            and np.array_equal(self.input_ids, other.input_ids)
            and np.array_equal(self.loss_mask, other.loss_mask)
            and self.document_lengths == other.document_lengths
        )

    __hash__ = None  # pyright: ignore[reportAssignmentType] - arrays have no hash

    @property
    def num_trained(self) -> int:
        """Tokens that carry loss."""
        return int(np.count_nonzero(self.loss_mask))


class RowTokenizer:
    """Makes token ids and exact loss masks of a format's rows.

    It can be pickled and sent to another process.

    Args:
        tokenizer: of the base model, a fast one.
        options: the recipe's ``data``: what carries loss.
        format_name: the rows' format, never ``auto``.
        template: what renders conversations, None for the plain texts of the formats.

    Raises:
        RecipeError: the tokenizer has no character offsets, or nothing ends an answer.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        options: DataOptions,
        format_name: str,
        *,
        template: ChatTemplate | None,
    ) -> None:
        self.tokenizer = tokenizer
        self.options = options
        self.format_name = format_name
        self.template = template if format_name not in ("text", "dummy") else None
        check_tokenizer(tokenizer, self.template)

    def tokenize(self, rows: Sequence[Mapping[str, Any]]) -> list[Row | TemplateError]:
        """Returns for every row its tokens, or why it cannot be rendered; order is kept.

        A row may be longer than ``data.seq_len`` and may have no trained token.
        """
        rendered = [self._render(row) for row in rows]
        good = [item for item in rendered if isinstance(item, Rendered)]
        tokenized = tokenize_rendered(good, self.tokenizer, by_template=self.template is not None)
        return [item if isinstance(item, TemplateError) else next(tokenized) for item in rendered]

    def _render(self, row: Mapping[str, Any]) -> Rendered | TemplateError:
        try:
            rendered = render_row(row, self.format_name, self.tokenizer, self.template)
        except TemplateError as error:
            return error
        if self.options.train_on_prompt:
            whole = [(0, len(rendered.text))]
            return Rendered(rendered.text, whole, rendered.needs_eos)
        return rendered


@dataclass
class TokenizedData:
    """Rows ready for training, and what was done to them.

    Attributes:
        rows: those with at least one trained token.
        num_cut: rows longer than ``data.seq_len`` that were cut.
        num_too_long: rows longer than that which were left out (``data.truncation: drop``).
        num_untrained: rows without a trained token, left out.
    """

    rows: list[Row] = field(default_factory=list)
    num_cut: int = 0
    num_too_long: int = 0
    num_untrained: int = 0

    def digest(self) -> str:
        """Returns a hash of all rows, to compare over ranks."""
        rows = hashlib.sha256()
        for row in self.rows:
            rows.update(len(row.input_ids).to_bytes(8, "little"))
            rows.update(row.input_ids.tobytes())
            rows.update(row.loss_mask.tobytes())
        return rows.hexdigest()

    def add(self, row: Row, options: DataOptions, number: int) -> None:
        """Takes the row of that number, cut to ``data.seq_len`` by the recipe's policy.

        Raises:
            RecipeError: it is longer, and the policy is ``error``.
        """
        length = len(row.input_ids)
        if length > options.seq_len:
            if options.truncation == "error":
                message = f"row {number} has {length} tokens, `data.seq_len` is {options.seq_len}"
                raise _unusable(message, "raise data.seq_len, or choose another data.truncation")
            if options.truncation == "drop":
                self.num_too_long += 1
                return
            self.num_cut += 1
            row = _cut(row, options.seq_len, from_start=options.truncation == "truncate_start")
        if row.num_trained:
            self.rows.append(row)
        else:
            self.num_untrained += 1


def tokenize_rows(
    rows: Iterable[Mapping[str, Any]], tokenizer: PreTrainedTokenizerBase, options: DataOptions
) -> TokenizedData:
    """Renders and tokenizes rows of the recipe's format.

    Raises:
        RecipeError: the tokenizer has no offsets or no end-of-text token, a row cannot be rendered,
            or no token of any row carries loss.
    """
    template = choose_template(tokenizer, options.chat_template)
    row_tokenizer = RowTokenizer(tokenizer, options, options.format, template=template)
    data = TokenizedData()
    number = 0
    for batch in _batches(iter(rows)):
        for row in row_tokenizer.tokenize(batch):
            number += 1
            if isinstance(row, TemplateError):
                raise _unusable(f"row {number}: {row}", TEMPLATE_HINT)
            data.add(row, options, number)
    if not data.rows:
        raise _unusable(
            f"none of the {number} rows has a token that carries loss",
            "look for missing answers, or raise data.seq_len",
        )
    return data


def make_dummy_rows(tokenizer: PreTrainedTokenizerBase, options: DataOptions) -> TokenizedData:
    """Returns random rows of exactly ``data.seq_len`` tokens that all carry loss."""
    generator = random.Random(0)  # noqa: S311 - no secret, the same rows on every rank
    vocabulary = range(tokenizer.vocab_size)
    loss_mask = np.ones(options.seq_len, dtype=np.uint8)
    loss_mask[0] = 0
    count = options.max_rows or DUMMY_ROWS
    drawn = (generator.choices(vocabulary, k=options.seq_len) for _ in range(count))
    ids = (np.array(row, dtype=np.int32) for row in drawn)
    return TokenizedData([Row(row, loss_mask) for row in ids])


def check_tokenizer(tokenizer: PreTrainedTokenizerBase, template: ChatTemplate | None) -> None:
    """Raises `RecipeError` where the tokenizer cannot give what exact masks need."""
    if not tokenizer.is_fast:
        raise _unusable("the tokenizer gives no character offsets", "use a fast tokenizer")
    if tokenizer.eos_token_id is None and template is None:
        message = "the tokenizer has no end-of-text token: the model would not learn to stop"
        raise _unusable(message, "set `eos_token` in its tokenizer_config.json")


def tokenize_rendered(
    rendered: Sequence[Rendered], tokenizer: PreTrainedTokenizerBase, *, by_template: bool
) -> Iterator[Row]:
    """Yields the rows of a batch of texts, each tokenized once, as a whole."""
    if not rendered:
        return
    encoded: Any = tokenizer(
        [item.text for item in rendered],
        add_special_tokens=not by_template,
        return_attention_mask=False,
        return_offsets_mapping=True,
        return_special_tokens_mask=True,
        verbose=False,
    )
    columns = ("input_ids", "offset_mapping", "special_tokens_mask")
    for item, ids, offsets, added in zip(rendered, *(encoded[c] for c in columns), strict=True):
        yield _build_row(item, ids, offsets, added, tokenizer.eos_token_id)


def prompt_ids(tokenizer: PreTrainedTokenizerBase, prompt: str, format_name: str) -> list[int]:
    """Returns the token ids of a user's prompt as training renders it, ready for an answer.

    Raises:
        RecipeError: the chat template refuses a conversation of one user message.
    """
    try:
        template = choose_template(tokenizer, None)
        text = render_prompt(prompt, format_name, tokenizer, template)
    except TemplateError as error:
        raise _unusable(f"the prompt `{prompt}`: {error}", "use another model") from error
    by_template = is_templated(template, format_name)
    encoded: Any = tokenizer(text, add_special_tokens=not by_template)
    ids = list(encoded["input_ids"])
    return ids[:-1] if ids and not by_template and ids[-1] == tokenizer.eos_token_id else ids


def _batches(rows: Iterator[Mapping[str, Any]]) -> Iterator[list[Mapping[str, Any]]]:
    while batch := list(itertools.islice(rows, BATCH_ROWS)):
        yield batch


def _build_row(
    item: Rendered,
    ids: list[int],
    offsets: list[tuple[int, int]],
    added: list[int],
    eos_id: Any,
) -> Row:
    mask = loss_mask(np.array(offsets).reshape(-1, 2), np.array(added, dtype=bool), item.spans)
    if item.needs_eos:
        if not (ids and added[-1] and ids[-1] == eos_id):  # some tokenizers add it by themselves
            ids, mask = [*ids, eos_id], np.append(mask, True)
        mask[-1] = True
    mask[:1] = False
    return Row(np.array(ids, dtype=np.int32), mask.astype(np.uint8))


def loss_mask(
    offsets: npt.NDArray[np.int64], added: npt.NDArray[np.bool_], spans: list[tuple[int, int]]
) -> npt.NDArray[np.bool_]:
    """Returns which tokens lie wholly inside one of ``spans``, ``(tokens,)``.

    Args:
        offsets: first character and end of every token, ``(tokens, 2)``.
        added: tokens that stand for no character, ``(tokens,)``.
        spans: ranges of characters, end exclusive.
    """
    starts, ends = offsets[:, 0].copy(), offsets[:, 1]
    # Byte-level tokenizers with `trim_offsets` report a token of spaces as empty, at its end.
    trimmed = np.flatnonzero((starts == ends) & ~added)
    trimmed = trimmed[trimmed > 0]
    starts[trimmed] = ends[trimmed - 1]
    mask = np.zeros(len(offsets), dtype=bool)
    for low, high in spans:
        mask |= (starts >= low) & (ends <= high)
    return mask & (starts < ends) & ~added


def _cut(row: Row, seq_len: int, *, from_start: bool) -> Row:
    kept = slice(-seq_len, None) if from_start else slice(seq_len)
    mask = row.loss_mask[kept].copy()
    mask[0] = 0
    return Row(row.input_ids[kept].copy(), mask)


def _unusable(message: str, hint: str) -> FsdpqError:
    return RecipeError([Problem(message, "data", None, hint)])
