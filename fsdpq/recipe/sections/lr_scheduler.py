"""``lr_scheduler``: how the learning rate moves."""

from __future__ import annotations

import math
from typing import Annotated, Literal

from pydantic import Field

from fsdpq.recipe.options import Options


class ConstantScheduleOptions(Options):
    """The learning rate stays at ``optimizer.lr`` after the warmup."""

    kind: Literal["constant"]
    """Selects this schedule."""

    warmup_steps: int | None = Field(default=None, ge=0)
    """Steps of linear increase; the first of them has ``1 / (warmup_steps + 1)`` of the peak."""

    warmup_ratio: float | None = Field(default=None, ge=0.0, lt=1.0)
    """The same as a share of all steps, rounded up."""

    def num_warmup_steps(self, total_steps: int) -> int:
        """Returns the steps of warmup in a run of ``total_steps``."""
        if self.warmup_ratio is not None:
            return math.ceil(self.warmup_ratio * total_steps)
        return self.warmup_steps or 0


class LinearScheduleOptions(ConstantScheduleOptions):
    """Linear decrease that reaches ``min_lr_ratio`` times the peak after the last step."""

    kind: Literal["linear"]  # pyright: ignore[reportIncompatibleVariableOverride]
    """Selects this schedule."""

    min_lr_ratio: float = Field(default=0.0, ge=0.0, le=1.0)
    """Last learning rate as a share of the peak."""


class CosineScheduleOptions(LinearScheduleOptions):
    """Half a cosine that reaches ``min_lr_ratio`` times the peak after the last step."""

    kind: Literal["cosine"]  # pyright: ignore[reportIncompatibleVariableOverride]
    """Selects this schedule."""


ScheduleOptions = Annotated[
    ConstantScheduleOptions | LinearScheduleOptions | CosineScheduleOptions,
    Field(discriminator="kind"),
]
