"""Prints how activation memory grows with the sequence length: ``make bench-memory``.

For every quantizer, forward and backward of two quantized linears with a nonlinearity between them
(a feed-forward without its gate) at four sequence lengths. The peak of what torch's allocator holds
above the weights is fitted by least squares to ``a + b * n``, and to ``a + b * n + c * n ** 2`` for
the share of the quadratic term at the longest sequence. Beside them ``nn.Linear`` and
bitsandbytes' ``Linear4bit``. On a CPU the profiler counts allocations, on a GPU the allocator does.
"""

from __future__ import annotations

import functools
import itertools
import json
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import bitsandbytes
import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from fsdpq.dist import Shard
from fsdpq.model.quantized_linear import QuantizedLinear
from fsdpq.protocols import Quantizer
from fsdpq.recipe.sections.quantization import BnbOptions, HqqOptions
from fsdpq.registry import resolve_builder

LENGTHS = (128, 256, 512, 1024)
"""Tokens of one sequence; the longest gives the share of the quadratic term."""

HIDDEN, INNER = 128, 384

QUANTIZERS: dict[str, dict[str, Any]] = {
    "bnb nf4": {"kind": "bnb"},
    "bnb nf4, no double_quant": {"kind": "bnb", "double_quant": False},
    "bnb fp4, block_size 4096": {"kind": "bnb", "quant_type": "fp4", "block_size": 4096},
    **{f"hqq {n} bits": {"kind": "hqq", "nbits": n} for n in (8, 4, 3, 2, 1)},
    "hqq 4 bits, axis 0": {"kind": "hqq", "nbits": 4, "axis": 0},
    "hqq 4 bits, group_size null": {"kind": "hqq", "nbits": 4, "group_size": None},
}


@dataclass(frozen=True)
class Fit:
    """Peaks of activation memory over the sequence length, and a straight line through them.

    Attributes:
        peaks: bytes at each of the lengths.
        base_bytes: where the line starts.
        token_bytes: its slope.
        r_squared: the share of the variance that the line explains.
        quadratic_share: of the peak at the longest sequence, in a fit with a quadratic term.
    """

    peaks: tuple[int, ...]
    base_bytes: float
    token_bytes: float
    r_squared: float
    quadratic_share: float


def fit_line(lengths: tuple[int, ...], peaks: tuple[int, ...]) -> Fit:
    """Returns the least-squares fit of ``peaks`` to ``lengths``; at least four of each."""
    n, y = torch.tensor(lengths).double(), torch.tensor(peaks).double()
    line = torch.linalg.lstsq(torch.stack([torch.ones_like(n), n], dim=1), y[:, None]).solution
    scaled = n / n.max()
    curve = torch.stack([torch.ones_like(n), scaled, scaled**2], dim=1)
    quadratic = torch.linalg.lstsq(curve, y[:, None]).solution[2, 0]
    base, slope = line.flatten().tolist()
    rest = ((y - base - slope * n) ** 2).sum() / ((y - y.mean()) ** 2).sum()
    share = float(quadratic) / peaks[-1]
    return Fit(peaks, base, slope, 1 - float(rest), share)


def peak_bytes(run: Callable[[], Any], device: torch.device) -> int:
    """Returns the most that ``run`` held at once of what it allocated itself."""
    if device.type == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        run()
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "trace.json"
        profiler.export_chrome_trace(str(path))
        events = json.loads(path.read_text(encoding="utf-8"))["traceEvents"]
    memory = sorted((e for e in events if e["name"] == "[memory]"), key=lambda e: e["ts"])
    return max(itertools.accumulate(int(e["args"]["Bytes"]) for e in memory))


def measure(model: nn.Module, device: torch.device, dtype: torch.dtype) -> Fit:
    """Returns how the peak of a forward and backward grows with the length of the sequence."""
    peaks: list[int] = []
    for length in (LENGTHS[0], *LENGTHS):  # the first one fills caches
        x = torch.randn(1, length, HIDDEN, device=device, dtype=dtype, requires_grad=True)
        gradient = torch.ones_like(x)
        peaks.append(peak_bytes(functools.partial(_step, model, x, gradient), device))
    return fit_line(LENGTHS, tuple(peaks[1:]))


def _step(model: nn.Module, x: Tensor, gradient: Tensor) -> None:
    model(x).backward(gradient)


def build_quantized(
    document: dict[str, Any], device: torch.device, dtype: torch.dtype
) -> nn.Module:
    """Returns two linears quantized by the quantizer of a recipe's section."""
    kinds = {"bnb": BnbOptions, "hqq": HqqOptions}
    options = kinds[document["kind"]].model_validate(document)
    quantizer: Quantizer = resolve_builder("quantization", options)(options)
    return _feed_forward(lambda linear: _quantized(linear, quantizer, device), dtype)


def build_plain(device: torch.device, dtype: torch.dtype) -> nn.Module:
    """Returns the same two linears, frozen and unquantized."""
    return _feed_forward(lambda linear: linear.to(device), dtype)


def _quantized(linear: nn.Linear, quantizer: Quantizer, device: torch.device) -> nn.Module:
    weight = linear.weight.detach().to(device)
    layer = QuantizedLinear(linear, quantizer=quantizer).to(device)
    shards = {
        name: Shard(getattr(layer, name).detach(), 0, getattr(layer, name).shape[0])
        for name in layer.packed_names
    }
    shape = (layer.out_features, layer.in_features)
    quantizer.quantize_shards(lambda start, stop: weight[start:stop], shape, shards)
    return layer


def _linear4bit(linear: nn.Linear, device: torch.device) -> nn.Module:
    layer = bitsandbytes.nn.Linear4bit(
        linear.in_features,
        linear.out_features,
        bias=False,
        compute_dtype=linear.weight.dtype,
        quant_type="nf4",
    )
    # Untyped: its parameters are those of `__new__`, which type checkers do not find.
    params: Any = bitsandbytes.nn.Params4bit
    layer.weight = params(linear.weight.data, requires_grad=False, quant_type="nf4", module=layer)
    return layer.to(device)


def _feed_forward(convert: Callable[[nn.Linear], nn.Module], dtype: torch.dtype) -> nn.Module:
    torch.manual_seed(0)
    first = nn.Linear(HIDDEN, INNER, bias=False, dtype=dtype)
    second = nn.Linear(INNER, HIDDEN, bias=False, dtype=dtype)
    model = nn.Sequential(convert(first), nn.SiLU(), convert(second))
    return model.requires_grad_(False)


def main() -> None:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32  # bf16 is slow on CPUs
    models: dict[str, Callable[[], nn.Module]] = {
        "nn.Linear": lambda: build_plain(device, dtype),
        "bitsandbytes Linear4bit": lambda: _feed_forward(
            lambda linear: _linear4bit(linear, device), dtype
        ),
    }
    for name, document in QUANTIZERS.items():
        models[name] = lambda document=document: build_quantized(document, device, dtype)
    print(f"{HIDDEN} -> {INNER} -> {HIDDEN}, {dtype}, {device}, peak in KiB at sequence lengths")
    heads = "".join(f"{length:>8}" for length in LENGTHS)
    print(f"{'':28}{heads}   KiB + bytes a token        R^2   n^2")
    for name, build in models.items():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the profiler's, and hqq's imports
            fit = measure(build(), device, dtype)
        peaks = "".join(f"{peak / 1024:8.0f}" for peak in fit.peaks)
        line = f"{fit.base_bytes / 1024:8.0f} + {fit.token_bytes:7.1f} * n"
        print(f"{name:28}{peaks}  {line}  {fit.r_squared:9.6f}  {100 * fit.quadratic_share:4.1f} %")


if __name__ == "__main__":
    main()
