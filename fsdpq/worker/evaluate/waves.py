"""Questions of rank 0, answered by all ranks in step.

lm-evaluation-harness runs on rank 0 alone: tasks, prompts and metrics exist once, and ranks cannot
disagree about them. The other ranks wait for waves of inputs, compute their share of each, and give
the results back. Every rank runs the model as often as any other, a rank without a share on one
token: FSDP gathers the weights for all ranks at once.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as torch_dist

from fsdpq import dist

HOST = torch.device("cpu")

Answer = Callable[[Sequence[Any], Mapping[str, Any]], list[Any]]
"""Computes this rank's share of a wave, maybe none of it; all ranks call it. Collective."""


class Waves:
    """Deals questions to the ranks.

    Args:
        answers: how each sort of question is answered, the same on all ranks.
        batch_size: questions that one rank answers at once.
        on_wave: told on rank 0 how many questions a wave had.
    """

    def __init__(
        self,
        answers: Mapping[str, Answer],
        *,
        batch_size: int,
        on_wave: Callable[[int], None] = lambda _count: None,
    ) -> None:
        self._answers = answers
        self._batch_size = batch_size
        self._on_wave = on_wave
        self._in_step = True

    def ask(
        self, sort: str, questions: Sequence[Any], options: Mapping[str, Any] | None = None
    ) -> list[Any]:
        """Returns the answers in the order of the questions.

        Ranks: 0 only, while the others `serve`.

        Args:
            sort: a key of ``answers``.
            questions: of like size beside each other, so that no rank waits.
            options: for all of them.
        """
        size = self._batch_size * dist.world_size()
        found: list[Any] = []
        for start in range(0, len(questions), size):
            wave = list(questions[start : start + size])
            message = (sort, wave, dict(options or {}))
            self._broadcast(message)
            shares = self._compute(message)
            found += [shares[i % len(shares)][i // len(shares)] for i in range(len(wave))]
            self._on_wave(len(wave))
        return found

    def serve(self) -> None:
        """Computes this rank's shares until rank 0 dismisses it.

        Ranks: all but 0.
        """
        while (message := self._broadcast(None)) is not None:
            self._compute(message)

    def dismiss(self) -> None:
        """Ends `serve` on the other ranks; nothing where they are not in step any more.

        Ranks: 0 only.
        """
        if self._in_step:
            self._broadcast(None)

    def _broadcast(self, message: Any) -> Any:
        if dist.world_size() == 1:
            return message
        held = [message]
        torch_dist.broadcast_object_list(held, src=0, device=HOST)
        return held[0]

    def _compute(self, message: Any) -> list[list[Any]]:
        """Returns the answers of every rank on rank 0, nothing elsewhere."""
        sort, wave, options = message
        self._in_step = False  # an error in here leaves the others in the middle of a collective
        mine = self._answers[sort](wave[dist.rank() :: dist.world_size()], options)
        shares: list[Any] | None = [mine]
        if dist.world_size() > 1:
            shares = [None] * dist.world_size() if dist.rank() == 0 else None
            torch_dist.gather_object(mine, shares, dst=0)
        self._in_step = True
        return shares or []
