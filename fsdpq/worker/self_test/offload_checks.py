"""Do activations come back from host memory as they left, and do adapters stay on the device?

Copies on a stream of their own go wrong where one side is freed, read or written too early, which
depends on the device and on time: hence several rounds with inputs that take a while to copy.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.nn import functional

from fsdpq.compat import keep_trained_on_device
from fsdpq.dist import assign_own_rows, own_shard
from fsdpq.fsdp.activations import HostActivations, build_host_activations
from fsdpq.fsdp.layers import apply_layer_runs
from fsdpq.fsdp.offload import offload_policy
from fsdpq.fsdp.wrap import apply_groups
from fsdpq.worker.self_test.check import (
    Bench,
    Check,
    CheckFailedError,
    CheckSkippedError,
    count_text,
    require_same_bytes,
)

GROUP = "offload"
NUM_LAYERS, NUM_ROUNDS = 6, 4
WIDTH = 512
TOKENS = {"cuda": 8192, "cpu": 64}
"""On a GPU an input has 16 MiB, which takes about a millisecond to copy."""


class SmallLayer(nn.Module):
    """A layer with a frozen and a trained matrix."""

    def __init__(self) -> None:
        super().__init__()
        self.frozen = nn.Parameter(torch.empty(WIDTH, WIDTH), requires_grad=False)
        self.trained = nn.Parameter(torch.empty(WIDTH, WIDTH))

    def forward(self, hidden: Tensor) -> Tensor:
        """Maps ``(rows, tokens, width)`` to the same shape."""
        product = functional.linear(hidden, self.frozen) + functional.linear(hidden, self.trained)
        return hidden + torch.tanh(product)


def check_activations(bench: Bench) -> str:
    """Compares gradients with and without activations in host memory, byte by byte."""
    host, notice = build_host_activations(bench.device)
    if host is None:
        raise CheckSkippedError("on CPUs every tensor is in host memory")
    expected = _gradients(bench.device, None)
    num_bytes = 0
    for _ in range(NUM_ROUNDS):
        for found, gradient in zip(_gradients(bench.device, host), expected, strict=True):
            num_bytes += require_same_bytes("a gradient", found.cpu(), gradient.cpu())
    return f"{count_text(num_bytes)} of gradients equal, from {notice or 'pinned memory'}"


def _gradients(device: torch.device, host: HostActivations | None) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    layers = [SmallLayer().to(device) for _ in range(NUM_LAYERS)]
    apply_layer_runs(layers, checkpointing="full", num_chunks=2, host=host)
    for layer in layers:
        for parameter in layer.parameters():
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator) / WIDTH**0.5)
    hidden = torch.randn(2, TOKENS[device.type] // 2, WIDTH, generator=generator).to(device)
    for layer in layers:
        hidden = layer(hidden)
    hidden.square().mean().backward()
    return [layer.trained.grad for layer in layers if layer.trained.grad is not None]


def check_trained_stay(bench: Bench) -> str:
    """Trains beside offloaded frozen weights; weights and gradients stay on the device."""
    policy, _ = offload_policy("cpu", bench.device)
    with torch.device("meta"):
        model = nn.Sequential(SmallLayer(), SmallLayer())
    apply_groups(
        model, mesh=bench.mesh, layers=list(model), embedding_groups=[], reshard=True,
        casts=MixedPrecisionPolicy(), policy=policy,
    )  # fmt: skip
    num_kept = keep_trained_on_device(model)
    host = torch.device("cpu")
    model._apply(lambda t: torch.empty_like(t, device=bench.device if t.requires_grad else host))
    for parameter in model.parameters():
        assign_own_rows(parameter, torch.eye(WIDTH))
    model(torch.ones(1, 4, WIDTH, device=bench.device)).sum().backward()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, fused=True)
    optimizer.step()
    for parameter in trained:
        gradient = own_shard(parameter.grad).rows if parameter.grad is not None else None
        if gradient is None or gradient.device.type != bench.device.type:
            where = "missing" if gradient is None else f"on {gradient.device}"
            raise CheckFailedError(f"the gradient of a trained weight is {where}")
    return f"{num_kept} trained matrices updated on {bench.device.type}, frozen ones on the host"


CHECKS = (
    Check(GROUP, "activations", check_activations, "train with `fsdp.activation_offload: false`"),
    Check(
        GROUP, "trained weights on the device", check_trained_stay,
        "train with `fsdp.offload_trained: true`",
    ),
)  # fmt: skip
