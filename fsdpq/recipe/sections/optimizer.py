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

    lora_plus_ratio: float = Field(default=1.0, gt=0)
    """Learning rate of the adapter's matrices B, and of trained vectors, over ``lr``: LoRA+
    (https://arxiv.org/abs/2402.12354). 1 treats all alike."""


class AdamOptions(AdamWOptions):
    """Adam, its weight decay added to the gradient (https://arxiv.org/abs/1412.6980)."""

    kind: Literal["adam"]  # pyright: ignore[reportIncompatibleVariableOverride]
    """Selects this optimizer."""


class AdamW8bitOptions(AdamWOptions):
    """AdamW that keeps its running means in 8 bits (https://arxiv.org/abs/2110.02861).

    By bitsandbytes, in blocks of 256 of a rank's own rows: where shards do not begin at a block,
    results depend on the number of ranks by the rounding of the means. Tensors of fewer than 4096
    weights keep fp32 means. Worth it for full finetuning; an adapter's means are small anyway.
    """

    kind: Literal["adamw_8bit"]  # pyright: ignore[reportIncompatibleVariableOverride]
    """Selects this optimizer."""


class MuonOptions(Options):
    """Momentum made orthogonal, matrix by matrix (https://kellerjordan.github.io/posts/muon/).

    Updates are scaled to the size of AdamW's (https://arxiv.org/abs/2502.16982), so that learning
    rates carry over. Vectors, embedding and head are updated by AdamW.
    """

    kind: Literal["muon"]
    """Selects this optimizer."""

    lr: float = Field(default=2e-4, gt=0)
    """Peak learning rate, of Muon and of AdamW."""

    momentum: float = Field(default=0.95, ge=0.0, lt=1.0)
    """Decay rate of the running mean of a matrix's gradient."""

    nesterov: bool = True
    """Nesterov's momentum."""

    weight_decay: float = Field(default=0.0, ge=0.0)
    """Decay of the trained weights, decoupled."""

    betas: tuple[Beta, Beta] = (0.9, 0.999)
    """Decay rates of AdamW's running means."""

    eps: float = Field(default=1e-8, gt=0)
    """Added to AdamW's denominator."""


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

    lora_plus_ratio: float = Field(default=1.0, gt=0)
    """Learning rate of the adapter's matrices B, and of trained vectors, over ``lr``: LoRA+
    (https://arxiv.org/abs/2402.12354). 1 treats all alike."""


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
    AdamWOptions | AdamOptions | AdamW8bitOptions | MuonOptions | SgdOptions | AdadeltaOptions,
    Field(discriminator="kind"),
]
