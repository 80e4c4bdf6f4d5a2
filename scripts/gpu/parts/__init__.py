"""What is measured: each module has functions that take `Bench` and write rows."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from fsdpq.worker.bench.shapes import SHAPES, Shape
from scripts.gpu.rows import Rows


@dataclass(frozen=True)
class Bench:
    """What a part works with.

    Attributes:
        rows: takes what is measured.
        device: where.
        tiny: shrink shapes and lengths: the numbers mean nothing, the code is the same.
    """

    rows: Rows
    device: torch.device
    tiny: bool

    def shape(self, name: str) -> Shape:
        """Returns a shape of `SHAPES`, the tiny one where that is asked for."""
        return SHAPES["tiny" if self.tiny else name]

    def tokens(self, tokens: int) -> int:
        """Returns ``tokens``, a sixteenth of them where tiny is asked for."""
        return tokens // 16 if self.tiny else tokens
