"""The decoder layers of a model under a recipe, as operations on the tokens of a micro-batch."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from fsdpq.errors import CheckpointError
from fsdpq.plan.costs.expansion import layer_sources
from fsdpq.plan.costs.parameters import DTYPE_BYTES, HeldGroup, HeldParameter, choice_of
from fsdpq.plan.device.attention import Attention, Kernel
from fsdpq.plan.device.experts import Experts
from fsdpq.plan.device.layer import Layer, Layout
from fsdpq.plan.device.operations import FP32_BYTES, Linear, Norm, Sizes
from fsdpq.plan.device.passes import Passes, passes_of
from fsdpq.plan.shape import GroupShape, ModelShape, TensorShape
from fsdpq.plan.weights import GroupWeights, Weights
from fsdpq.plan.workload import Workload
from fsdpq.recipe.precision import precision_of
from fsdpq.recipe.root import Recipe
from fsdpq.recipe.sections.adapter import LlamaProOptions, LoraOptions
from fsdpq.recipe.sections.quantization import BnbOptions, HqqOptions, QuantizationOptions

PARALLEL = ("gpt_neox",)
"""Architectures of two norms whose attention and feed-forward run beside each other."""

COMPOSED_GELU = ("phi",)
"""Those whose activation transformers computes in eight operations (``gelu_new``)."""

NORMS_AFTER = ("olmo2", "olmo3")
"""Those that norm what attention and feed-forward give, not what they get."""


@dataclass(frozen=True)
class PlannedLayer:
    """One decoder layer of a run.

    Attributes:
        weights: what its group stores.
        passes: what it holds in each way to run it, for one chunk of a micro-batch.
        recomputed: backward computes it again.
        is_trained: it, or something below it, has trained weights.
        keeps_input: where it is not computed again, its graph keeps its input.
        norm: of it.
    """

    weights: GroupWeights
    passes: Passes
    recomputed: bool
    is_trained: bool
    keeps_input: bool
    norm: Norm


def sizes_of(recipe: Recipe) -> Sizes:
    """Returns the bytes of elements under a resolved recipe."""
    precision = precision_of(recipe)
    return Sizes(
        on_cpu=recipe.launch.device == "cpu",
        hidden=DTYPE_BYTES[precision.base],
        compute=DTYPE_BYTES[precision.compute],
        trained=DTYPE_BYTES[precision.param],
        weight=DTYPE_BYTES[precision.base],
    )


def build_layers(
    recipe: Recipe, shape: ModelShape, weights: Weights, work: Workload
) -> tuple[PlannedLayer, ...]:
    """Returns the decoder layers of a run, in order."""
    step = {"full": 1, "selective": 2, "none": 0}[recipe.fsdp.activation_checkpointing]
    kinds: dict[tuple[int, bool], tuple[GroupWeights, Passes, Layer]] = {}
    layers: list[PlannedLayer] = []
    choice = choice_of(recipe, shape)
    trained_below = _embedding_is_trained(weights)
    for number, (index, source, is_new) in enumerate(_positions(recipe, shape)):
        key = (index, is_new)
        if key not in kinds:
            group = _weights_of(weights, index, is_new=is_new)
            held = choice.held(shape.groups[index], source, is_new=is_new)
            layer = _layer_of(recipe, shape, work, shape.groups[index], held)
            kinds[key] = (group, _passes_of(layer), layer)
        group, passes, layer = kinds[key]
        is_trained = trained_below or group.whole.trained > 0
        recomputed = step > 0 and number % step == 0
        keeps = trained_below and layer.keeps_input
        layers.append(PlannedLayer(group, passes, recomputed, is_trained, keeps, layer.norm))
        trained_below = is_trained
    return tuple(layers)


@functools.lru_cache(maxsize=256)
def _passes_of(layer: Layer) -> Passes:
    return passes_of(layer.run, hidden_bytes=layer.hidden_bytes)


def _embedding_is_trained(weights: Weights) -> bool:
    return any(group.whole.trained > 0 for group in weights.groups if group.name == "embedding")


def _positions(recipe: Recipe, shape: ModelShape) -> list[tuple[int, int, bool]]:
    """Returns for each layer its group in the shape, the base's layer, and whether it is new."""
    by_number: dict[int, int] = {}
    start = 0
    for index, group in enumerate(shape.groups):
        if group.name == "layer":
            numbers = group.indices or range(start, start + group.count)
            by_number |= dict.fromkeys(numbers, index)
            start += group.count
    sources: Iterable[int] = sorted(by_number)
    if isinstance(recipe.adapter, LlamaProOptions):
        sources = layer_sources(recipe.adapter, shape.num_layers)
    found: list[tuple[int, int, bool]] = []
    before = -1
    for source in sources:
        found.append((by_number[source], source, source == before))
        before = source
    return found


def _weights_of(weights: Weights, index: int, *, is_new: bool) -> GroupWeights:
    """Returns the largest group of that kind: a recipe may treat single layers in other ways."""
    groups = [g for g in weights.layers if g.index == index and g.is_new == is_new]
    return max(groups, key=lambda group: (group.gathered_bytes, group.shard.total))


def _layer_of(
    recipe: Recipe, shape: ModelShape, work: Workload, group: GroupShape, held: HeldGroup
) -> Layer:
    sizes = sizes_of(recipe)
    by_name = {parameter.name: parameter for parameter in held.parameters}
    linears = {
        tensor.name: _linear_of(recipe, tensor, by_name, sizes)
        for tensor in group.tensors
        if tensor.kind == "linear"
    }
    entering, leaving = _split(shape, {n: x for n, x in linears.items() if _is_attention(n)})
    into, out_of = _split(shape, {n: x for n, x in linears.items() if not _is_attention(n)})
    if leaving is None:
        raise CheckpointError(
            f"the attention of `{shape.name}` has no known output projection: its memory cannot be "
            "planned",
            hint="name a model whose family `fsdpq kinds family` lists",
        )
    norm = _norm_of(shape, group, by_name)
    return Layer(
        tokens=work.chunk_tokens,
        hidden_size=shape.hidden_size,
        sizes=sizes,
        attention=_attention_of(recipe, shape, work, sizes),
        entering=entering,
        leaving=leaving,
        into=into,
        out_of=out_of,
        gated=shape.gated,
        experts=_experts_of(recipe, shape, group, by_name, sizes),
        norm=norm,
        layout=_layout_of(shape),
        shares_norm=shape.layer_norms == 1,
        composed_gelu=shape.model_type in COMPOSED_GELU,
        qk_norm=norm if shape.qk_norm != "none" else None,
    )


def _split(
    shape: ModelShape, linears: dict[str, Linear]
) -> tuple[tuple[Linear, ...], Linear | None]:
    """Returns the linear layers that read the residual stream, and the one that writes to it.

    Files sort tensors by name; the one that writes is known by its name, or else is the last.
    """
    names = list(linears)
    written = [n for n in names if n.removesuffix(".weight") in shape.residual_linears]
    last = (written or names)[-1] if names else None
    return (
        tuple(layer for name, layer in linears.items() if name != last),
        None if last is None else linears[last],
    )


def _attention_of(recipe: Recipe, shape: ModelShape, work: Workload, sizes: Sizes) -> Attention:
    return Attention(
        kernel=kernel_of(recipe, shape),
        rows=work.chunk_rows,
        seq_len=work.seq_len,
        heads=shape.num_attention_heads,
        kv_heads=shape.num_key_value_heads,
        head_dim=shape.head_dim,
        element=sizes.compute,
        softcap=shape.model_type == "gemma2",
    )


def _layout_of(shape: ModelShape) -> Layout:
    if shape.layer_norms == 1 or shape.model_type in PARALLEL:
        return "parallel"
    if shape.layer_norms > 2:
        return "both"
    return "after" if shape.model_type in NORMS_AFTER else "before"


def _norm_of(shape: ModelShape, group: GroupShape, by_name: dict[str, HeldParameter]) -> Norm:
    biased = any(tensor.name.endswith("norm.bias") for tensor in group.tensors)
    trained = any(p.use == "trained" and "norm" in name for name, p in by_name.items())
    in_fp32 = shape.model_type.startswith((*NORMS_AFTER, "gemma"))
    return Norm("layer" if biased else "rms_fp32" if in_fp32 else "rms", trained)


def _is_attention(name: str) -> bool:
    return "attn" in name or "attention" in name


def kernel_of(recipe: Recipe, shape: ModelShape) -> Kernel:
    """Returns what computes attention.

    Packed documents are computed by themselves, but in compiled layers, which are given a mask.
    torch's kernels for GPUs that hold no scores take fp32 only where each query head has its own
    keys (torch 2.13, ``aten/src/ATen/native/transformers/cuda/sdp_utils.cpp``).
    """
    implementation, on_cpu = recipe.model.attn_implementation, recipe.launch.device == "cpu"
    if implementation == "eager":
        return "eager"
    if implementation != "sdpa":
        return "flash"
    if recipe.data.packing != "none" and recipe.training.compile:
        return "masked"
    if on_cpu:
        return "flash_cpu"
    groups = shape.num_attention_heads > shape.num_key_value_heads
    return "eager" if groups and sizes_of(recipe).compute == FP32_BYTES else "flash"


def _linear_of(
    recipe: Recipe, tensor: TensorShape, by_name: dict[str, HeldParameter], sizes: Sizes
) -> Linear:
    out_features, in_features = tensor.shape
    name = tensor.name.removesuffix(".weight")
    quantized = f"{tensor.name}.codes" in by_name
    elements = out_features * in_features
    adapter = recipe.adapter
    has_adapter = isinstance(adapter, LoraOptions) and f"{name}.lora_A" in by_name
    return Linear(
        in_features,
        out_features,
        matrix_bytes=elements * sizes.compute if quantized else 0,
        unpacking_bytes=_unpacking(recipe.quantization, elements, sizes) if quantized else 0,
        bias=f"{name}.bias" in by_name,
        adapter=adapter.kind if isinstance(adapter, LoraOptions) and has_adapter else "none",
        rank=adapter.rank if isinstance(adapter, LoraOptions) and has_adapter else 0,
        dropout=isinstance(adapter, LoraOptions) and has_adapter and adapter.dropout > 0,
        trained=not quantized and by_name[tensor.name].use == "trained",
    )


def _unpacking(options: QuantizationOptions, elements: int, sizes: Sizes) -> int:
    """Returns the most that exists while a matrix is dequantized, the matrix included.

    bitsandbytes makes it in one kernel, after the scales. What hqq does is operations of torch on
    one byte a weight (`fsdpq.quantization.hqq`): of each piece of a packed row a shift and a mask,
    of 3 bits four tensors at once; with ``axis: 0`` packed rows are put in order before.
    """
    matrix = elements * sizes.compute
    match options:
        case BnbOptions():
            return matrix + (elements // options.block_size * 4 if options.double_quant else 0)
        case HqqOptions(nbits=nbits, axis=axis):
            unpacking = 4 * elements if nbits == 3 else elements + 2 * (elements * nbits // 8)
            in_order = elements * nbits // 8 if axis == 0 else 0
            return in_order + max(unpacking, elements + matrix)
        case _:
            return matrix


def _experts_of(
    recipe: Recipe,
    shape: ModelShape,
    group: GroupShape,
    by_name: dict[str, HeldParameter],
    sizes: Sizes,
) -> Experts | None:
    stacks: Sequence[TensorShape] = [t for t in group.tensors if t.kind == "experts"]
    if not stacks:
        return None
    quantized = [t for t in stacks if f"{t.name}.codes" in by_name]
    largest = max((t.num_weights // t.shape[0] for t in quantized), default=0)
    trained = sum(
        t.num_weights * sizes.weight
        for t in stacks
        if t.name in by_name and by_name[t.name].use == "trained"
    )
    return Experts(
        count=shape.num_experts,
        per_token=shape.num_experts_per_tok,
        hidden_size=shape.hidden_size,
        intermediate_size=shape.moe_intermediate_size,
        matrix_bytes=largest * sizes.compute,
        unpacking_bytes=_unpacking(recipe.quantization, largest, sizes) if largest else 0,
        trained_bytes=trained,
    )
