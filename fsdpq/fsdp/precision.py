"""What the presets of ``fsdp.precision`` mean for trained weights, autocast and loss scaling.

| preset | trained weights | base (``model.dtype``) | compute |
|---|---|---|---|
| ``auto`` | fp32 | any | ``model.dtype``: adapters cast their weights in forward |
| ``fp32`` | fp32 | fp32 | fp32 |
| ``bf16`` | bf16 | bf16 | bf16 |
| ``fp16_autocast`` | fp32 | fp32 | autocast to fp16 |
| ``bf16_autocast`` | fp32 | fp32 | autocast to bf16 |
| ``bf16_buffers_autocast`` | bf16 | bf16 | autocast to bf16 |

RoPE's buffers stay fp32 under every preset: in bf16 positions beyond 256 are not told apart.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy

from fsdpq.recipe.sections.fsdp import Precision

AUTOCAST_DTYPES: dict[Precision, torch.dtype] = {
    "fp16_autocast": torch.float16,
    "bf16_autocast": torch.bfloat16,
    "bf16_buffers_autocast": torch.bfloat16,
}

TRAINED_DTYPES: dict[Precision, torch.dtype] = {
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16_autocast": torch.float32,
    "bf16_autocast": torch.float32,
    "bf16_buffers_autocast": torch.bfloat16,
}
"""``auto`` leaves trained weights as the adapter made them."""


def apply_trained_dtype(model: nn.Module, precision: Precision) -> None:
    """Casts the trainable parameters of a meta model to the preset's dtype, in place."""
    dtype = TRAINED_DTYPES.get(precision)
    if dtype is None:
        return
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(dtype)


def build_policy(
    precision: Precision, *, trains_base: bool, dtype: torch.dtype
) -> MixedPrecisionPolicy:
    """Returns what FSDP casts; gradients are always summed over ranks in fp32.

    Args:
        precision: the preset.
        trains_base: whether weights of the base are trained; under ``auto`` they are fp32 masters,
            cast before they are gathered. Adapters cast their own.
        dtype: ``model.dtype``.
    """
    casts = trains_base and precision == "auto"
    return MixedPrecisionPolicy(
        param_dtype=dtype if casts else None, reduce_dtype=torch.float32, cast_forward_inputs=False
    )


def autocast_dtype(precision: Precision) -> torch.dtype | None:
    """Returns what forward autocasts to, None for no autocast."""
    return AUTOCAST_DTYPES.get(precision)


def needs_loss_scaling(precision: Precision, model_dtype: str) -> bool:
    """Whether gradients pass through fp16, whose small numbers vanish without a scale."""
    return AUTOCAST_DTYPES.get(precision) is torch.float16 or model_dtype == "fp16"
