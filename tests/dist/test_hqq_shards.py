"""Codes, scales and zeros gathered from all ranks are those of hqq on blocks of whole rows."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch
from hqq.core.bitpack import BitPack
from hqq.core.quantize import Quantizer as HqqLibrary
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from fsdpq.dist import own_shard, world_size
from fsdpq.errors import CheckpointError
from fsdpq.model.quantized_linear import QuantizedLinear
from fsdpq.quantization.hqq import HqqQuantizer, pack_rows, packed_row_bytes, unpack_rows
from fsdpq.recipe.sections.quantization import HqqOptions
from support.imports import ROOT
from support.ranks import RankPool

# Rows that divide by nothing, an odd number of groups, a row that is no multiple of 8 codes; fewer
# rows than ranks.
SHAPES = [(37, 192), (50, 80), (3, 64)]
BLOCK_WEIGHTS = 192 * 5
"""So few that blocks of rows are cut by the ranks' borders, and the last one is short."""


def _weight(shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
    generator = torch.Generator().manual_seed(shape[0])
    return torch.randn(shape, generator=generator).to(dtype)


def _options(nbits: int, group_size: int | None) -> HqqOptions:
    document = {"kind": "hqq", "nbits": nbits, "group_size": group_size}
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
    """hqq on each block of rows, and hqq's own dequantization of its codes, scales in fp16."""
    step = BLOCK_WEIGHTS // weight.shape[1]
    answers: dict[str, list[Tensor]] = {"codes": [], "scale": [], "zero": [], "weight": []}
    for block in weight.split(step):
        codes, meta = HqqLibrary.quantize(
            block, nbits=options.nbits, group_size=options.group_size,
            axis=1, bitpack=False, device="cpu",
        )  # fmt: skip
        meta["compute_dtype"] = weight.dtype
        for name in ("scale", "zero"):
            answers[name].append(meta[name].half().reshape(block.shape[0], -1))
            meta[name] = meta[name].half().to(weight.dtype)
        answers["codes"].append(codes.to(torch.uint8).reshape(block.shape))
        answers["weight"].append(HqqLibrary.dequantize(codes, meta))
    return {name: torch.cat(parts) for name, parts in answers.items()}


@pytest.mark.parametrize("nbits", [8, 4, 3, 2, 1])
@pytest.mark.parametrize("group_size", [16, None])
def test_gathered_shards_equal_hqq_on_blocks_of_rows(
    ranks: RankPool, nbits: int, group_size: int | None
) -> None:
    options = _options(nbits, group_size)
    dtype = torch.bfloat16 if nbits == 4 else torch.float32
    for shape in SHAPES:
        expected = _reference(_weight(shape, dtype), options)
        for num_ranks in (1, 2, 3, 4):
            for answer in ranks.run(num_ranks, gather_quantized, shape, dtype, options):
                codes = unpack_rows(answer["codes"], nbits, shape[1])
                assert torch.equal(codes, expected["codes"]), (shape, num_ranks)
                for name in ("scale", "zero"):
                    assert torch.equal(answer[name].view(torch.float16), expected[name])
                assert torch.equal(answer["product"], expected["weight"]), (shape, num_ranks)
                assert torch.equal(answer["some"], expected["weight"][1:3])


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
