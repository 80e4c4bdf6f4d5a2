"""Do shards hold what the quantizer's library makes of the whole matrix, and train as it would?

The reference is the library itself on the same device, reached through the module that is its one
door.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard

from fsdpq.adapter.lora import LoraLinear
from fsdpq.dist import assign_own_rows, gather_whole, own_shard, rank, world_size
from fsdpq.fsdp.wrap import apply_gradient_sums
from fsdpq.model.quantized_linear import QuantizedLinear
from fsdpq.protocols import Quantizer
from fsdpq.recipe.sections.adapter import LoraOptions
from fsdpq.recipe.sections.quantization import BnbOptions, HqqOptions
from fsdpq.registry import is_installed, resolve_builder
from fsdpq.worker.self_test.check import (
    Bench,
    Check,
    CheckSkippedError,
    count_text,
    require_close,
    require_same_bytes,
)
from fsdpq.worker.self_test.groups import gather_group

Options = BnbOptions | HqqOptions
Shape = tuple[int, int]

SHAPES = ((37, 576), (1001, 192), (3, 64))
"""Rows that no number of ranks divides; second-level blocks that cross ranks; very few rows."""

HQQ_SHAPES = ((37, 192), (3, 64))
HQQ_ROWS_PER_BLOCK = 5
"""So few that blocks of rows are cut by the ranks' borders."""

LARGE_BLOCKS = (128, 256, 512, 1024, 2048, 4096)
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
TOLERANCE = 1e-5
"""fp32 sums in another order differ by about 1e-7 of their size."""

BATCH = 6
REMEDY = (
    "do not train with this quantizer here: choose another `quantization.kind`, or the versions in "
    "constraints.txt, and report this output"
)


@dataclass(frozen=True)
class WholeResult:
    """What a library makes of a whole matrix.

    Attributes:
        stored: its tensors by the names of `Quantizer.packed_shapes`, codes one a byte for hqq.
        dequantize: its own dequantization, to a given dtype.
    """

    stored: dict[str, Tensor]
    dequantize: Callable[[torch.dtype], Tensor]


def random_weight(shape: Shape, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Returns the same random matrix on all ranks."""
    generator = torch.Generator().manual_seed(shape[0])
    return torch.randn(shape, generator=generator).to(dtype).to(device)


def build_quantizer(options: Options, in_features: int) -> Quantizer:
    """Returns the quantizer of a recipe; hqq's with blocks that ranks cut."""
    quantizer = resolve_builder("quantization", options)(options)
    if isinstance(options, HqqOptions):
        quantizer.block_weights = in_features * HQQ_ROWS_PER_BLOCK
    return quantizer


def quantize_whole(weight: Tensor, options: Options) -> WholeResult:
    """Returns the library's result for a whole matrix, on the matrix's device."""
    by_library = _bnb_whole if isinstance(options, BnbOptions) else _hqq_whole
    return by_library(weight, options)  # pyright: ignore[reportArgumentType]


def _bnb_whole(weight: Tensor, options: BnbOptions) -> WholeResult:
    from fsdpq.quantization.bnb import bnb as library

    codes, state = library.quantize_4bit(
        weight,
        blocksize=options.block_size,
        quant_type=options.quant_type,
        compress_statistics=options.double_quant,
    )
    stored = {"codes": codes, "absmax": state.absmax}
    if state.state2 is not None:
        stored |= {"nested_absmax": state.state2.absmax, "nested_offset": state.offset}

    def dequantize(dtype: torch.dtype) -> Tensor:
        state.dtype = dtype
        return library.dequantize_4bit(codes, state)

    return WholeResult(stored, dequantize)


def _hqq_whole(weight: Tensor, options: HqqOptions) -> WholeResult:
    """Quantizes blocks of whole rows by hqq, scales rounded to fp16 as they are stored."""
    from fsdpq.quantization.hqq import HqqLibrary

    parts: dict[str, list[Tensor]] = {"codes": [], "scale": [], "zero": []}
    blocks: list[tuple[Tensor, dict[str, Any]]] = []
    for block in weight.split(HQQ_ROWS_PER_BLOCK):
        codes, meta = HqqLibrary.quantize(
            block, nbits=options.nbits, group_size=options.group_size,  # pyright: ignore[reportArgumentType]
            axis=1, bitpack=False, round_zero=options.nbits == 4, device=str(weight.device),
        )  # fmt: skip
        parts["codes"].append(codes.to(torch.uint8).reshape(block.shape))
        for name in ("scale", "zero"):
            meta[name] = meta[name].half()
            parts[name].append(meta[name].reshape(block.shape[0], -1))
        blocks.append((codes, meta))

    def dequantize(dtype: torch.dtype) -> Tensor:
        rows: list[Tensor] = []
        for codes, meta in blocks:
            scales = {name: meta[name].to(dtype) for name in ("scale", "zero")}
            rows.append(HqqLibrary.dequantize(codes, meta | scales | {"compute_dtype": dtype}))
        return torch.cat(rows)

    return WholeResult({name: torch.cat(tensors) for name, tensors in parts.items()}, dequantize)


def shard_quantized(options: Options, weight: Tensor, bench: Bench) -> QuantizedLinear:
    """Returns a layer whose rows were quantized by the ranks that own them.

    Ranks: all (collective).
    """
    layer = _meta_layer(options, weight)
    fully_shard(layer, mesh=bench.mesh)
    layer.to_empty(device=bench.device)
    fill_shards(layer, weight)
    return layer


def _meta_layer(options: Options, weight: Tensor) -> QuantizedLinear:
    out_features, in_features = weight.shape
    with torch.device("meta"):
        linear = nn.Linear(in_features, out_features, bias=False, dtype=weight.dtype)
    return QuantizedLinear(linear, quantizer=build_quantizer(options, in_features))


def fill_shards(layer: QuantizedLinear, weight: Tensor) -> None:
    """Quantizes this rank's rows of ``weight`` in place; ranks: all (collective)."""
    shards = {name: own_shard(getattr(layer, name)) for name in layer.packed_names}
    shape = (layer.out_features, layer.in_features)
    layer.quantizer.quantize_shards(lambda start, stop: weight[start:stop], shape, shards)


def check_shards(bench: Bench, cases: tuple[Options, ...]) -> str:
    """Compares every gathered byte with the library's whole matrix."""
    num_bytes = num_matrices = 0
    for options in cases:
        for shape, dtype in _matrices(options):
            weight = random_weight(shape, dtype, bench.device)
            expected = quantize_whole(weight, options).stored
            gathered = gather_group(shard_quantized(options, weight, bench))
            for name, tensor in expected.items():
                found = _one_code_a_byte(gathered[name], shape, options, name)
                what = f"`{name}` of a {shape[0]} x {shape[1]} matrix"
                num_bytes += require_same_bytes(what, found, tensor)
            num_matrices += 1
    return f"{count_text(num_bytes)} of {num_matrices} matrices equal the library's"


def check_dequantize(bench: Bench, cases: tuple[Options, ...]) -> str:
    """Compares the dequantized weights with the library's, bit for bit."""
    for options in cases:
        shape, dtype = next(_matrices(options))
        weight = random_weight(shape, dtype, bench.device)
        expected = quantize_whole(weight, options)
        layer = shard_quantized(options, weight, bench)
        gathered = gather_group(layer)
        packed = tuple(gathered[name] for name in layer.packed_names)
        for to_dtype in DTYPES:
            what = f"the weight in {_short(to_dtype)}"
            found = layer.dequantize(packed, to_dtype)
            require_same_bytes(what, found, expected.dequantize(to_dtype))
    return f"{', '.join(_short(dtype) for dtype in DTYPES)}: bits equal the library's"


class AdaptedGroup(nn.Module):
    """A norm in bf16, a quantized linear and its LoRA: one FSDP group of three dtypes."""

    def __init__(self, layer: QuantizedLinear) -> None:
        super().__init__()
        norm = torch.empty(layer.in_features, dtype=torch.bfloat16, device="meta")
        self.norm = nn.Parameter(norm, requires_grad=False)
        self.linear = LoraLinear(layer, LoraOptions(kind="lora", rank=4, alpha=8.0))

    def forward(self, x: Tensor) -> Tensor:
        """Maps ``(..., in_features)`` to ``(..., out_features)``."""
        return self.linear(x * self.norm.to(x.dtype))


def check_gradient(bench: Bench, cases: tuple[Options, ...]) -> str:
    """Compares output and gradients over all ranks with plain torch on the library's weight."""
    worst = 0.0
    for options in cases:
        shape, dtype = next(_matrices(options))
        weight = random_weight(shape, dtype, bench.device)
        whole = quantize_whole(weight, options).dequantize(torch.float32)
        given = _given_tensors(shape, bench.device)
        expected = _plain_gradients(whole, given)
        found = _sharded_gradients(options, weight, given, bench)
        for name, tensor in expected.items():
            what = f"the {name}" if name == "output" else f"the gradient of {name}"
            worst = max(worst, require_close(what, found[name], tensor, tolerance=TOLERANCE))
    return f"output, input and LoRA within {worst:.0e} of plain torch (at most {TOLERANCE:.0e})"


def _given_tensors(shape: Shape, device: torch.device) -> dict[str, Tensor]:
    """Returns inputs, LoRA matrices, norm and the gradient of the output, the same on all ranks."""
    generator = torch.Generator().manual_seed(11)
    num_rows, (out_features, in_features) = BATCH * world_size(), shape
    shapes = {
        "x": (num_rows, in_features),
        "lora_A": (4, in_features),
        "lora_B": (out_features, 4),
        "norm": (in_features,),
        "grad_output": (num_rows, out_features),
    }
    given = {name: torch.randn(s, generator=generator).to(device) for name, s in shapes.items()}
    return given | {"norm": given["norm"].to(torch.bfloat16)}


def _plain_gradients(weight: Tensor, given: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Returns output and gradients by autograd, unsharded; LoRA's scale is alpha / rank = 2."""
    x, a, b = (given[name].clone().requires_grad_() for name in ("x", "lora_A", "lora_B"))
    normed = x * given["norm"].float()
    output = normed @ weight.T + 2.0 * (normed @ a.T @ b.T)
    output.backward(given["grad_output"])
    grads = {"x": x.grad, "lora_A": a.grad, "lora_B": b.grad}
    return {"output": output.detach()} | {n: g for n, g in grads.items() if g is not None}


def _sharded_gradients(
    options: Options, weight: Tensor, given: Mapping[str, Tensor], bench: Bench
) -> dict[str, Tensor]:
    """Returns the same of a sharded group; each rank computes its part of the batch."""
    group = AdaptedGroup(_meta_layer(options, weight))
    fully_shard(group, mesh=bench.mesh)
    apply_gradient_sums(group)
    group.to_empty(device=bench.device)
    linear = group.linear
    fill_shards(linear.base, weight)  # pyright: ignore[reportArgumentType]
    assign_own_rows(linear.lora_A, given["lora_A"])
    assign_own_rows(linear.lora_B, given["lora_B"])
    assign_own_rows(group.norm, given["norm"])
    own = slice(BATCH * rank(), BATCH * (rank() + 1))
    x = given["x"][own].clone().requires_grad_()
    output = group(x)
    output.backward(given["grad_output"][own])
    rows = {"output": output.detach(), "x": _gradient(x)}
    gathered = {name: _gather_batch(tensor, bench) for name, tensor in rows.items()}
    trained = {"lora_A": linear.lora_A, "lora_B": linear.lora_B}
    return gathered | {name: gather_whole(_gradient(p)) for name, p in trained.items()}


def _gather_batch(rows: Tensor, bench: Bench) -> Tensor:
    whole = rows.new_empty(rows.shape[0] * world_size(), *rows.shape[1:])
    torch.distributed.all_gather_into_tensor(whole, rows.contiguous(), group=bench.mesh.get_group())
    return whole


def _gradient(tensor: Tensor) -> Tensor:
    if tensor.grad is None:
        raise RuntimeError("backward left no gradient")
    return tensor.grad


def _matrices(options: Options) -> Iterator[tuple[Shape, torch.dtype]]:
    """Yields shape and dtype of the matrices that a case is tried with."""
    if isinstance(options, BnbOptions) and options.block_size > 64:
        yield (5, 2 * options.block_size), torch.bfloat16
        return
    shapes = HQQ_SHAPES if isinstance(options, HqqOptions) else SHAPES
    yield shapes[0], torch.float32
    for shape in shapes:
        yield shape, torch.bfloat16


def _one_code_a_byte(found: Tensor, shape: Shape, options: Options, name: str) -> Tensor:
    if name != "codes" or not isinstance(options, HqqOptions):
        return found
    from fsdpq.quantization.hqq import unpack_rows

    return unpack_rows(found, options.nbits, shape[1])


def _short(dtype: torch.dtype) -> str:
    return {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}[dtype]


def _bnb(**fields: Any) -> BnbOptions:
    return BnbOptions.model_validate({"kind": "bnb"} | fields)


def _hqq(nbits: int) -> HqqOptions:
    return HqqOptions.model_validate({"kind": "hqq", "nbits": nbits})


CASES: dict[str, tuple[Options, ...]] = {
    "bnb nf4": (_bnb(double_quant=False),),
    "bnb nf4, double": (_bnb(),),
    "bnb fp4": (_bnb(quant_type="fp4", double_quant=False),),
    "bnb fp4, double": (_bnb(quant_type="fp4"),),
    "bnb blocks to 4096": tuple(_bnb(block_size=size) for size in LARGE_BLOCKS),
    **{f"hqq {nbits} bit": (_hqq(nbits),) for nbits in (8, 4, 3, 2, 1)},
}
"""Quantizers by the name that their checks go under."""

PACKAGES = {"bnb": "bitsandbytes", "hqq": "hqq"}
EXTRAS = {"bnb": "pip install bitsandbytes", "hqq": "pip install 'fsdpq[hqq]'"}


def _if_installed(
    compare: Callable[[Bench, tuple[Options, ...]], str], cases: tuple[Options, ...], bench: Bench
) -> str:
    kind = cases[0].kind
    if not is_installed(PACKAGES[kind]):
        raise CheckSkippedError(f"`{PACKAGES[kind]}` is not installed: {EXTRAS[kind]}")
    return compare(bench, cases)


CHECKS = tuple(
    Check(group, name, functools.partial(_if_installed, compare, cases), REMEDY)
    for group, compare in (
        ("shards against the library's whole matrix", check_shards),
        ("dequantized weights against the library's", check_dequantize),
        ("gradients against plain torch", check_gradient),
    )
    for name, cases in CASES.items()
)
