"""Rows as the model reads them: stretches of text, trained or not, and tables of tokens."""

from __future__ import annotations

import random
from typing import Any, Generic, TypeVar

import numpy as np

from fsdpq.data.text.tokenize import Row

Item = TypeVar("Item")

MAX_TOKENS = 4000
"""Tokens of a sample that are decoded; the rest is counted."""

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"


class Reservoir(Generic[Item]):
    """Draws ``size`` items of a stream of unknown length, each with the same chance.

    The draw depends on the seed and the number of items only.
    """

    def __init__(self, size: int, seed: int) -> None:
        self.size = size
        self._random = random.Random(seed)  # noqa: S311 - no secret
        self._drawn: list[tuple[int, Item]] = []
        self._seen = 0

    def place(self) -> int | None:
        """Returns where the next item of the stream is to go, None where it is not drawn."""
        self._seen += 1
        if self._seen <= self.size:
            return self._seen - 1
        place = self._random.randrange(self._seen)
        return place if place < self.size else None

    def put(self, place: int, item: Item) -> None:
        """Keeps the item that `place` was asked for."""
        entry = (self._seen, item)
        if place < len(self._drawn):
            self._drawn[place] = entry
        else:
            self._drawn.append(entry)

    @property
    def items(self) -> list[Item]:
        """What was drawn, in the order of the stream."""
        return [item for _, item in sorted(self._drawn, key=lambda entry: entry[0])]


def segments(row: Row, tokenizer: Any) -> list[dict[str, Any]]:
    """Returns the text of a row in stretches of ``text``, ``trained`` and ``special``.

    A special token is a stretch by itself. Every stretch is decoded together with what is before
    it, because a tokenizer may drop the space of a first token; a character whose bytes lie on both
    sides of a border belongs to the later one.
    """
    ids = np.asarray(row.input_ids)[:MAX_TOKENS].tolist()
    mask = np.asarray(row.loss_mask)[:MAX_TOKENS].astype(bool).tolist()
    special = special_tokens(tokenizer)
    found: list[dict[str, Any]] = []
    shown, start, length = "", 0, len(ids)
    while start < length:
        is_special = ids[start] in special
        end = start + 1
        while (
            not is_special and end < length and mask[end] == mask[start] and ids[end] not in special
        ):
            end += 1
        whole = _decode(ids[:end], tokenizer)
        if end < length:
            whole = whole.rstrip(REPLACEMENT)
        text = (
            whole[len(shown) :] if whole.startswith(shown) else _decode(ids[start:end], tokenizer)
        )
        shown = whole if whole.startswith(shown) else shown + text
        found.append({"text": text, "trained": mask[start], "special": is_special})
        start = end
    return found


def token_table(row: Row, tokenizer: Any) -> list[dict[str, Any]]:
    """Returns the row's tokens, one entry each.

    ``position``, ``id``, ``token`` (as the vocabulary has it), ``text`` (decoded alone), and if
    predicting it is ``trained``, and if it is ``special``.
    """
    ids = np.asarray(row.input_ids)[:MAX_TOKENS].tolist()
    names = tokenizer.convert_ids_to_tokens(ids)
    trained = np.asarray(row.loss_mask).astype(bool).tolist()
    special = special_tokens(tokenizer)
    return [
        {
            "position": position,
            "id": token_id,
            "token": name,
            "text": _decode([token_id], tokenizer),
            "trained": is_trained,
            "special": token_id in special,
        }
        for position, (token_id, name, is_trained) in enumerate(
            zip(ids, names, trained, strict=False)
        )
    ]


def special_tokens(tokenizer: Any) -> dict[int, str]:
    """Returns the special tokens by their ids, those too that have no name in the tokenizer."""
    named = zip(tokenizer.all_special_ids, tokenizer.all_special_tokens, strict=True)
    added = tokenizer.added_tokens_decoder.items()
    return dict(named) | {index: token.content for index, token in added if token.special}


def _decode(ids: list[int], tokenizer: Any) -> str:
    return str(tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))
