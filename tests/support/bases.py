"""Writes a quantized base of a tiny model, and loads models from it."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from fsdpq.tensor_files.base_manifest import Key, base_key, read_manifest
from fsdpq.worker.assemble import Assembled, assemble_model
from fsdpq.worker.base import QuantizedBase
from fsdpq.worker.quantize import write_recipe_base
from support.tiny import tiny_recipe

CPU = torch.device("cpu")


def write(directory: Path, out: Path, sections: dict[str, Any]) -> None:
    """Writes the base of the tiny recipe's model into ``out``.

    Ranks: all (collective).
    """
    if dist.get_rank() == 0:
        out.mkdir()
    dist.barrier()
    recipe = tiny_recipe(**sections)
    key = key_of(directory, sections)
    write_recipe_base(
        recipe, directory, out, key=key, device=CPU, report=lambda _done, _total: None
    )


def key_of(directory: Path, sections: dict[str, Any]) -> Key:
    """Returns the key of the tiny recipe's base."""
    recipe = tiny_recipe(**sections)
    sha256 = hashlib.sha256((directory / "model.safetensors").read_bytes()).hexdigest()
    return base_key(
        model={"sha256": sha256, "revision": None, "source": str(directory)},
        quantization=recipe.quantization.model_dump(mode="json"),
        dtype=recipe.model.dtype,
        device="cpu",
    )


def assemble_from(
    base: Path | None, directory: Path, sections: dict[str, Any], key: Key | None = None
) -> Assembled:
    """Returns the tiny recipe's model, loaded from a base, or from its checkpoint.

    Ranks: all (collective).
    """
    return assemble_model(
        tiny_recipe(**sections),
        directory,
        device=CPU,
        report_load=lambda _done, _total: None,
        base=None if base is None else QuantizedBase(base, key or read_manifest(base).key),
    )


def gather(assembled: Assembled) -> dict[str, Tensor]:
    """Returns every parameter and buffer, whole.

    Ranks: all (collective).
    """
    named = (*assembled.model.named_parameters(), *assembled.model.named_buffers())
    return {
        name: value.full_tensor() if hasattr(value, "full_tensor") else value  # pyright: ignore
        for name, value in ((name, tensor.detach()) for name, tensor in named)
    }
