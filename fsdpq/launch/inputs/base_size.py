"""How many bytes a quantized base will have, from the headers of a checkpoint alone.

An estimate, for deciding whether to make one and whether the disk has room: the decoder layers'
matrices are counted as quantized, everything else in ``model.dtype``.
"""

from __future__ import annotations

import math
import re
from pathlib import Path

from fsdpq.recipe.sections.quantization import (
    BnbOptions,
    HqqOptions,
    NoQuantOptions,
    QuantizationOptions,
)
from fsdpq.tensor_files.header import check_header

DTYPE_BYTES = {"bf16": 2, "fp16": 2, "fp32": 4}
_IN_A_LAYER = re.compile(r"\.\d+\.")


def estimate_base_bytes(directory: Path, quantization: QuantizationOptions, *, dtype: str) -> int:
    """Returns about how many bytes the quantized base of a checkpoint has.

    Files whose header cannot be read count nothing: the ranks say what is wrong with them.

    Args:
        directory: of safetensors files.
        quantization: what its matrices become.
        dtype: of everything else: ``bf16``, ``fp16`` or ``fp32``.
    """
    bits, plain_bits = bits_per_weight(quantization, dtype=dtype), 8 * DTYPE_BYTES[dtype]
    kept = getattr(quantization, "modules_to_not_convert", ())
    total = 0.0
    for file in sorted(directory.glob("*.safetensors")):
        header, _ = check_header(file)
        for tensor in header.entries.values() if header else ():
            is_matrix = len(tensor.shape) >= 2 and _IN_A_LAYER.search(tensor.name) is not None
            stem = tensor.name.removesuffix(".weight")
            quantized = is_matrix and not any(stem.endswith(name) for name in kept)
            total += math.prod(tensor.shape) * (bits if quantized else plain_bits) / 8
    return int(total)


def bits_per_weight(quantization: QuantizationOptions, *, dtype: str) -> float:
    """Returns the bits of one quantized weight, its share of the scales included."""
    match quantization:
        case BnbOptions():
            return 4 + (8.125 if quantization.double_quant else 32) / quantization.block_size
        case HqqOptions():
            group = quantization.group_size
            return quantization.nbits + (32 / group if group else 0)
        case NoQuantOptions():
            return 8 * DTYPE_BYTES[dtype]
