"""``lr_scheduler``: how the learning rate moves."""

from __future__ import annotations

import math
from typing import Annotated, Literal

from pydantic import Field

from fsdpq.recipe.options import Options

DEFAULT_DECAY_RATIO = 0.1
"""Share of the steps that `wsd` decays over, where a recipe does not say."""


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

    def num_decay_steps(self, total_steps: int) -> int:  # noqa: ARG002 - other schedules need it
        """Returns the steps of a decay that must not begin before the warmup ends."""
        return 0


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


class WsdScheduleOptions(ConstantScheduleOptions):
    """Warmup, a stable phase at the peak, and a short decay at the end.

    Warmup-stable-decay (https://arxiv.org/abs/2404.06395): the decay takes ``decay_steps`` or
    ``decay_ratio`` of all steps, a tenth where neither is given.
    """

    kind: Literal["wsd"]  # pyright: ignore[reportIncompatibleVariableOverride]
    """Selects this schedule."""

    decay_steps: int | None = Field(default=None, ge=1)
    """Steps of the decay."""

    decay_ratio: float | None = Field(default=None, gt=0.0, le=1.0)
    """The same as a share of all steps, rounded up."""

    decay_type: Literal["linear", "cosine", "1-sqrt"] = "linear"
    """Shape of the decay; ``1-sqrt`` falls fastest at its start
    (https://arxiv.org/abs/2405.18392)."""

    min_lr_ratio: float = Field(default=0.0, ge=0.0, le=1.0)
    """Last learning rate as a share of the peak."""

    def num_decay_steps(self, total_steps: int) -> int:
        """Returns the steps of decay in a run of ``total_steps``."""
        if self.decay_steps is not None:
            return self.decay_steps
        return math.ceil((self.decay_ratio or DEFAULT_DECAY_RATIO) * total_steps)


ScheduleOptions = Annotated[
    ConstantScheduleOptions | LinearScheduleOptions | CosineScheduleOptions | WsdScheduleOptions,
    Field(discriminator="kind"),
]
