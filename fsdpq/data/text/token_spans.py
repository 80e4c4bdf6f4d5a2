"""Which tokens lie in ranges of characters, by the tokenizer's own offsets.

The ranges are few and the tokens many, so the tokenizer is asked about the ends of ranges, and no
list of all offsets is made. A tokenizer that reports tokens as empty (``trim_offsets`` leaves white
space out) is asked for all of them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from tokenizers import Encoding

from fsdpq.data.templates.jinja_text import Span

MAX_STEPS = 64
"""Characters without a token (white space) that are stepped over before all offsets are read."""

TokenMask = npt.NDArray[np.uint8]


def mask_tokens(
    encoding: Encoding, trained: Sequence[Span], untrained: Sequence[Span]
) -> TokenMask:
    """Returns which tokens carry loss, ``(tokens,)``, uint8.

    Args:
        encoding: of the whole text.
        trained: ranges of characters, end exclusive: tokens wholly inside carry loss.
        untrained: ranges of which no token that touches them does.
    """
    mask = np.zeros(len(encoding), dtype=np.uint8)
    for spans, find, value in ((trained, _inside, 1), (untrained, _touching, 0)):
        for low, high in spans:
            if low < high:
                found = find(encoding, low, high)
                if found is None:
                    return mask_by_offsets(encoding, trained, untrained)
                mask[found[0] : found[1]] = value
    return mask


def mask_by_offsets(
    encoding: Encoding, trained: Sequence[Span], untrained: Sequence[Span]
) -> TokenMask:
    """Returns the same as `mask_tokens` from the offsets of all tokens, trimmed ones mended."""
    offsets: npt.NDArray[np.int64] = np.array(encoding.offsets, dtype=np.int64).reshape(-1, 2)
    added = np.array(encoding.special_tokens_mask, dtype=bool)
    starts, ends = offsets[:, 0].copy(), offsets[:, 1]
    # Byte-level tokenizers with `trim_offsets` report a token of spaces as empty, at its end.
    trimmed = np.flatnonzero((starts == ends) & ~added)
    trimmed = trimmed[trimmed > 0]
    starts[trimmed] = ends[trimmed - 1]
    is_text = (starts < ends) & ~added
    mask = np.zeros(len(offsets), dtype=np.uint8)
    for low, high in trained:
        _fill(mask, is_text & (starts >= low) & (ends <= high), 1)
    for low, high in untrained:
        if low < high:
            _fill(mask, is_text & (starts < high) & (ends > low), 0)
    mask[added] = 0
    return mask


def reports_all_tokens(encode: Callable[[str], Encoding]) -> bool:
    """Returns whether a tokenizer gives every token of a text its characters."""
    encoding = encode("a   b\n\n  c\td ")
    added: list[int] = encoding.special_tokens_mask
    pairs = zip(encoding.offsets, added, strict=True)
    return all(start < end for (start, end), is_added in pairs if not is_added)


def _fill(mask: TokenMask, chosen: npt.NDArray[np.bool_], value: int) -> None:
    """Sets the tokens from the first to the last chosen one: empty ones between belong to them."""
    found = np.flatnonzero(chosen)
    if len(found):
        mask[found[0] : found[-1] + 1] = value


def _inside(encoding: Encoding, low: int, high: int) -> Span | None:
    """Returns the tokens wholly inside a range, None where that needs a look at all offsets."""
    ends = _touching(encoding, low, high)
    if ends is None:
        return None
    first, end = ends
    while first < end and _chars(encoding, first)[0] < low:
        first += 1
    while first < end and _chars(encoding, end - 1)[1] > high:
        end -= 1
    return first, end


def _touching(encoding: Encoding, low: int, high: int) -> Span | None:
    """Returns the tokens that share a character with a range, None as `_inside` does."""
    first = _step(encoding, range(low, min(high, low + MAX_STEPS)))
    last = _step(encoding, range(high - 1, max(low, high - MAX_STEPS) - 1, -1))
    if first is None or last is None:
        return None if high - low > MAX_STEPS else (0, 0)
    # Several tokens may be parts of one character; the first of them was found.
    while last + 1 < len(encoding):
        start, end = _chars(encoding, last + 1)
        if not (start < high and start < end):
            break
        last += 1
    return first, last + 1


def _step(encoding: Encoding, positions: range) -> int | None:
    for position in positions:
        token = encoding.char_to_token(position)
        if token is not None:
            return token
    return None


def _chars(encoding: Encoding, token: int) -> Span:
    found: Any = encoding.token_to_chars(token)
    return (0, 0) if found is None else (found[0], found[1])
