"""Prints how fast one core multiplies matrices in fp32 and bf16: a process of the launcher.

Seconds of the processor count, not of the clock, and the best of several tries: a busy machine
measures about what an idle one does.
"""

from __future__ import annotations

import json
import sys
import time

import torch
from torch.nn import functional

TOKENS, WIDE, NARROW = 512, 2816, 1024
"""Sizes of a feed-forward of a small model; bigger ones have the same ratio."""

TRIES = 6


def measure() -> dict[str, float]:
    """Returns operations a second by dtype, in the threads of this process together."""
    best = {"fp32": float("inf"), "bf16": float("inf")}
    for _ in range(TRIES):  # taking turns: what slows one slows the other
        for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
            x = torch.ones(TOKENS, NARROW, dtype=dtype)
            weight = torch.ones(WIDE, NARROW, dtype=dtype)
            started = time.process_time()
            functional.linear(x, weight)
            best[name] = min(best[name], time.process_time() - started)
    return {name: 2.0 * TOKENS * WIDE * NARROW / seconds for name, seconds in best.items()}


def main() -> None:
    """Prints the rates of one thread as a JSON object."""
    torch.set_num_threads(1)
    sys.stdout.write(json.dumps(measure()) + "\n")


if __name__ == "__main__":
    main()
