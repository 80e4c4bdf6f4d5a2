"""The loss over a whole text, cut into windows as the perplexity guide of transformers cuts it.

Windows of ``seq_len`` tokens begin ``stride`` tokens apart; each scores the tokens that no window
before it has scored, and sees what comes before them as context. With a stride of ``seq_len`` the
windows do not overlap: fastest, and the first token of each has no context and is not scored.

https://huggingface.co/docs/transformers/perplexity
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt
from transformers import PreTrainedTokenizerBase

from fsdpq.data.text.tokenize import Row
from fsdpq.errors import Problem, RecipeError
from fsdpq.rows.files.lines import BOM, check_is_text, open_bytes
from fsdpq.rows.read import read_rows
from fsdpq.rows.source import RowSource

PARAGRAPH = "\n\n"
"""Between the texts of rows, as in the guide."""


def read_whole_text(source: RowSource) -> str:
    """Returns the text of a source: files of text as they are, other rows joined by `PARAGRAPH`.

    Raises:
        RecipeError: a file is not UTF-8, or no text.
    """
    if all(is_plain_text(file.path) for file in source.files):
        return PARAGRAPH.join(_read_file(file.path) for file in source.files)
    return PARAGRAPH.join(str(row.content["text"]) for row in read_rows(source))


def is_plain_text(path: Path) -> bool:
    """Whether ``path`` is a file of text by its ending, compressed or not."""
    return ".txt" in path.suffixes[-2:]


def _read_file(path: Path) -> str:
    with open_bytes(path) as file:
        content = file.read()
    check_is_text(content)
    try:
        return content.removeprefix(BOM).decode()
    except UnicodeDecodeError as error:
        message = f"{path} is not UTF-8 at byte {error.start}"
        hint = "convert it: `iconv -f LATIN1 -t UTF-8`"
        raise RecipeError([Problem(message, "data.path", None, hint)]) from None


def cut_windows(
    text: str, tokenizer: PreTrainedTokenizerBase, *, seq_len: int, stride: int
) -> list[Row]:
    """Returns the windows of a text as rows; its tokens are those of the tokenizer's own call.

    Args:
        text: all of it.
        tokenizer: of the base model.
        seq_len: longest window in tokens.
        stride: from the begin of a window to that of the next, 1 to ``seq_len``.

    Raises:
        RecipeError: it has fewer than two tokens.
    """
    ids = np.asarray(tokenizer(text, verbose=False)["input_ids"], dtype=np.int32)
    if len(ids) < 2:
        message = f"the text has {len(ids)} tokens: there is none to predict from another"
        raise RecipeError([Problem(message, "data.path", None, "name a longer text")])
    return list(_cut(ids, seq_len, stride))


def _cut(ids: npt.NDArray[np.int32], seq_len: int, stride: int) -> Iterator[Row]:
    scored = 0
    for begin in range(0, len(ids), stride):
        end = min(begin + seq_len, len(ids))
        mask = np.ones(end - begin, dtype=np.uint8)
        mask[: max(1, scored - begin)] = 0
        if mask.any():
            yield Row(ids[begin:end], mask)
        scored = end
        if end == len(ids):
            return
