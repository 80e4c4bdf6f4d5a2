"""Codes and scales gathered from all ranks are those of bitsandbytes, bit for bit."""

from __future__ import annotations

from typing import Any, get_args

import bitsandbytes.functional as bnb
import pytest
import torch
from support.ranks import RankPool
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard

from fsdpq.dist import Shard, own_shard, world_size
from fsdpq.model.quantized_linear import QuantizedLinear
from fsdpq.quantization.bnb import BnbQuantizer
from fsdpq.recipe.sections.quantization import BnbOptions

SHAPES = [
    (64, 128),  # divides by everything
    (37, 576),  # rows do not divide; nine blocks of 64 a row
    (1001, 192),  # three blocks a row; second-level blocks of 256 scales cross rows and ranks
    (3, 64),  # fewer rows than four ranks
    (50, 100),  # blocks cross rows
    (33, 65),  # odd in_features: bytes cross rows too
    (7, 4096),  # whole rows of every block size
]
WIDEST_PRODUCT = 1000
"""Input features up to which the forward is compared too."""

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
# Every block size with and without double quantization; every pair of the other options.
OPTIONS = [
    ("nf4", 64, True, BF16),
    ("fp4", 64, False, FP32),
    ("fp4", 128, True, BF16),
    ("nf4", 128, False, FP32),
    ("nf4", 256, True, FP32),
    ("fp4", 256, False, BF16),
    ("fp4", 512, True, FP32),
    ("nf4", 512, False, BF16),
    ("nf4", 1024, True, FP16),  # bitsandbytes compiles fp16 on a CPU, which takes seconds
    ("fp4", 1024, False, BF16),
    ("fp4", 2048, True, BF16),
    ("nf4", 2048, False, FP32),
    ("nf4", 4096, True, BF16),
    ("fp4", 4096, False, FP32),
]


def _weight(shape: tuple[int, int], dtype: torch.dtype) -> torch.Tensor:
    generator = torch.Generator().manual_seed(shape[0])
    return torch.randn(shape, generator=generator).to(dtype)


def gather_quantized(
    shapes: list[tuple[int, int]], dtype: torch.dtype, options: BnbOptions
) -> list[dict[str, torch.Tensor]]:
    """Quantizes matrices in shards; returns whole packed tensors and whole weights."""
    mesh = init_device_mesh("cpu", (world_size(),))
    return [_gather_one(shape, dtype, options, mesh) for shape in shapes]


def _gather_one(
    shape: tuple[int, int], dtype: torch.dtype, options: BnbOptions, mesh: DeviceMesh
) -> dict[str, torch.Tensor]:
    with torch.device("meta"):
        linear = nn.Linear(shape[1], shape[0], bias=False, dtype=dtype)
    layer = QuantizedLinear(linear, quantizer=BnbQuantizer(options))
    fully_shard(layer, mesh=mesh)
    layer.to_empty(device="cpu")
    shards = {name: own_shard(getattr(layer, name)) for name in layer.packed_names}
    weight = _weight(shape, dtype)
    layer.quantizer.quantize_shards(lambda start, stop: weight[start:stop], shape, shards)
    packed = {name: getattr(layer, name).full_tensor() for name in layer.packed_names}
    some = layer.quantizer.dequantize_rows(packed, shape, 1, 3, dtype)
    answer = packed | {"some": some, "weight": layer.dequantize(tuple(packed.values()), dtype)}
    if shape[1] < WIDEST_PRODUCT:
        # The forward of an identity matrix is the weight, through FSDP's own gather.
        answer["product"] = layer(torch.eye(shape[1], dtype=dtype)).T
    return answer


@pytest.mark.parametrize("num_ranks", [1, 2, 3, 4])
@pytest.mark.parametrize(("quant_type", "block_size", "double_quant", "dtype"), OPTIONS)
def test_gathered_shards_equal_the_whole_tensors_quantization(
    ranks: RankPool,
    num_ranks: int,
    quant_type: str,
    block_size: int,
    double_quant: bool,
    dtype: torch.dtype,
) -> None:
    document = {
        "kind": "bnb",
        "quant_type": quant_type,
        "block_size": block_size,
        "double_quant": double_quant,
    }
    options = BnbOptions.model_validate(document)
    answers = ranks.run(num_ranks, gather_quantized, SHAPES, dtype, options)
    for index, shape in enumerate(SHAPES):
        codes, state = bnb.quantize_4bit(
            _weight(shape, dtype),
            blocksize=block_size,
            quant_type=quant_type,
            compress_statistics=double_quant,
        )
        reference = bnb.dequantize_4bit(codes, state)
        for answer in (each[index] for each in answers):
            assert torch.equal(answer["codes"].flatten(), codes.flatten()), shape
            scales = answer["absmax"].flatten()
            assert torch.equal(scales.view(state.absmax.dtype), state.absmax.flatten()), shape
            if double_quant:
                assert state.state2 is not None
                assert state.offset is not None
                nested = answer["nested_absmax"].flatten().view(torch.float32)
                assert torch.equal(nested, state.state2.absmax), shape
                offset = answer["nested_offset"].flatten().view(torch.float32)
                assert torch.equal(offset, state.offset.reshape(1)), shape
            assert torch.equal(answer["weight"], reference), shape
            assert torch.equal(answer.get("product", reference), reference), shape
            assert torch.equal(answer["some"], reference[1:3]), shape


def test_rows_are_quantized_where_they_are_read_to_wherever_shards_lie(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Under CPU offload shards lie on the host, whose scales need not be those of a GPU."""
    devices: dict[str, set[str]] = {"quantize_4bit": set(), "quantize_blockwise": set()}

    def spy(name: str) -> Any:
        original = getattr(bnb, name)

        def call(tensor: torch.Tensor, **options: Any) -> Any:
            devices[name].add(tensor.device.type)
            return original(tensor, **options)

        return call

    for name in devices:
        monkeypatch.setattr(bnb, name, spy(name))
    quantizer = BnbQuantizer(BnbOptions.model_validate({"kind": "bnb"}))
    shape = (64, 128)
    # Shards on one device and rows on another, as far as that goes on a CPU.
    shards = {
        name: Shard(torch.empty(packed, dtype=torch.uint8, device="meta"), 0, packed[0])
        for name, packed in quantizer.packed_shapes(*shape).items()
    }
    weight = _weight(shape, BF16)
    quantizer.quantize_shards(lambda start, stop: weight[start:stop], shape, shards)
    assert devices == {"quantize_4bit": {"cpu"}, "quantize_blockwise": {"cpu"}}


def test_every_block_size_and_type_of_the_options_is_compared() -> None:
    sizes = get_args(BnbOptions.model_fields["block_size"].annotation)
    assert {(size, double) for _, size, double, _ in OPTIONS} == {
        (size, double) for size in sizes for double in (True, False)
    }
    types = get_args(BnbOptions.model_fields["quant_type"].annotation)
    assert {(kind, size) for kind, size, *_ in OPTIONS} == {(k, s) for k in types for s in sizes}
