"""Scaling of the loss for fp16, whose smallest numbers would swallow gradients.

The rule is ``torch.amp.GradScaler``'s. The difference: whether a gradient is infinite is read from
the global gradient norm, which all ranks have anyway, so ranks cannot disagree about a step, and
unscaling and clipping are one multiplication.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fsdpq.errors import TrainingError

INITIAL_SCALE = 2.0**16
GROWTH_INTERVAL = 2000
"""Steps without an infinite gradient after which the scale doubles."""


@dataclass
class LossScaler:
    """The factor on the loss, and when it changes.

    Attributes:
        scale: the factor.
        num_good: steps since the scale last changed.
        num_skipped: steps that were skipped.
    """

    scale: float = INITIAL_SCALE
    growth_interval: int = GROWTH_INTERVAL
    num_good: int = 0
    num_skipped: int = 0

    def take(self, grad_norm: Tensor) -> bool:
        """Adjusts the scale to a step; returns whether the weights may be updated.

        Waits for the device.

        Args:
            grad_norm: global norm of the gradients, the same on all ranks.

        Raises:
            TrainingError: gradients are not finite even without a scale.
        """
        if bool(torch.isfinite(grad_norm)):
            self.num_good += 1
            if self.num_good == self.growth_interval:
                self.scale, self.num_good = self.scale * 2.0, 0
            return True
        if self.scale <= 1.0:
            raise TrainingError(
                "the gradients are not finite, even with the loss unscaled",
                hint="lower optimizer.lr, or compute in bf16 or fp32: fsdp.precision=bf16_autocast",
            )
        self.scale, self.num_good = self.scale / 2.0, 0
        self.num_skipped += 1
        return False
