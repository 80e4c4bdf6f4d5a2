"""``fsdp``: sharding, offload, precision, activations."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from fsdpq.recipe.options import Options

Strategy = Literal[
    "full_shard", "shard_grad_op", "ddp", "hybrid_full_shard", "hybrid_shard_grad_op"
]
Preset = Literal["auto", "fp32", "bf16", "fp16_autocast", "bf16_autocast", "bf16_buffers_autocast"]


class PrecisionOptions(Options):
    """A combination of dtypes; what it leaves out is as under ``auto``."""

    param: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Trained weights and optimizer states. bf16 takes half the memory and rounds small steps away.
    The magnitudes of dora stay fp32. fp16 is refused: Adam's means underflow in it."""

    compute: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """Products. ``auto`` is ``model.dtype``; where that or ``buffers`` is another dtype, forward
    runs under autocast. fp16 scales the loss."""

    reduce: Literal["fp32", "bf16"] = "fp32"
    """Gradients while they are summed over ranks; bf16 sends half the bytes."""

    buffers: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """Floating buffers of the model; ``auto`` is ``model.dtype``. fp32 beside a ``compute`` of 16
    bits means autocast. RoPE's frequencies are fp32 whatever it says: in bf16, positions beyond
    256 are not told apart."""


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

    precision: Preset | PrecisionOptions = Field(default="auto", examples=["bf16_autocast"])
    """A preset or a combination. ``auto`` keeps trained weights in fp32 and computes in
    ``model.dtype``. The other presets are those of FSDP + QLoRA's first script: ``fp32`` and
    ``bf16`` keep and compute everything in that dtype, ``fp16_autocast`` and ``bf16_autocast`` keep
    fp32 and compute under autocast, ``bf16_buffers_autocast`` keeps bf16 and computes under
    autocast. A combination is a mapping of ``param``, ``compute``, ``reduce`` and ``buffers``."""

    activation_checkpointing: Literal["full", "selective", "none"] = "full"
    """``full`` keeps only the input of each decoder layer and computes the layer again in the
    backward pass; ``selective`` does so for every second layer."""

    activation_offload: bool = False
    """Keep the checkpointed inputs of the decoder layers in host memory."""

    no_sync: bool = False
    """Accumulate gradients unsharded over the micro-batches of a step and reduce them once: less
    communication, more memory."""
