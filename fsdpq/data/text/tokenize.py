"""Tokenizes rendered rows, with loss masks that are exact.

The mask comes from character positions: `fsdpq.data.text.render` says which characters carry loss,
the tokenizer's offsets say which tokens lie wholly inside. Nothing is tokenized twice, so a token
that merges across a boundary cannot shift the mask; it begins in the prompt and carries no loss. No
mask is made from token ids: an end-of-text token inside a row carries loss like any other.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from tokenizers import Encoding, Tokenizer
from transformers import PreTrainedTokenizerBase

from fsdpq.data.templates.jinja_text import ChatTemplate, Message, TemplateError
from fsdpq.data.text.render import UNTEMPLATED, Rendered, RowRenderer
from fsdpq.data.text.token_spans import mask_by_offsets, mask_tokens, reports_all_tokens
from fsdpq.errors import FsdpqError, Problem, RecipeError
from fsdpq.recipe.sections.data import DataOptions
from fsdpq.rows.formats import DUMMY_ROWS

TEMPLATE_HINT = "change the row, set `data.train_on_prompt: true`, or use another model"


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


def cut_row(row: Row, seq_len: int, *, from_start: bool) -> Row:
    """Returns the first ``seq_len`` tokens of one document, or the last ones (``from_start``)."""
    kept = slice(-seq_len, None) if from_start else slice(seq_len)
    mask = row.loss_mask[kept].copy()
    mask[0] = 0
    return Row(row.input_ids[kept], mask)


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
        template = None if format_name in UNTEMPLATED else template
        check_tokenizer(tokenizer, template, format_name)
        self.tokenizer = tokenizer
        self.options = options
        self.format_name = format_name
        self.renderer = RowRenderer(tokenizer, options, format_name, template)
        self.eos_id: int | None = tokenizer.eos_token_id  # pyright: ignore[reportAttributeAccessIssue]
        self.adds_special_tokens = template is None and format_name != "input_output"
        backend: Any = tokenizer.backend_tokenizer  # pyright: ignore[reportAttributeAccessIssue]
        # A tokenizer.json may ask for truncation and padding; rows are whole here.
        backend.no_truncation()
        backend.no_padding()
        self.backend: Tokenizer = backend
        self._mask = mask_tokens if reports_all_tokens(backend.encode) else mask_by_offsets

    def tokenize(self, rows: Sequence[Mapping[str, Any]]) -> list[Row | TemplateError]:
        """Returns for every row its tokens, or why it cannot be rendered; order is kept.

        A row may be longer than ``data.seq_len`` and may have no trained token.
        """
        rendered = [self._render(row) for row in rows]
        texts = [item.text for item in rendered if isinstance(item, Rendered)]
        # Each text is tokenized once, as a whole.
        encodings = iter(
            self.backend.encode_batch(texts, add_special_tokens=self.adds_special_tokens)
        )
        return [
            item if isinstance(item, TemplateError) else self._build_row(item, next(encodings))
            for item in rendered
        ]

    def prompt_ids(self, prompt: str) -> list[int]:
        """Returns the token ids of a user's prompt as rows ask, ready for an answer.

        Raises:
            RecipeError: the chat template refuses a conversation of one user message.
        """
        try:
            return self.message_ids([{"role": "user", "content": prompt}])
        except TemplateError as error:
            hint = "use another model or `data.chat_template`"
            raise _unusable(f"the prompt `{prompt}`: {error}", hint) from error

    def message_ids(self, messages: Sequence[Message]) -> list[int]:
        """Returns the token ids of a conversation as rows ask, ready for an answer.

        Raises:
            TemplateError: see `RowRenderer.render_messages`.
        """
        text = self.renderer.render_messages(messages)
        encoding = self.backend.encode(text, add_special_tokens=self.adds_special_tokens)
        ids = list(encoding.ids)
        ends_itself = bool(ids) and self._adds_eos(encoding)
        return ids[:-1] if ends_itself else ids

    def end_ids(self) -> set[int]:
        """Returns the tokens that end an answer: end of text, and the template's end mark."""
        found = set() if self.eos_id is None else {self.eos_id}
        mark = (self.renderer.chat.marks.of_answers() or "").strip() if self.renderer.chat else ""
        ids = self.backend.encode(mark, add_special_tokens=False).ids if mark else []
        return found | set(ids) if len(ids) == 1 else found

    def _render(self, row: Mapping[str, Any]) -> Rendered | TemplateError:
        try:
            return self.renderer.render(row)
        except TemplateError as error:
            return error

    def _build_row(self, item: Rendered, encoding: Encoding) -> Row:
        ids = np.array(encoding.ids, dtype=np.int32)
        mask = self._mask(encoding, item.trained, item.untrained)
        if self._adds_eos(encoding):
            # Some tokenizers end every text; one end is enough.
            is_second = len(ids) > 1 and ids[-2] == self.eos_id
            if is_second or not item.adds_eos:
                ids, mask = ids[:-1], mask[:-1]
            else:
                mask[-1] = item.trains_eos
        elif item.adds_eos and (len(ids) == 0 or ids[-1] != self.eos_id):
            ids, mask = np.append(ids, np.int32(self.eos_id or 0)), np.append(mask, item.trains_eos)
        mask[:1] = 0
        return Row(ids, mask)

    def _adds_eos(self, encoding: Encoding) -> bool:
        if not self.adds_special_tokens or self.eos_id is None or len(encoding) == 0:
            return False
        return encoding.ids[-1] == self.eos_id and bool(encoding.special_tokens_mask[-1])


def make_dummy_rows(tokenizer: PreTrainedTokenizerBase, options: DataOptions) -> list[Row]:
    """Returns random rows of exactly ``data.seq_len`` tokens that all carry loss."""
    generator = random.Random(0)  # noqa: S311 - no secret, the same rows on every rank
    vocabulary = range(tokenizer.vocab_size)
    loss_mask = np.ones(options.seq_len, dtype=np.uint8)
    loss_mask[0] = 0
    count = options.max_rows or DUMMY_ROWS
    drawn = (generator.choices(vocabulary, k=options.seq_len) for _ in range(count))
    ids = (np.array(row, dtype=np.int32) for row in drawn)
    return [Row(row, loss_mask) for row in ids]


def digest_rows(rows: Iterable[Row]) -> str:
    """Returns a hash of rows, to compare over ranks."""
    digest = hashlib.sha256()
    for row in rows:
        digest.update(len(row.input_ids).to_bytes(8, "little"))
        digest.update(row.input_ids.tobytes())
        digest.update(row.loss_mask.tobytes())
    return digest.hexdigest()


def check_tokenizer(
    tokenizer: PreTrainedTokenizerBase, template: ChatTemplate | None, format_name: str
) -> None:
    """Raises `RecipeError` where the tokenizer cannot give what exact masks need."""
    if not tokenizer.is_fast:
        raise _unusable("the tokenizer gives no character offsets", "use a fast tokenizer")
    if tokenizer.eos_token_id is None and template is None and format_name != "input_output":
        message = "the tokenizer has no end-of-text token: the model would not learn to stop"
        raise _unusable(message, "set `eos_token` in its tokenizer_config.json")


def _unusable(message: str, hint: str) -> FsdpqError:
    return RecipeError([Problem(message, "data", None, hint)])
