"""A checkpoint in bf16 of a Llama's shape, made up without holding the model."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from fsdpq.worker.bench.shapes import Shape

STD = 0.02
BLOCK = 1 << 22


def write_made_up(directory: Path, shape: Shape, *, tokens: int = 2048) -> int:
    """Writes ``config.json`` and a file of weights a layer; returns the bytes of the weights.

    The values repeat after a few million: what is measured does not depend on them. Memory: one
    layer, or the embedding.
    """
    directory.mkdir()
    config = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "dtype": "bfloat16"}
    (directory / "config.json").write_text(json.dumps(config | shape.config(tokens)))
    block = torch.randn(BLOCK, generator=torch.Generator().manual_seed(0)).mul_(STD).bfloat16()
    offset, total, places = 0, 0, dict[str, str]()
    for number, sizes in enumerate(_files(shape)):
        tensors: dict[str, Tensor] = {}
        for name, size in sizes.items():
            tensors[name] = _repeat(block, size, offset)
            offset = (offset + 7919) % BLOCK
        file = f"model-{number:05}.safetensors"
        save_file(tensors, directory / file, metadata={"format": "pt"})
        places |= dict.fromkeys(tensors, file)
        total += sum(tensor.nbytes for tensor in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": places}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    return total


def _files(shape: Shape) -> Iterator[dict[str, tuple[int, ...]]]:
    for index in range(shape.layers):
        prefix = f"model.layers.{index}"
        sizes: dict[str, tuple[int, ...]] = {}
        for name, size in shape.linears.items():
            part = "self_attn" if name in ("q_proj", "k_proj", "v_proj", "o_proj") else "mlp"
            sizes[f"{prefix}.{part}.{name}.weight"] = size
        for name in ("input_layernorm", "post_attention_layernorm"):
            sizes[f"{prefix}.{name}.weight"] = (shape.hidden,)
        yield sizes
    table = (shape.vocab, shape.hidden)
    yield {"model.embed_tokens.weight": table}
    yield {"lm_head.weight": table, "model.norm.weight": (shape.hidden,)}


def _repeat(block: Tensor, size: tuple[int, ...], offset: int) -> Tensor:
    out = torch.empty(size, dtype=block.dtype)
    flat, place = out.view(-1), 0
    while place < flat.numel():
        piece = block[offset : offset + flat.numel() - place]
        flat[place : place + piece.numel()] = piece
        place, offset = place + piece.numel(), 0
    return out
