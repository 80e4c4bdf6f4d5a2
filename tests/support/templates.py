"""Byte-level tokenizers that know a template's marks: a token is a byte or a mark."""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from fsdpq.data.templates.jinja_text import ChatTemplate
from fsdpq.data.text.tokenize import Row

_MARKS = re.compile(r"<[|\uff5c]?[A-Za-z_\u2581 ]{1,36}[|\uff5c]?>|\[/?[A-Z_]+\]")


def build_byte_tokenizer(*sources: str) -> PreTrainedTokenizerBase:
    """Returns a tokenizer whose special tokens are the marks in the templates."""
    marks = sorted({mark for source in sources for mark in _MARKS.findall(source)})
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    letters = {letter: index for index, letter in enumerate(alphabet)}
    tokenizer = Tokenizer(models.BPE(vocab=letters, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<bos>", "<eos>", *marks])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<bos>", eos_token="<eos>")
    fast.chat_template = sources[0] if sources else None
    return fast


def as_template(source: str) -> ChatTemplate:
    """Returns a template for `build_byte_tokenizer`'s tokenizers."""
    tokens = {"bos_token": "<bos>", "eos_token": "<eos>"}
    return ChatTemplate("a test's", source, special_tokens=tokens)


def trained_pieces(row: Row, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Returns the texts of the row's stretches of trained tokens."""
    pairs = zip(row.input_ids.tolist(), row.loss_mask.tolist(), strict=True)
    groups = itertools.groupby(pairs, key=lambda pair: pair[1])
    return [_decode([i for i, _ in group], tokenizer) for trained, group in groups if trained]


def untrained_text(ids: Sequence[int], tokenizer: PreTrainedTokenizerBase) -> str:
    """Returns the text of some token ids, special ones included."""
    return _decode(list(ids), tokenizer)


def _decode(ids: list[int], tokenizer: PreTrainedTokenizerBase) -> str:
    return str(tokenizer.decode(ids, skip_special_tokens=False))
