"""Operations of decoder layers: norms, linear layers with adapters, rotary embeddings.

In the order and with the temporary tensors of transformers' modules (5.23,
``models/llama/modeling_llama.py``), `fsdpq.adapter` and `fsdpq.model.quantized_linear`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from fsdpq.plan.device.tape import Event, Tape, Tensor

FP32_BYTES = 4

COLUMN_CHUNK = 1 << 22
"""Elements whose products exist at once where DoRA sums columns (`fsdpq.adapter.dora_product`)."""


@dataclass(frozen=True)
class Sizes:
    """Bytes of an element, and what makes them.

    Attributes:
        on_cpu: torch's kernels for the CPU take no mixed dtypes: they copy first.
        hidden: of what flows between layers, ``model.dtype``.
        compute: of products.
        trained: of trained weights.
        weight: of plain weights in products, as they are gathered.
    """

    on_cpu: bool
    hidden: int
    compute: int
    trained: int
    weight: int


@dataclass(frozen=True)
class Linear:
    """A linear layer as a recipe has it.

    Attributes:
        in_features: of its input.
        out_features: of its output.
        matrix_bytes: of the dequantized matrix of its product, 0 where it is not quantized.
        unpacking_bytes: the most that exists while that matrix is made, itself included.
        bias: it has one.
        adapter: what is put around it.
        rank: of that.
        dropout: the adapter drops inputs.
        trained: the weight itself is trained.
    """

    in_features: int
    out_features: int
    matrix_bytes: int = 0
    unpacking_bytes: int = 0
    bias: bool = False
    adapter: Literal["none", "lora", "dora"] = "none"
    rank: int = 0
    dropout: bool = False
    trained: bool = False


FROZEN = Tensor(0, "plain")
"""A frozen weight: saved by operations, and counted as what it is."""


def linear(tape: Tape, x: Tensor, layer: Linear, *, tokens: int, sizes: Sizes) -> Tensor:
    """Returns the output of a linear layer; the caller still holds ``x``."""
    if layer.adapter == "dora":
        return _dora(tape, x, layer, tokens=tokens, sizes=sizes)
    if layer.adapter == "lora":
        return _lora(tape, x, layer, tokens=tokens, sizes=sizes)
    return _plain_linear(tape, x, layer, tokens=tokens, sizes=sizes)


def cast(
    tape: Tape, x: Tensor, num_bytes: int, *, category: Literal["recomputed", "attention"]
) -> Tensor:
    """Returns ``x`` in another dtype; the same memory where the dtype is the same."""
    if x.storage is not None and x.num_bytes == num_bytes:
        return tape.view(x)
    return tape.run(num_bytes, category, [x])


def _matrix(layer: Linear) -> Event:
    return ("dequantized", layer.matrix_bytes)


def _unpack(tape: Tape, layer: Linear) -> None:
    """Makes the matrix of a product, which the product then counts itself."""
    if layer.unpacking_bytes > layer.matrix_bytes:
        tape.pass_by("dequantized", layer.unpacking_bytes)


def _plain_linear(tape: Tape, x: Tensor, layer: Linear, *, tokens: int, sizes: Sizes) -> Tensor:
    num_bytes = tokens * layer.out_features * sizes.compute
    inputs = cast(tape, x, tokens * layer.in_features * sizes.compute, category="recomputed")
    if layer.trained:
        count = layer.in_features * layer.out_features
        weight = Tensor(count * sizes.weight, "gradients", needs_grad=True)
        output = tape.run(num_bytes, "recomputed", [inputs, weight], saves=[inputs, weight])
    elif layer.matrix_bytes:
        _unpack(tape, layer)
        matrix = _matrix(layer)
        output = tape.run(num_bytes, "recomputed", [inputs], beside=matrix, backward=matrix)
        if layer.bias:
            product, output = output, tape.run(num_bytes, "recomputed", handed=[output])
            tape.drop(product)
    else:
        output = tape.run(num_bytes, "recomputed", [inputs], saves=[FROZEN])
    tape.drop(inputs)
    return output


def _adapter_weight(tape: Tape, count: int, sizes: Sizes) -> Tensor:
    """Returns an adapter's matrix in the dtype of the product."""
    leaf = Tensor(count * sizes.trained, "gradients", needs_grad=True)
    if sizes.trained == sizes.compute:
        return leaf
    return tape.run(count * sizes.compute, "recomputed", [leaf])


def _lora(tape: Tape, x: Tensor, layer: Linear, *, tokens: int, sizes: Sizes) -> Tensor:
    size, rank = sizes.compute, layer.rank
    inputs = cast(tape, x, tokens * layer.in_features * size, category="recomputed")
    dropped = _dropout(tape, inputs, sizes) if layer.dropout else inputs
    a = _adapter_weight(tape, rank * layer.in_features, sizes)
    inner = tape.run(tokens * rank * size, "recomputed", [dropped, a], saves=[dropped, a])
    tape.drop(a)
    scaled = tape.run(tokens * rank * size, "recomputed", [inner])
    tape.drop(inner)
    b = _adapter_weight(tape, rank * layer.out_features, sizes)
    num_bytes = tokens * layer.out_features * size
    addition = tape.run(num_bytes, "recomputed", [scaled, b], saves=[scaled, b])
    tape.drop(b)
    if layer.matrix_bytes:
        _unpack(tape, layer)
        output = tape.add_to(addition, [inputs], beside=_matrix(layer))
    else:
        output = tape.run(num_bytes, "recomputed", [inputs], handed=[addition], saves=[FROZEN])
        tape.drop(addition)
    tape.drop(scaled, inputs)
    if layer.dropout:
        tape.drop(dropped)
    return output


def _dropout(tape: Tape, x: Tensor, sizes: Sizes) -> Tensor:
    """Returns what is left of ``x``; backward keeps a mask, of bytes on a GPU, else as ``x``."""
    mask = x.num_bytes if sizes.on_cpu else x.num_bytes // sizes.compute
    return tape.run(x.num_bytes, "recomputed", [x], saves_bytes=mask)


def _dora(tape: Tape, x: Tensor, layer: Linear, *, tokens: int, sizes: Sizes) -> Tensor:
    size, rank = sizes.compute, layer.rank
    in_bytes, out_bytes = (tokens * n * size for n in (layer.in_features, layer.out_features))
    inputs = cast(tape, x, in_bytes, category="recomputed")
    dropped, rest = inputs, None
    if layer.dropout:
        dropped = _dropout(tape, inputs, sizes)
        rest = tape.run(in_bytes, "recomputed", [dropped], handed=[inputs])
    a = _adapter_weight(tape, rank * layer.in_features, sizes)
    b = _adapter_weight(tape, rank * layer.out_features, sizes)
    magnitude = Tensor(layer.out_features * FP32_BYTES, "gradients", needs_grad=True)
    _unpack(tape, layer)
    copies = FP32_BYTES if sizes.on_cpu and size != FP32_BYTES else 0
    chunk = min(COLUMN_CHUNK, tokens * layer.out_features) * (size + copies)
    low = tokens * rank * size
    keeps_output = rest is None and not layer.bias and layer.out_features > layer.in_features
    # The gradient of the sum of both products, of the low-rank input twice, beside the matrix;
    # before the gradients of the inputs exist, columns are summed.
    during = max(chunk - in_bytes, out_bytes + 2 * low + layer.matrix_bytes)
    output = tape.run(
        out_bytes,
        "recomputed",
        [tensor for tensor in (dropped, rest, a, b, magnitude) if tensor is not None],
        saves=[dropped, a, b],
        saves_output=keeps_output,
        saves_bytes=low + (0 if keeps_output else out_bytes),
        beside=("dequantized", layer.matrix_bytes + (0 if keeps_output else out_bytes)),
        backward=("dequantized" if layer.matrix_bytes else "recomputed", during),
    )
    tape.drop(a, b, inputs)
    if rest is not None:
        tape.drop(dropped, rest)
    return output


@dataclass(frozen=True)
class Norm:
    """A norm over the last dimension.

    Attributes:
        kind: ``rms``, of operations that each pass over all of it; ``rms_fp32``, which multiplies
            by its weight before it rounds; ``layer``, of one kernel.
        trained: its weight is trained.
    """

    kind: Literal["rms", "rms_fp32", "layer"]
    trained: bool


def norm(tape: Tape, x: Tensor, kind: Norm, *, hidden: int) -> Tensor:
    """Returns the norm of ``x``; the caller still holds ``x``.

    Args:
        tape: records it.
        x: as it flows between layers.
        kind: of the norm.
        hidden: bytes of an element of ``x``.
    """
    if kind.kind == "layer":
        return tape.run(x.num_bytes, "recomputed", [x], saves=[x])
    elements = x.num_bytes // hidden
    wide = elements * FP32_BYTES
    x32 = cast(tape, x, wide, category="recomputed") if hidden != FP32_BYTES else tape.view(x)
    squares = tape.run(wide, "recomputed", [x32], saves=[x32], backward=("recomputed", 2 * wide))
    scale = tape.run(0, "recomputed", [squares])
    tape.drop(squares)
    normed = tape.run(
        wide, "recomputed", [x32, scale], saves=[x32, scale], backward=("recomputed", wide)
    )
    tape.drop(x32)
    if kind.kind == "rms_fp32":
        weighted = tape.run(
            wide, "recomputed", [normed], saves=[normed] if kind.trained else [FROZEN]
        )
        output = cast(tape, weighted, elements * hidden, category="recomputed")
        tape.drop(weighted, normed)
        return output
    rounded = cast(tape, normed, elements * hidden, category="recomputed")
    kept = [rounded] if kind.trained else [FROZEN]
    output = tape.run(elements * hidden, "recomputed", [rounded], saves=kept)
    tape.drop(rounded, normed)
    return output


def activate(tape: Tape, x: Tensor, *, composed: bool) -> Tensor:
    """Returns the activation of ``x``, which it takes over.

    Args:
        tape: records it.
        x: hidden layer of a feed-forward.
        composed: GELU by a tanh, written out (``transformers.activations.NewGELUActivation``).
    """
    size = x.num_bytes
    if not composed:
        output = tape.run(size, "recomputed", [x], saves=[x])
        tape.drop(x)
        return output
    half = tape.run(size, "recomputed", [x])
    cube = tape.run(size, "recomputed", [x], saves=[x], backward=("recomputed", 2 * size))
    part = tape.run(size, "recomputed", [cube])
    tape.drop(cube)
    total = tape.run(size, "recomputed", handed=[x, part])
    tape.drop(part)
    scaled = tape.run(size, "recomputed", [total])
    tape.drop(total)
    bent = tape.run(size, "recomputed", [scaled], saves_output=True)
    tape.drop(scaled)
    raised = tape.run(size, "recomputed", handed=[bent])
    tape.drop(bent)
    output = tape.run(size, "recomputed", [half, raised], saves=[half, raised])
    tape.drop(half, raised, x)
    return output


def rotary(tape: Tape, x: Tensor) -> Tensor:
    """Returns ``x`` turned by its positions; the caller still holds ``x``."""
    size = x.num_bytes
    straight = tape.run(size, "attention", [x], saves=[FROZEN])
    first, second = (tape.part(x, size // 2) for _ in range(2))
    negative = tape.run(size // 2, "attention", [second])
    turned = tape.run(size, "attention", handed=[negative, first])
    tape.drop(first, second, negative)
    across = tape.run(size, "attention", [turned], saves=[FROZEN])
    tape.drop(turned)
    output = tape.run(size, "attention", handed=[straight, across])
    tape.drop(straight, across)
    return output
