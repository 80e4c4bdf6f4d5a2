"""The rate at which this machine multiplies the model's matrices."""

from __future__ import annotations

import time

import torch

from fsdpq.metrics.peaks import synchronize
from scripts.bench_train.shapes import Batch, Shape


class MatmulRate:
    """Multiplies what a step multiplies: activations by weights, in forward and in backward.

    Args:
        shape: of the model.
        dtype: of the products.
        device: where.
    """

    def __init__(self, shape: Shape, dtype: torch.dtype, device: str) -> None:
        self._sizes = [*shape.linears.values(), (shape.vocab, shape.hidden)]
        self._times = [shape.layers] * len(shape.linears) + [1]
        self._dtype = dtype
        self._device = torch.device(device)

    def flops_per_s(self, batch: Batch) -> float:
        """Returns operations a second, each product weighted by how often a step does it."""
        seconds, flops = 0.0, 0.0
        for size, times in zip(self._sizes, self._times, strict=True):
            seconds += times * self._seconds(size, batch.size)
            flops += times * 4.0 * batch.size * size[0] * size[1]
        return flops / seconds

    def _seconds(self, size: tuple[int, int], tokens: int) -> float:
        """Returns the seconds of one product and the gradient of its input."""
        weight = torch.randn(size, dtype=self._dtype, device=self._device)
        x = torch.randn(tokens, size[1], dtype=self._dtype, device=self._device)
        output = torch.nn.functional.linear(x, weight)
        torch.matmul(output, weight, out=x)
        x.fill_(1.0)
        synchronize(self._device)
        started = time.perf_counter()
        torch.matmul(x, weight.T, out=output)
        torch.matmul(output, weight, out=x)
        synchronize(self._device)
        return time.perf_counter() - started
