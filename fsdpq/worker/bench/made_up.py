"""A checkpoint in bf16 of a Llama's shape, made up without holding the model."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

from fsdpq.worker.bench.shapes import Shape

STD = 0.02
BLOCK = 1 << 22
BF16_BYTES = 2
MAX_FILE_BYTES = 5 * 10**9
"""Of one file, as checkpoints are published."""

Sizes = Mapping[str, tuple[int, ...]]


def write_made_up(directory: Path, shape: Shape, *, tokens: int = 2048) -> int:
    """Writes ``config.json`` and files of weights; returns the bytes of the weights.

    The values repeat after a few million: what is measured does not depend on them. Memory: a few
    megabytes.
    """
    directory.mkdir()
    config = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "dtype": "bfloat16"}
    (directory / "config.json").write_text(json.dumps(config | shape.config(tokens)))
    files = list(_files(shape))
    block = torch.randn(BLOCK, generator=torch.Generator().manual_seed(0)).mul_(STD).bfloat16()
    places = dict[str, str]()
    for number, sizes in enumerate(files, 1):
        file = f"model-{number:05}-of-{len(files):05}.safetensors"
        file = file if len(files) > 1 else "model.safetensors"
        _write(directory / file, sizes, block, shift=104_729 * number)
        places |= dict.fromkeys(sizes, file)
    total = sum(_num_bytes(size) for sizes in files for size in sizes.values())
    if len(files) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": places}
        (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    return total


def _write(path: Path, sizes: Sizes, block: Tensor, *, shift: int) -> None:
    """Writes one file: https://github.com/huggingface/safetensors#format."""
    header, offset = dict[str, object](__metadata__={"format": "pt"}), 0
    for name, size in sizes.items():
        stop = offset + _num_bytes(size)
        header[name] = {"dtype": "BF16", "shape": size, "data_offsets": [offset, stop]}
        offset = stop
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    values = memoryview(block.view(torch.uint8).numpy().tobytes())
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for number, size in enumerate(sizes.values()):
            start = (shift + number * 7919) * BF16_BYTES % len(values)
            left = _num_bytes(size)
            while left:
                piece = values[start : start + left]
                file.write(piece)
                left, start = left - len(piece), 0


def _num_bytes(size: tuple[int, ...]) -> int:
    return math.prod(size) * BF16_BYTES


def _files(shape: Shape) -> Iterator[Sizes]:
    """Yields the tensors of each file."""
    sizes: dict[str, tuple[int, ...]] = {}
    for name, size in _tensors(shape):
        if sum(map(_num_bytes, sizes.values())) + _num_bytes(size) > MAX_FILE_BYTES:
            yield sizes
            sizes = {}
        sizes[name] = size
    yield sizes


def _tensors(shape: Shape) -> Iterator[tuple[str, tuple[int, ...]]]:
    table = (shape.vocab, shape.hidden)
    yield "model.embed_tokens.weight", table
    for index in range(shape.layers):
        prefix = f"model.layers.{index}"
        for name, size in shape.linears.items():
            part = "self_attn" if name in ("q_proj", "k_proj", "v_proj", "o_proj") else "mlp"
            yield f"{prefix}.{part}.{name}.weight", size
        for name in ("input_layernorm", "post_attention_layernorm"):
            yield f"{prefix}.{name}.weight", (shape.hidden,)
    yield "model.norm.weight", (shape.hidden,)
    yield "lm_head.weight", table
