"""Keys and values of the last conversation: the next one computes only what differs.

A prompt is always the whole conversation, rendered anew. Where its tokens begin as those that were
computed last, their keys and values are used again; so the answer is that of a fresh start, up to
rounding, whatever was taken back or changed in between.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from contextlib import contextmanager

from transformers import PreTrainedConfig
from transformers.cache_utils import (
    Cache,
    DynamicCache,
    DynamicLayer,
    DynamicSlidingWindowLayer,
)


class PrefixCache:
    """The key-value cache of one conversation at a time.

    Layers with a state that only goes forward (linear attention) start over each time, and windows
    that have left tokens behind start over where tokens are taken back.

    Args:
        config: of the model.
    """

    def __init__(self, config: PreTrainedConfig) -> None:
        self._config = config
        self._ids: list[int] = []
        self.cache: Cache = DynamicCache(config=config)

    def begin(self, ids: Sequence[int]) -> int:
        """Makes the cache that of the longest known beginning of ``ids``.

        Returns:
            How many tokens that are, fewer than there are ``ids``: one at least is computed.
        """
        known = 0
        for old, new in zip(self._ids, ids[:-1], strict=False):
            if old != new:
                break
            known += 1
        surplus = len(self._ids) - known
        if known == 0 or not self._can_go_on() or (surplus and not self._can_forget()):
            self.clear()
            return 0
        if surplus:
            self.cache.crop(-surplus)
        self._ids = list(ids[:known])
        return known

    @contextmanager
    def filled_by(self, ids: Sequence[int], chosen: Sequence[int]) -> Generator[None, None, None]:
        """Notes what the cache holds once an answer is given in the block; all is lost if it fails.

        Args:
            ids: the conversation.
            chosen: tokens of the answer, as they come; the last one is never computed.
        """
        try:
            yield
        except BaseException:
            self.clear()  # nobody knows which layers hold the last token
            raise
        self._ids = [*ids, *chosen[:-1]]

    def clear(self) -> None:
        """Forgets everything."""
        self._ids = []
        self.cache = DynamicCache(config=self._config)

    def _can_go_on(self) -> bool:
        kinds = (DynamicLayer, DynamicSlidingWindowLayer)
        return all(type(layer) in kinds for layer in self.cache.layers)

    def _can_forget(self) -> bool:
        return all(
            layer.get_seq_length() < layer.sliding_window
            for layer in self.cache.layers
            if isinstance(layer, DynamicSlidingWindowLayer)
        )
