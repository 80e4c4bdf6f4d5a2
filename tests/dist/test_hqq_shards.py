"""Codes, scales and zeros gathered from all ranks are those of hqq on blocks of whole rows."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch
from hqq.core.bitpack import BitPack
from hqq.core.quantize import BaseQuantizeConfig
from hqq.core.quantize import Quantizer as HqqLibrary
from support.imports import ROOT
from support.ranks import RankPool
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from fsdpq.dist import Shard, own_shard, shard_range, world_size
from fsdpq.errors import CheckpointError
from fsdpq.model.quantized_linear import QuantizedLinear
from fsdpq.plan.costs.quantization import packed_row_bytes
from fsdpq.quantization.hqq import HqqQuantizer, pack_rows, unpack_rows
from fsdpq.recipe.sections.quantization import HqqOptions

# Rows that divide by nothing, an odd number of groups, a row that is no multiple of 8 codes; fewer
# rows than ranks.
SHAPES = [(37, 192), (50, 80), (3, 64)]
# With `axis: 0` and groups of 16: rows that divide by nothing, five stored rows in blocks of two
# and one, a single stored row for all ranks.
COLUMN_SHAPES = [(48, 37), (80, 30), (16, 9)]
BLOCK_WEIGHTS = 192 * 5
"""So few that blocks of rows are cut by the ranks' borders, and the last one is short."""


def _weight(shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
    generator = torch.Generator().manual_seed(shape[0])
    return torch.randn(shape, generator=generator).to(dtype)


def _options(nbits: int, group_size: int | None, axis: int = 1) -> HqqOptions:
    document = {"kind": "hqq", "nbits": nbits, "group_size": group_size, "axis": axis}
    return HqqOptions.model_validate(document)


def gather_quantized(
    shape: tuple[int, int], dtype: torch.dtype, options: HqqOptions
) -> dict[str, Tensor]:
    """Quantizes a matrix in shards; returns what all ranks hold together."""
    with torch.device("meta"):
        linear = nn.Linear(shape[1], shape[0], bias=False, dtype=dtype)
    quantizer = HqqQuantizer(options)
    quantizer.block_weights = BLOCK_WEIGHTS
    layer = QuantizedLinear(linear, quantizer=quantizer)
    fully_shard(layer, mesh=init_device_mesh("cpu", (world_size(),)))
    layer.to_empty(device="cpu")
    shards = {name: own_shard(getattr(layer, name)) for name in layer.packed_names}
    weight = _weight(shape, dtype)
    quantizer.quantize_shards(lambda start, stop: weight[start:stop], shape, shards)
    packed = {name: getattr(layer, name).full_tensor() for name in layer.packed_names}
    # The forward of an identity matrix is the weight, through FSDP's own gather.
    product = layer(torch.eye(shape[1], dtype=dtype)).T
    some = quantizer.dequantize_rows(packed, shape, 1, 3, dtype)
    return packed | {"product": product, "some": some}


def _reference(weight: Tensor, options: HqqOptions) -> dict[str, Tensor]:
    """hqq on each block of rows, and hqq's own dequantization of its codes, scales in fp16.

    Rows of a block are, with ``axis: 0``, the same run of each of ``group_size`` equal parts of the
    weight; by part, so that blocks can be put side by side again.
    """
    fold = options.group_size or 1 if options.axis == 0 else 1
    in_features = weight.shape[1]
    parts = weight.view(fold, -1, in_features)
    sizes: dict[str, Any] = {"nbits": options.nbits, "group_size": options.group_size}
    config: dict[str, Any] = BaseQuantizeConfig(**sizes, axis=options.axis)
    answers: dict[str, list[Tensor]] = {"codes": [], "scale": [], "zero": [], "weight": []}
    for block in parts.split(max(1, BLOCK_WEIGHTS // (fold * in_features)), dim=1):
        codes, meta = HqqLibrary.quantize(
            block.reshape(-1, in_features),
            **config["weight_quant_params"],
            bitpack=False,
            device="cpu",
        )
        meta["compute_dtype"] = weight.dtype
        for name in ("scale", "zero"):
            answers[name].append(meta[name].half().reshape(1, block.shape[1], -1))
            meta[name] = meta[name].half().to(weight.dtype)
        answers["codes"].append(codes.to(torch.uint8).reshape(block.shape))
        answers["weight"].append(HqqLibrary.dequantize(codes, meta).reshape(block.shape))
    return {name: torch.cat(parts, dim=1).flatten(0, 1) for name, parts in answers.items()}


def _unpacked(codes: Tensor, shape: tuple[int, int], options: HqqOptions) -> Tensor:
    """Codes by row of the weight: with ``axis: 0`` a stored row holds every R-th of them."""
    stored_rows = codes.shape[0]
    rows = codes.view(stored_rows, shape[0] // stored_rows, -1).transpose(0, 1).flatten(0, 1)
    return unpack_rows(rows, options.nbits, shape[1])


def _check_equal(
    answer: dict[str, Tensor], expected: dict[str, Tensor], options: HqqOptions
) -> None:
    shape = (expected["weight"].shape[0], expected["weight"].shape[1])
    assert torch.equal(_unpacked(answer["codes"], shape, options), expected["codes"])
    for name in ("scale", "zero"):
        assert torch.equal(answer[name].view(torch.float16), expected[name])
    assert torch.equal(answer["product"], expected["weight"])
    assert torch.equal(answer["some"], expected["weight"][1:3])


@pytest.mark.parametrize(
    ("nbits", "group_size", "axis"),
    [(4, 16, 1), (3, None, 1), (2, 16, 0)],
)
def test_gathered_shards_equal_hqq_on_blocks_of_rows(
    ranks: RankPool, nbits: int, group_size: int | None, axis: int
) -> None:
    options = _options(nbits, group_size, axis)
    dtype = torch.bfloat16 if nbits == 4 else torch.float32
    for shape in SHAPES if axis == 1 else COLUMN_SHAPES:
        expected = _reference(_weight(shape, dtype), options)
        for num_ranks in (1, 2, 3, 4):
            for answer in ranks.run(num_ranks, gather_quantized, shape, dtype, options):
                _check_equal(answer, expected, options)


def quantize_in_parts(
    weight: Tensor, options: HqqOptions, num_parts: int, block_weights: int = BLOCK_WEIGHTS
) -> dict[str, Tensor]:
    """Quantizes as many ranks would, one after the other: hqq needs nothing of another rank."""
    quantizer, shape = HqqQuantizer(options), (weight.shape[0], weight.shape[1])
    quantizer.block_weights = block_weights
    shapes = quantizer.packed_shapes(*shape)
    packed = {name: torch.empty(size, dtype=torch.uint8) for name, size in shapes.items()}
    for rank in range(num_parts):
        start, stop = shard_range(packed["codes"].shape[0], rank, num_parts)
        shards = {n: Shard(whole[start:stop], start, stop) for n, whole in packed.items()}
        quantizer.quantize_shards(lambda first, last: weight[first:last], shape, shards)
    product = quantizer.dequantize(packed, shape, weight.dtype)
    some = quantizer.dequantize_rows(packed, shape, 1, 3, weight.dtype)
    return packed | {"product": product, "some": some}


@pytest.mark.parametrize("nbits", [8, 4, 3, 2, 1])
@pytest.mark.parametrize(
    ("group_size", "axis", "shapes"),
    [
        (16, 1, SHAPES),
        (None, 1, SHAPES),
        (16, 0, COLUMN_SHAPES),
        (32, 0, [(96, 5)]),
        (32, 1, [(5, 96)]),
        (64, 0, [(192, 5)]),
        (64, 1, [(5, 192)]),
        (128, 0, [(384, 5)]),
        (128, 1, [(5, 384)]),
        (256, 0, [(768, 5)]),
        (256, 1, [(5, 768)]),
    ],
)
def test_parts_of_any_number_of_ranks_equal_hqq_on_blocks_of_rows(
    nbits: int, group_size: int | None, axis: int, shapes: list[tuple[int, int]]
) -> None:
    options = _options(nbits, group_size, axis)
    for shape in shapes:
        weight = _weight(shape, torch.bfloat16 if nbits == 8 else torch.float32)
        expected = _reference(weight, options)
        for num_parts in (1, 2, 3, 4):
            _check_equal(quantize_in_parts(weight, options, num_parts), expected, options)


def test_a_small_matrix_of_column_groups_is_hqqs_whole_tensor() -> None:
    weight, options = _weight((96, 40), torch.float32), _options(3, 32, axis=0)
    packed = quantize_in_parts(weight, options, 2, block_weights=weight.numel())
    codes, meta = HqqLibrary.quantize(weight, nbits=3, group_size=32, axis=0, device="cpu")
    meta |= {name: meta[name].half().float() for name in ("scale", "zero")}
    meta["compute_dtype"] = torch.float32
    expected = HqqLibrary.dequantize(codes, meta)
    assert torch.equal(packed["product"], expected)
    # 3 bits a weight, 32 bits of scale and zero a group, and no padding.
    stored_bytes = sum(packed[name].nbytes for name in ("codes", "scale", "zero"))
    assert stored_bytes * 8 == 96 * 40 * (3 + 32 / 32)


def test_hqq_depends_on_the_rows_beside_a_row_so_blocks_are_needed() -> None:
    torch.manual_seed(0)
    weight = torch.cat([torch.randn(5, 192), torch.randn(30, 192) ** 3])
    options: dict[str, Any] = {"nbits": 4, "group_size": 64, "axis": 1, "device": "cpu"}
    _, whole = HqqLibrary.quantize(weight, bitpack=False, **options)
    _, alone = HqqLibrary.quantize(weight[:5], bitpack=False, **options)
    assert not torch.equal(whole["zero"][:15], alone["zero"])


@pytest.mark.parametrize(
    ("nbits", "library"),
    [(4, BitPack.pack_4bit_u8), (2, BitPack.pack_2bit_u8), (1, BitPack.pack_1bit_u8)],
)
def test_a_row_is_packed_as_bitpack_packs_a_tensor(nbits: int, library: object) -> None:
    codes = torch.randint(0, 1 << nbits, (7, 64), dtype=torch.uint8)
    assert torch.equal(pack_rows(codes, nbits), library(codes.T).T)  # pyright: ignore[reportCallIssue]


@pytest.mark.parametrize("nbits", [8, 4, 3, 2, 1])
@pytest.mark.parametrize("in_features", [1, 9, 80, 4096])
def test_packing_is_undone_and_wastes_nothing(nbits: int, in_features: int) -> None:
    codes = torch.randint(0, 1 << nbits, (5, in_features), dtype=torch.uint8)
    packed = pack_rows(codes, nbits)
    assert torch.equal(unpack_rows(packed, nbits, in_features), codes)
    # Whole bytes a row, twice for 3 bits.
    assert packed.shape == (5, packed_row_bytes(in_features, nbits))
    assert packed.shape[1] * 8 < in_features * nbits + 16


def test_importing_hqq_says_nothing_and_leaves_the_warning_filters() -> None:
    code = (
        "import torch, warnings, fsdpq.protocols;"
        "warnings.simplefilter('always'); before = list(warnings.filters);"
        "import fsdpq.quantization.hqq; assert list(warnings.filters) == before"
    )
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_groups_that_would_cross_rows_are_refused() -> None:
    with pytest.raises(CheckpointError, match="does not divide the 80 input features") as caught:
        HqqQuantizer(_options(4, 64)).packed_shapes(50, 80)
    assert caught.value.hint.startswith("use 16 or null")


def test_column_groups_that_do_not_divide_the_rows_are_refused() -> None:
    with pytest.raises(CheckpointError, match="does not divide the 80 output features") as caught:
        HqqQuantizer(_options(4, 64, axis=0)).packed_shapes(80, 64)
    assert caught.value.hint.startswith("use 16, or name")
    with pytest.raises(CheckpointError, match=r"needs a `quantization\.group_size`"):
        HqqQuantizer(_options(4, None, axis=0)).packed_shapes(64, 64)
