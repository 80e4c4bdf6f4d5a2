"""Rates of copies between host and device, of matrix products, and of dequantizing."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fsdpq.dist import Shard
from fsdpq.metrics.peaks import synchronize
from fsdpq.registry import resolve_builder
from fsdpq.worker.bench.contenders import ContenderOptions, MatmulRate, recipe_of
from fsdpq.worker.bench.shapes import Batch
from scripts.gpu.parts import Bench


def run(bench: Bench) -> None:
    """Writes all rates."""
    rows = bench.rows
    rows.attempt("machine", _machine, bench.device)
    rows.attempt("copies, GB/s", _copies, bench)
    for name in ("7b", "70b"):
        rows.attempt(f"matrix products, {name}", _products, bench, name)
    for kind in ("bnb", "hqq"):
        rows.attempt(f"dequantize, {kind}", _dequantize, bench, kind)


def _machine(device: torch.device) -> dict[str, Any]:
    import os

    import bitsandbytes
    import peft
    import transformers

    found: dict[str, Any] = {
        "torch": torch.__version__, "transformers": transformers.__version__,
        "peft": peft.__version__, "bitsandbytes": bitsandbytes.__version__,
        "cores": os.cpu_count(),
    }  # fmt: skip
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        found |= {
            "gpu": properties.name, "gpu_gib": properties.total_memory / 2**30,
            "cuda": torch.version.cuda, "nccl": torch.cuda.nccl.version(),
        }  # fmt: skip
    return found


def seconds_of(function: Callable[[], Any], device: torch.device, rounds: int = 5) -> float:
    """Returns the median seconds of ``function``, waited for."""
    function()
    found = []
    for _ in range(rounds):
        synchronize(device)
        started = time.perf_counter()
        function()
        synchronize(device)
        found.append(time.perf_counter() - started)
    return statistics.median(found)


def _copies(bench: Bench) -> dict[str, float]:
    size, device = (1 << 20 if bench.tiny else 1 << 30), bench.device
    on_cuda = device.type == "cuda"
    far = torch.empty(size, dtype=torch.uint8, device=device)
    other = torch.empty_like(far)
    plain = torch.ones(size, dtype=torch.uint8)
    plain_too = torch.ones(size, dtype=torch.uint8)
    started = time.perf_counter()
    pinned = torch.empty(size, dtype=torch.uint8, pin_memory=on_cuda)
    pin_s = time.perf_counter() - started
    pinned_too = torch.empty(size, dtype=torch.uint8, pin_memory=on_cuda)

    def both() -> None:
        far.copy_(pinned, non_blocking=True)
        if on_cuda:
            with torch.cuda.stream(stream):
                pinned_too.copy_(other, non_blocking=True)

    stream = torch.cuda.Stream() if on_cuda else None
    timed: dict[str, Callable[[], Any]] = {
        "host to device, pinned": lambda: far.copy_(pinned, non_blocking=True),
        "device to host, pinned": lambda: pinned.copy_(far, non_blocking=True),
        "host to device, not pinned": lambda: far.copy_(plain),
        "device to host, not pinned": lambda: plain.copy_(far),
        "each way at once, pinned": both,
        "device to device": lambda: far.copy_(other),
        "host to host": lambda: plain.copy_(plain_too),
    }
    found = {name: size / seconds_of(each, device) / 1e9 for name, each in timed.items()}
    return found | {"pinning": size / pin_s / 1e9}


def _products(bench: Bench, name: str) -> dict[str, float]:
    rate = MatmulRate(bench.shape(name), torch.bfloat16, bench.device.type)
    batch = Batch(1, bench.tokens(2048))
    rate.flops_per_s(batch)
    return {"tflops": statistics.median(rate.flops_per_s(batch) for _ in range(3)) / 1e12}


def _dequantize(bench: Bench, kind: str) -> dict[str, float]:
    """Returns the rate of making bf16 of a matrix of the feed-forward network of 70B."""
    shape, device = bench.shape("70b"), bench.device
    size = (shape.ffn, shape.hidden)
    options = ContenderOptions(shape, None, "bf16", device.type, 8, 64)
    quantization = {"kind": kind} | ({"nbits": 4} if kind == "hqq" else {})
    recipe = recipe_of(options, quantization=quantization)
    quantizer = resolve_builder("quantization", recipe.quantization)(recipe.quantization)
    packed: dict[str, Tensor] = {
        name: torch.empty(each, dtype=torch.uint8, device=device)
        for name, each in quantizer.packed_shapes(*size).items()
    }
    weight = torch.randn(size, dtype=torch.bfloat16, device=device)
    shards = {name: Shard(each, 0, each.shape[0]) for name, each in packed.items()}
    started = time.perf_counter()
    quantizer.quantize_shards(lambda start, stop: weight[start:stop], size, shards)
    synchronize(device)
    quantize_s = time.perf_counter() - started
    seconds = seconds_of(lambda: quantizer.dequantize(packed, size, torch.bfloat16), device)
    num_bytes = weight.nbytes + sum(each.nbytes for each in packed.values())
    return {
        "ms": seconds * 1e3, "gb_per_s": num_bytes / seconds / 1e9,
        "quantize_weights_per_s": weight.numel() / quantize_s,
    }  # fmt: skip
