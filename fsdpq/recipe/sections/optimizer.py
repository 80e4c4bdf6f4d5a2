"""``optimizer``: how the weights are updated."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from fsdpq.recipe.options import Options

Beta = Annotated[float, Field(ge=0.0, lt=1.0)]


class AdamWOptions(Options):
    """AdamW with decoupled weight decay (https://arxiv.org/abs/1711.05101)."""

    kind: Literal["adamw"]
    """Selects this optimizer."""

    lr: float = Field(default=2e-4, gt=0)
    """Peak learning rate."""

    betas: tuple[Beta, Beta] = (0.9, 0.999)
    """Decay rates of the running means of gradient and squared gradient."""

    eps: float = Field(default=1e-8, gt=0)
    """Added to the denominator."""

    weight_decay: float = Field(default=0.0, ge=0.0)
    """Decay of the trained weights."""


class AdamOptions(AdamWOptions):
    """Adam, its weight decay added to the gradient (https://arxiv.org/abs/1412.6980)."""

    kind: Literal["adam"]  # pyright: ignore[reportIncompatibleVariableOverride]
    """Selects this optimizer."""


class SgdOptions(Options):
    """Stochastic gradient descent."""

    kind: Literal["sgd"]
    """Selects this optimizer."""

    lr: float = Field(default=1e-2, gt=0)
    """Peak learning rate."""

    momentum: float = Field(default=0.0, ge=0.0, lt=1.0)
    """Share of the last update that is kept."""

    nesterov: bool = False
    """Nesterov's momentum; needs ``momentum``."""

    weight_decay: float = Field(default=0.0, ge=0.0)
    """Decay of the trained weights, added to the gradient."""


class AdadeltaOptions(Options):
    """Adadelta (https://arxiv.org/abs/1212.5701)."""

    kind: Literal["adadelta"]
    """Selects this optimizer."""

    lr: float = Field(default=1.0, gt=0)
    """Peak factor on the update."""

    rho: float = Field(default=0.9, ge=0.0, lt=1.0)
    """Decay rate of the running means."""

    eps: float = Field(default=1e-6, gt=0)
    """Added inside the square roots."""

    weight_decay: float = Field(default=0.0, ge=0.0)
    """Decay of the trained weights, added to the gradient."""


OptimizerOptions = Annotated[
    AdamWOptions | AdamOptions | SgdOptions | AdadeltaOptions, Field(discriminator="kind")
]
