"""Prints what an optimizer step on the host costs: ``make bench-optimizer``.

The trained weights are those of LoRA of rank 64 on every linear layer of Llama-2-70B, for some of
its 80 layers, as DTensors that FSDP2 sharded over one rank. Each way to do a step is timed in turn,
round after round, so that a busy machine slows all of them alike; the median counts. Beside the
time stands the traffic that the step cannot do without (gradient, weight and states read; weight
and states written), and the rate at which this machine copies memory with as many threads.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import CPUOffloadPolicy, fully_shard

from fsdpq.dist import own_shard
from fsdpq.optimizer.build import build_adam, build_adamw, build_sgd
from fsdpq.recipe.sections.optimizer import AdamOptions, AdamWOptions, SgdOptions
from fsdpq.training.step import clip_gradients

RANK = 64
HIDDEN, INNER, KEYS = 8192, 28672, 1024
LINEARS = (
    (HIDDEN, HIDDEN), (HIDDEN, KEYS), (HIDDEN, KEYS), (HIDDEN, HIDDEN),
    (HIDDEN, INNER), (HIDDEN, INNER), (INNER, HIDDEN),
)  # fmt: skip
"""Input and output features of the linear layers of a decoder layer of Llama-2-70B."""

NUM_LAYERS_70B = 80
COPY_BYTES = 256 << 20


def build_weights(num_layers: int) -> list[nn.Parameter]:
    """Returns matrices A and B with gradients, as a run with ``fsdp.offload: cpu`` holds them."""
    shapes = [shape for i, o in LINEARS for shape in ((RANK, i), (o, RANK))]
    layers = nn.ModuleList(
        nn.ParameterList(nn.Parameter(torch.empty(shape)) for shape in shapes)
        for _ in range(num_layers)
    )
    for layer in layers:
        fully_shard(layer, offload_policy=CPUOffloadPolicy(pin_memory=False))
    weights = list(layers.parameters())
    for weight in weights:
        own_shard(weight).rows.normal_(std=0.02)
        weight.grad = torch.full_like(weight, 1e-4)
    return weights


def time_ways(ways: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Returns the median seconds of each way, every way once a round; the first is warming up."""
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds + 1):
        for name, run in ways.items():
            started = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - started)
    return {name: statistics.median(each[1:]) for name, each in seconds.items()}


def optimizer_ways(weights: list[nn.Parameter]) -> dict[str, tuple[Callable[[], object], int]]:
    """Returns ways to do a step, with the tensors of the weights' size that each moves."""
    named = {str(index): weight for index, weight in enumerate(weights)}
    torch_adamw, torch_sgd = torch.optim.AdamW, torch.optim.SGD
    plain = {"lr": 1e-4, "momentum": 0.9}
    return {
        "adamw, as fsdpq builds it": (build_adamw(AdamWOptions(kind="adamw"), named).step, 7),
        "adamw, foreach": (torch_adamw(weights, lr=1e-4, foreach=True).step, 7),
        "adamw, a loop": (torch_adamw(weights, lr=1e-4, foreach=False).step, 7),
        "adam, as fsdpq builds it": (build_adam(AdamOptions(kind="adam"), named).step, 7),
        "sgd, as fsdpq builds it": (
            build_sgd(SgdOptions(kind="sgd", lr=1e-4, momentum=0.9), named).step, 5,
        ),
        "sgd, foreach": (torch_sgd(weights, **plain, foreach=True).step, 5),
        "sgd, a loop": (torch_sgd(weights, **plain, foreach=False).step, 5),
        "clipping: norm alone": (lambda: clip_gradients(weights, None), 1),
        "clipping: nothing to clip": (lambda: clip_gradients(weights, 1e9), 1),
        "clipping: scaled down": (lambda: clip_gradients(weights, 1e-3), 3),
    }  # fmt: skip


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__.partition(":")[0])
    parser.add_argument("--layers", type=int, default=4, help="decoder layers, 42 MB each (fp32)")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    weights = build_weights(options.layers)
    num_weights = sum(weight.numel() for weight in weights)
    source, target = (torch.ones(COPY_BYTES, dtype=torch.uint8) for _ in range(2))
    ways = optimizer_ways(weights)
    runs = {name: run for name, (run, _) in ways.items()}
    seconds = time_ways({"memory copy": lambda: target.copy_(source)} | runs, options.rounds)
    copied = 2 * COPY_BYTES / seconds["memory copy"]
    scale = NUM_LAYERS_70B / options.layers
    print(
        f"{options.layers} layers, {len(weights)} tensors, {num_weights / 1e6:.1f} million fp32 "
        f"weights; {torch.get_num_threads()} threads; memory copy {copied / 1e9:.1f} GB/s "
        "read and written"
    )
    print(f"{'':28}{'ms':>8} {'GB/s':>7} {'of copy':>8} {'s for 80 layers':>16}")
    for name, (_, tensors) in ways.items():
        rate = tensors * 4 * num_weights / seconds[name]
        print(
            f"{name:28}{1000 * seconds[name]:8.1f} {rate / 1e9:7.1f} {rate / copied:8.0%} "
            f"{scale * seconds[name]:16.2f}"
        )
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
