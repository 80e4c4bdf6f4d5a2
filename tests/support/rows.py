"""Tokenizes rows in this process, as the preparation of a run does it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from fsdpq.data.preparing.prepared import PreparedRows, RowIndex
from fsdpq.data.preparing.row_chunks import ChunkTokenizer, TokenizedChunk
from fsdpq.data.templates.choose import choose_template
from fsdpq.data.text.tokenize import Row, RowTokenizer
from fsdpq.recipe.sections.data import DataOptions


@dataclass(frozen=True)
class TokenizedRows:
    """What became of rows.

    Attributes:
        rows: those that can be trained on.
        chunk: the counts, and what is wrong with the others.
    """

    rows: list[Row]
    chunk: TokenizedChunk


def tokenize_rows(
    rows: Sequence[Mapping[str, Any]], tokenizer: PreTrainedTokenizerBase, options: DataOptions
) -> TokenizedRows:
    """Renders, tokenizes and cuts rows of the recipe's format."""
    template = choose_template(tokenizer, options.chat_template)
    row_tokenizer = RowTokenizer(tokenizer, options, options.format, template=template)
    chunk = ChunkTokenizer([row_tokenizer], options)((0, rows))
    index = RowIndex.of_documents(np.arange(len(chunk.kept)))
    documents = PreparedRows(chunk.documents, index, packed=False)
    return TokenizedRows([documents[place] for place in range(len(documents))], chunk)
