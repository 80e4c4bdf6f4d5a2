"""Text of tokens that come one by one, as far as it is certain.

A character may take several tokens, and what a token means at the beginning of a text may differ
from what it means behind another (sentencepiece's space). So a token is decoded behind the ones
that the last piece came from, and held back while the text ends in an unfinished character.
"""

from __future__ import annotations

from transformers import PreTrainedTokenizerBase

UNFINISHED = "\N{REPLACEMENT CHARACTER}"
MAX_HELD = 16
"""So many tokens are held back at most: a character takes four bytes, a broken text forever."""


class TokenTexts:
    """Decodes the tokens of one answer as they come.

    White space at the beginning is left out, and that at the end, so that the pieces together are
    the stripped answer; special tokens are left out.

    Args:
        tokenizer: of the model.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        self._ids: list[int] = []
        self._num_before = 0
        self._num_given = 0
        self._held = ""
        self.text = ""
        """All that was given so far."""

    def add(self, token: int) -> str:
        """Returns the text that is certain with this token, often a word, may be empty."""
        self._ids.append(token)
        new = self._decode_new()
        is_unfinished = new.endswith(UNFINISHED)
        if not new or (is_unfinished and len(self._ids) - self._num_given < MAX_HELD):
            return ""
        return self._give(new)

    def finish(self) -> str:
        """Returns what was held back, once no more tokens come; white space is not text."""
        new = self._decode_new()
        return self._give(new) if new else ""

    def _decode_new(self) -> str:
        before = self._decode(self._ids[self._num_before : self._num_given])
        return self._decode(self._ids[self._num_before :])[len(before) :]

    def _decode(self, ids: list[int]) -> str:
        # Cleaning up spaces would change text that was given already.
        return str(
            self._tokenizer.decode(
                ids, skip_special_tokens=True, clean_up_tokenization_spaces=False
            )
        )

    def _give(self, new: str) -> str:
        self._num_before, self._num_given = self._num_given, len(self._ids)
        piece = self._held + new if self.text else (self._held + new).lstrip()
        kept = piece.rstrip()
        self._held = piece[len(kept) :]
        self.text += kept
        return kept
