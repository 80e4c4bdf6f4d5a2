"""``fsdp``: sharding, offload, precision, activations."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from fsdpq.recipe.options import Options

Strategy = Literal[
    "full_shard", "shard_grad_op", "ddp", "hybrid_full_shard", "hybrid_shard_grad_op"
]
Precision = Literal[
    "auto", "fp32", "bf16", "fp16_autocast", "bf16_autocast", "bf16_buffers_autocast"
]

PRECISION_DTYPES = {
    "fp32": "fp32",
    "bf16": "bf16",
    "fp16_autocast": "fp32",
    "bf16_autocast": "fp32",
    "bf16_buffers_autocast": "bf16",
}
"""The ``model.dtype`` that each preset of ``fsdp.precision`` stores weights in."""


class FsdpOptions(Options):
    """Sharding by FSDP2 (``torch.distributed.fsdp.fully_shard``)."""

    strategy: Strategy = "full_shard"
    """``full_shard`` frees a layer's gathered weights after its forward; ``shard_grad_op`` keeps
    them until its backward: faster, and it needs memory for the whole base. ``ddp`` shards nothing.
    The ``hybrid`` ones shard inside groups of ``shard_size`` ranks and replicate over groups."""

    shard_size: int | None = Field(default=None, ge=2)
    """Ranks that share one copy of the base with a ``hybrid`` strategy; null is the ranks of one
    machine, or half of them where there is one machine only."""

    offload: Literal["none", "cpu", "disk"] = "none"
    """Where the shards lie between uses: on the device, in host memory (the optimizer step runs
    there too, see ``offload_trained``), or, the frozen ones, memory-mapped from a file."""

    offload_trained: bool = True
    """With ``offload``, keep trained weights in host memory too, with their gradients and the
    optimizer's states, and do its step there. ``false`` keeps them on the GPU: nothing of an
    adapter crosses the bus and the step runs there, for 16 bytes of GPU memory a trained weight
    (AdamW, fp32) over all ranks."""

    precision: Precision = "auto"
    """``auto`` keeps trained weights in fp32 and computes in ``model.dtype``. The others are the
    presets of FSDP + QLoRA's first script: ``fp32`` and ``bf16`` keep and compute everything in
    that dtype, ``fp16_autocast`` and ``bf16_autocast`` keep fp32 and compute under autocast,
    ``bf16_buffers_autocast`` keeps bf16 and computes under autocast. fp16 scales the loss."""

    activation_checkpointing: Literal["full", "selective", "none"] = "full"
    """``full`` keeps only the input of each decoder layer and computes the layer again in the
    backward pass; ``selective`` does so for every second layer."""

    activation_offload: bool = False
    """Keep the checkpointed inputs of the decoder layers in host memory."""

    no_sync: bool = False
    """Accumulate gradients unsharded over the micro-batches of a step and reduce them once: less
    communication, more memory."""
