"""What the dtypes of a run mean for trained weights, buffers, autocast and FSDP's casts.

`fsdpq.recipe.precision` says what ``fsdp.precision`` means; here it is applied. FSDP casts trained
weights of the base where it gathers them, adapters cast their own in forward, and autocast casts
what meets in a product.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy

from fsdpq.protocols import BASE, DTYPES
from fsdpq.recipe.precision import Precision

ROPE_PART = "inv_freq"
"""Part of the names of RoPE's frequencies in transformers, one buffer for each kind of layer."""


def fp32_parameters(model: nn.Module) -> set[nn.Parameter]:
    """Returns the trained Parameters that stay fp32 whatever ``param`` says."""
    return {
        getattr(module, name)
        for module in model.modules()
        if hasattr(module, BASE)
        for name in module.fp32_names  # pyright: ignore[reportGeneralTypeIssues]
    }


def apply_param_dtype(model: nn.Module, precision: Precision) -> set[nn.Parameter]:
    """Casts the trained Parameters of a meta model to ``param``, in place.

    Returns:
        Those that stayed fp32 beside others that did not: they need FSDP groups of their own.
    """
    kept = fp32_parameters(model) if precision.param != "fp32" else set[nn.Parameter]()
    dtype = DTYPES[precision.param]
    for parameter in model.parameters():
        if parameter.requires_grad and parameter.dtype != dtype and parameter not in kept:
            parameter.data = parameter.data.to(dtype)
    return kept


def apply_buffers_dtype(
    model: nn.Module, precision: Precision, *, persistent: bool, fp32_names: Iterable[str] = ()
) -> None:
    """Casts floating buffers that the model made in ``model.dtype`` to ``buffers``, in place.

    Buffers that it made in another dtype stay: its code wants them so.

    Args:
        model: on meta or loaded.
        precision: the dtypes of the run.
        persistent: cast those that checkpoints hold, else the others. The former are read in
            ``model.dtype``, as bases on the disk hold them, so they are cast after loading; the
            latter are computed while loading, in their own dtype, so they are cast before.
        fp32_names: parts of names of buffers that transformers keeps in fp32.
    """
    base, wanted = DTYPES[precision.base], DTYPES[precision.buffers]
    if base == wanted:
        return
    kept = (ROPE_PART, *fp32_names) if wanted != torch.float32 else ()
    for module in model.modules():
        for name, buffer in list(module.named_buffers(recurse=False)):
            if any(part in name for part in kept):
                continue
            chosen = (name not in module._non_persistent_buffers_set) == persistent
            if chosen and buffer.dtype == base:
                module.register_buffer(name, buffer.to(wanted), persistent=persistent)


def build_policy(precision: Precision) -> MixedPrecisionPolicy:
    """Returns what FSDP casts in a group of trained weights of the base.

    They are gathered in ``model.dtype``, and gradients are summed in ``reduce``.
    """
    return MixedPrecisionPolicy(
        param_dtype=DTYPES[precision.base],
        reduce_dtype=DTYPES[precision.reduce],
        cast_forward_inputs=False,
    )


def autocast_dtype(precision: Precision) -> torch.dtype | None:
    """Returns what forward autocasts to, None for no autocast."""
    return DTYPES[precision.compute] if precision.autocasts else None
