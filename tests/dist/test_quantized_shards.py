"""Codes and scales gathered from all ranks are those of bitsandbytes, bit for bit."""

from __future__ import annotations

import bitsandbytes.functional as bnb
import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from fsdpq.dist import own_shard, world_size
from fsdpq.model.quantized_linear import QuantizedLinear
from fsdpq.quantization.bnb import BnbQuantizer
from fsdpq.recipe.sections.quantization import BnbOptions
from support.ranks import RankPool

SHAPES = [
    (64, 128),  # divides by everything
    (37, 576),  # rows do not divide; nine blocks of 64 a row
    (1001, 192),  # three blocks a row; second-level blocks of 256 scales cross rows and ranks
    (3, 64),  # fewer rows than four ranks
    (50, 100),  # blocks cross rows
    (33, 65),  # odd in_features: bytes cross rows too
]


def _weight(shape: tuple[int, int], dtype: torch.dtype) -> torch.Tensor:
    generator = torch.Generator().manual_seed(shape[0])
    return torch.randn(shape, generator=generator).to(dtype)


def gather_quantized(
    shape: tuple[int, int], dtype: torch.dtype, options: BnbOptions
) -> dict[str, torch.Tensor]:
    """Quantizes a matrix in shards; returns the whole packed tensors and the whole weight."""
    with torch.device("meta"):
        linear = nn.Linear(shape[1], shape[0], bias=False, dtype=dtype)
    layer = QuantizedLinear(linear, quantizer=BnbQuantizer(options))
    fully_shard(layer, mesh=init_device_mesh("cpu", (world_size(),)))
    layer.to_empty(device="cpu")
    shards = {name: own_shard(getattr(layer, name)) for name in layer.packed_names}
    weight = _weight(shape, dtype)
    layer.quantizer.quantize_shards(lambda start, stop: weight[start:stop], shape, shards)
    packed = {name: getattr(layer, name).full_tensor() for name in layer.packed_names}
    # The forward of an identity matrix is the weight, through FSDP's own gather.
    product = layer(torch.eye(shape[1], dtype=dtype)).T
    some = layer.quantizer.dequantize_rows(packed, shape, 1, 3, dtype)
    return packed | {"some": some, "weight": layer.dequantize(tuple(packed.values()), dtype), "product": product}


@pytest.mark.parametrize("num_ranks", [1, 2, 3, 4])
@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize(
    ("quant_type", "block_size", "dtype"),
    [("nf4", 64, torch.bfloat16), ("nf4", 64, torch.float32), ("fp4", 128, torch.bfloat16)],
)
def test_gathered_shards_equal_the_whole_tensors_quantization(
    ranks: RankPool,
    num_ranks: int,
    double_quant: bool,
    quant_type: str,
    block_size: int,
    dtype: torch.dtype,
) -> None:
    options = BnbOptions.model_validate(
        {
            "kind": "bnb",
            "quant_type": quant_type,
            "block_size": block_size,
            "double_quant": double_quant,
        }
    )
    for shape in SHAPES:
        codes, state = bnb.quantize_4bit(
            _weight(shape, dtype),
            blocksize=block_size,
            quant_type=quant_type,
            compress_statistics=double_quant,
        )
        reference = bnb.dequantize_4bit(codes, state)
        for answer in ranks.run(num_ranks, gather_quantized, shape, dtype, options):
            assert torch.equal(answer["codes"].flatten(), codes.flatten()), shape
            scales = answer["absmax"].flatten()
            assert torch.equal(scales.view(state.absmax.dtype), state.absmax.flatten()), shape
            if double_quant:
                nested = answer["nested_absmax"].flatten().view(torch.float32)
                assert torch.equal(nested, state.state2.absmax), shape
                offset = answer["nested_offset"].flatten().view(torch.float32)
                assert torch.equal(offset, state.offset.reshape(1)), shape
            assert torch.equal(answer["weight"], reference), shape
            assert torch.equal(answer["product"], reference), shape
            assert torch.equal(answer["some"], reference[1:3]), shape
