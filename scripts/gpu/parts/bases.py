"""Are a base's bytes the library's, wherever its shards lie?"""

from __future__ import annotations

from typing import Any

import bitsandbytes.functional as bnb
import torch

from fsdpq.dist import own_shard, start_process_group
from fsdpq.model.quantized_linear import QuantizedLinear
from fsdpq.worker.bench.shapes import Batch, with_layers
from fsdpq.worker.random_base import random_weight
from scripts.gpu.parts import Bench
from scripts.gpu.training import build_trainer, measure


def run(bench: Bench) -> None:
    """Compares NF4 with double quantization, on the device and in host memory."""
    device = start_process_group(bench.device.type)
    for offload in ("none", "cpu"):
        name = f"offload {offload}"
        bench.rows.attempt(name, _compare, bench, device, offload)


def _compare(bench: Bench, device: torch.device, offload: str) -> dict[str, Any]:
    shape, tokens = with_layers(bench.shape("7b"), 2), bench.tokens(2048)
    sections = {"fsdp": {"offload": offload}}
    trainer = build_trainer(shape, tokens, device, lora_rank=16, sections=sections)
    num_bytes = different = 0
    for name, layer in trainer.model.hf.named_modules():
        if not isinstance(layer, QuantizedLinear):
            continue
        weight_name = f"{name.removesuffix('.base')}.weight"
        size = (layer.out_features, layer.in_features)
        weight = random_weight(weight_name, size, dtype=torch.bfloat16, device=device)
        codes, state = bnb.quantize_4bit(weight, quant_type="nf4", compress_statistics=True)
        expected = {
            "codes": codes, "absmax": state.absmax, "nested_absmax": state.state2.absmax,
            "nested_offset": state.offset.reshape(1),
        }  # fmt: skip
        for part, tensor in expected.items():
            ours = own_shard(getattr(layer, part)).rows.flatten().cpu()
            theirs = tensor.contiguous().reshape(-1).view(torch.uint8).cpu()
            num_bytes += theirs.numel()
            different += int((ours != theirs).sum())
    found = measure(trainer, Batch(1, tokens), rounds=1)
    return {"bytes": num_bytes, "different": different, "losses": found["losses"]}
