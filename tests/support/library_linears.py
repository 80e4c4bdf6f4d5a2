"""Models of transformers whose linears are the quantization libraries' own modules."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection
from typing import Any

import bitsandbytes
import torch
from torch import Tensor, nn

from support.reference import NUM_EXPERTS

with warnings.catch_warnings():
    warnings.simplefilter("ignore", DeprecationWarning)
    from hqq.core.quantize import BaseQuantizeConfig, HQQLinear


def with_library_linears(
    model: nn.Module,
    quantization: dict[str, Any],
    dtype: torch.dtype = torch.float32,
    *,
    trained: Collection[str] = (),
) -> nn.Module:
    """Replaces the linears inside the layers in place, by the library of ``quantization``.

    Experts, for which the libraries have no module, become the dequantized weight that the
    library's Linear makes of them stacked on top of each other. Linears of a single row, gates, and
    of as many rows as there are experts, routers, stay as they are.

    Args:
        model: of transformers, unquantized.
        quantization: the section of a recipe.
        dtype: that the modules compute in.
        trained: full names of linears that stay as they are.
    """
    build = {"bnb": _linear4bit, "hqq": _hqq_linear}[quantization["kind"]]
    # PEFT asks for it before it takes a `Linear4bit` for one.
    model.is_loaded_in_4bit = quantization["kind"] == "bnb"  # pyright: ignore[reportArgumentType]
    keeps = {1, *(getattr(model.config, name, 1) for name in NUM_EXPERTS)}
    kept = tuple(quantization.get("modules_to_not_convert", ()))
    for parent_name, parent in list(model.named_modules()):
        if not any(part.isdigit() for part in parent_name.split(".")):
            continue
        for name, child in list(parent.named_children()):
            is_kept = name in kept or f"{parent_name}.{name}" in trained
            if not isinstance(child, nn.Linear) or is_kept:
                continue
            if child.out_features not in keeps:
                setattr(parent, name, build(child, quantization, dtype))
        for weight in parent.parameters(recurse=False):
            if weight.dim() == 3 and weight.shape[1] > 1:
                weight.data = _rounded(weight.data, build, quantization, dtype)
    return model


def _rounded(
    weight: Tensor,
    build: Callable[[nn.Linear, dict[str, Any], torch.dtype], nn.Module],
    quantization: dict[str, Any],
    dtype: torch.dtype,
) -> Tensor:
    """Returns what the library's Linear multiplies with, of experts stacked on each other."""
    stacked = weight.flatten(0, 1)
    linear = nn.Linear(stacked.shape[1], stacked.shape[0], bias=False, dtype=dtype)
    linear.weight.data = stacked.clone()
    layer = build(linear, quantization, dtype)
    with torch.no_grad():
        return layer(torch.eye(stacked.shape[1], dtype=dtype)).T.reshape(weight.shape)


def _linear4bit(linear: nn.Linear, options: dict[str, Any], dtype: torch.dtype) -> nn.Module:
    layer = _NeverRepacks(
        linear.in_features, linear.out_features, bias=linear.bias is not None, compute_dtype=dtype
    )
    # Untyped: its parameters are those of `__new__`, which type checkers do not find.
    params: Any = bitsandbytes.nn.Params4bit
    layer.weight = params(
        linear.weight.data,
        requires_grad=False,
        blocksize=options.get("block_size", 64),
        compress_statistics=options.get("double_quant", True),
        quant_type=options.get("quant_type", "nf4"),
        module=layer,
    )
    layer.bias = linear.bias
    return layer.to("cpu")


class _NeverRepacks(bitsandbytes.nn.Linear4bit):
    """In eval mode the plain one repacks on some CPUs, for a kernel of other rounding."""

    def forward(self, x: Tensor) -> Tensor:
        return super(_NeverRepacks, self.train()).forward(x)


def _hqq_linear(linear: nn.Linear, options: dict[str, Any], dtype: torch.dtype) -> nn.Module:
    config = BaseQuantizeConfig(
        nbits=options.get("nbits", 4),
        group_size=options.get("group_size", 64),
        axis=options.get("axis", 1),
    )
    layer = HQQLinear(linear, config, compute_dtype=dtype, device="cpu", del_orig=False)
    meta: Any = layer.meta
    # A GPU computes them in fp16; a CPU in fp32, and what is stored is rounded.
    for name in ("scale", "zero"):
        meta[name] = meta[name].half().to(dtype)
    return layer
