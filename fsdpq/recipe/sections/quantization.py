"""``quantization``: how the frozen base is stored."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from fsdpq.recipe.options import Options

ModuleNames = tuple[Annotated[str, Field(min_length=1)], ...]
"""Linear layers by the last parts of their names."""


class BnbOptions(Options):
    """4-bit quantization by bitsandbytes (QLoRA, https://arxiv.org/abs/2305.14314)."""

    kind: Literal["bnb"]
    """Selects this quantizer."""

    quant_type: Literal["nf4", "fp4"] = "nf4"
    """The 16 values a code stands for: quantiles of a normal distribution, or 4-bit floats."""

    block_size: Literal[64, 128, 256, 512, 1024, 2048, 4096] = 64
    """Weights that share one scale (absmax). transformers quantizes with 64 only, and loads any."""

    double_quant: bool = True
    """Quantize the scales too: 4.13 instead of 4.5 bits per weight at block size 64."""

    modules_to_not_convert: ModuleNames = ()
    """Linear layers that stay in ``model.dtype``, by the last parts of their names (``o_proj``,
    ``mlp.down_proj``). The output head always stays."""

    cache: bool = True
    """Keep a large quantized base in the cache, so that later runs load it instead of quantizing
    again. The result is the same."""


class HqqOptions(Options):
    """Half-quadratic quantization by hqq, calibration-free (https://mobiusml.github.io/hqq_blog)."""

    kind: Literal["hqq"]
    """Selects this quantizer."""

    nbits: Literal[8, 4, 3, 2, 1] = 4
    """Bits of a code."""

    group_size: Literal[16, 32, 64, 128, 256] | None = 64
    """Weights that share one scale and one zero point; null is one group per output channel
    (``axis: 1`` only)."""

    axis: Literal[0, 1] = 1
    """1: groups run along the inputs of a row. 0: they run down a column, over every
    ``out_features / group_size``-th row, as in hqq's own default; the group size must then divide
    ``out_features``."""

    modules_to_not_convert: ModuleNames = ()
    """Linear layers that stay in ``model.dtype``, by the last parts of their names (``o_proj``,
    ``mlp.down_proj``). The output head always stays."""

    cache: bool = True
    """Keep a large quantized base in the cache, so that later runs load it instead of quantizing
    again. The result is the same."""


class NoQuantOptions(Options):
    """The base stays in ``model.dtype``: plain LoRA, or full finetuning."""

    kind: Literal["none"]
    """Selects this quantizer."""


QuantizationOptions = Annotated[
    BnbOptions | HqqOptions | NoQuantOptions, Field(discriminator="kind")
]
