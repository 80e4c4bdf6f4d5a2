"""``training`` and ``checkpoint``: the loop, and what it saves on the way."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from fsdpq.recipe.options import Options


class TrainingOptions(Options):
    """The training loop: one of ``steps`` and ``epochs``."""

    steps: int | None = Field(default=None, ge=1)
    """Optimizer steps."""

    epochs: float | None = Field(default=None, gt=0)
    """Passes over the training rows, whole or not (``0.5`` is half of them); one where ``steps`` is
    not given either. The last step takes the rows that are left."""

    global_batch_size: int | None = Field(default=None, ge=1)
    """Rows per optimizer step over all ranks, 16 where ``gradient_accumulation_steps`` is not given
    either. Losses and gradients depend on this number, not on how many ranks or micro-batches share
    the rows (with dropout each rank draws its own)."""

    gradient_accumulation_steps: int | None = Field(default=None, ge=1)
    """Micro-batches per rank and optimizer step, instead of ``global_batch_size``."""

    micro_batch_size: int = Field(default=4, ge=1)
    """Rows that one rank computes at once; memory grows with it."""

    layer_chunks: int = Field(default=1, ge=1)
    """Each decoder layer runs over so many chunks of the micro-batch, so that weights are gathered
    or read once for many rows, while memory stays that of one chunk."""

    router_aux_loss_coef: float | None = Field(default=None, ge=0)
    """Factor on the load-balancing loss of a mixture's routers in the training loss; 0 is off, null
    is what the model's config says (off unless it sets ``output_router_logits``)."""

    max_grad_norm: float | None = Field(default=1.0, gt=0)
    """Gradients are scaled down to this global norm; null leaves them."""

    seed: int = Field(default=0, ge=0, lt=2**63)
    """Seed of the adapters, the row order and the dropout."""

    compile: bool = False
    """Compile the decoder layers by ``torch.compile``. The first steps take minutes longer; a C++
    compiler must be installed."""

    eval_interval: int | None = Field(default=None, ge=1)
    """Evaluate every so many steps; null is before and after training only."""


class CheckpointOptions(Options):
    """Checkpoints to resume from: trained weights, optimizer, position; never the frozen base."""

    interval: int | None = Field(default=None, ge=1)
    """Steps between two checkpoints; null saves none by steps. With it, the last step is saved
    too."""

    interval_minutes: float | None = Field(default=30.0, gt=0)
    """Minutes between two checkpoints, whatever their reason; null saves none by time. A run that
    is shorter leaves none."""

    keep_last: int = Field(default=2, ge=1)
    """How many of the newest are kept."""

    keep_best: bool = False
    """Also save and keep the one with the lowest held-out loss of all at
    ``training.eval_interval``."""

    resume: Literal["never", "auto"] = "never"
    """``auto`` lets ``fsdpq train`` go on with the newest run of the same recipe, in ``runs/`` or
    in ``--run-dir``, from its newest checkpoint; it starts one where there is none, and does
    nothing where that run has finished. ``fsdpq resume`` goes on whatever this says."""
