"""Training from disk in less memory than the base takes, under a limit that the system enforces."""

from __future__ import annotations

import resource
from pathlib import Path
from typing import Any

from support import bases, page_cache
from support.ranks import RankPool
from support.sharded import train
from support.tiny import random_rows, save_tiny_llama

from fsdpq.tensor_files.base_manifest import WEIGHTS_NAME

PLAIN = {"quantization": {"kind": "none"}, "adapter": {"rank": 1}}
"""Nothing is quantized: that would take longer than all the rest, and bytes are bytes. Adapters and
their optimizer state are small beside the base, as they are in a large model."""

NUM_LAYERS = 16

M_MMAP_THRESHOLD = -3
"""Of glibc's ``mallopt``."""


def private_bytes() -> int:
    """Returns what `RLIMIT_DATA` counts: private memory that can be written to."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmData"))


def train_in(base: Path, directory: Path, offload: str, headroom: int | None) -> dict[str, Any]:
    """Trains two steps with at most ``headroom`` bytes of private memory more than there is.

    Between steps the file leaves the page cache.
    """
    limits = resource.getrlimit(resource.RLIMIT_DATA)
    if headroom is not None:
        # The limit counts address space, holes in the heap too; buffers as large as those of real
        # models never lie in the heap.
        page_cache.LIBC.mallopt(M_MMAP_THRESHOLD, 1 << 20)
        resource.setrlimit(resource.RLIMIT_DATA, (private_bytes() + headroom, limits[1]))
    before = page_cache.anonymous_bytes()
    try:
        sections: dict[str, Any] = {**PLAIN, "fsdp": {"offload": offload}}
        assembled = bases.assemble_from(base, directory, sections)
        peaks: list[int] = []
        for layer in assembled.model.decoder_layers:
            layer.register_forward_hook(
                lambda *_: peaks.append(page_cache.anonymous_bytes()), prepend=True
            )
        losses: list[float] = []
        weights, left = base / WEIGHTS_NAME, 0
        for seed in range(2):
            rows = random_rows(2, seed=seed)
            losses += train(assembled, [rows], micro_batch_size=2, lr=1e-3, max_norm=1.0)[0]
            page_cache.drop_mapped(weights)
            left += page_cache.resident_bytes(weights, 0, weights.stat().st_size)
        grown = page_cache.anonymous_bytes() - before
        peak = max(peaks) - before
        return {"losses": losses, "grown": grown, "peak": peak, "left": left}
    except RuntimeError as error:
        return {"error": str(error)}
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, limits)


def run_alone(tiny: tuple[Path, Path], *arguments: Any) -> dict[str, Any]:
    """Returns what `train_in` does in a process of its own, without free heap of other runs.

    Args:
        tiny: base and model that it trains first, so that libraries have their memory.
        arguments: of `train_in`.
    """
    pool = RankPool()
    pool.run(1, train_in, *tiny, "disk", None)
    [answer] = pool.run(1, train_in, *arguments)
    pool.close()
    return answer


def test_base_larger_than_the_memory_that_is_allowed_trains_from_disk(
    ranks: RankPool, tmp_path: Path
) -> None:
    tiny, tiny_base = save_tiny_llama(tmp_path / "tiny"), tmp_path / "tiny-base"
    shape = {"hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": NUM_LAYERS}
    directory, base = save_tiny_llama(tmp_path / "model", **shape), tmp_path / "base"
    for model, out in ((tiny, tiny_base), (directory, base)):
        ranks.run(1, bases.write, model, out, PLAIN)
    size = (base / WEIGHTS_NAME).stat().st_size
    assert size > 180e6
    page_cache.drop(base / WEIGHTS_NAME)
    can_drop = page_cache.resident_bytes(base / WEIGHTS_NAME, 0, size) == 0
    headroom = size // 2
    warmup = (tiny_base, tiny)
    usual = run_alone(warmup, base, directory, "disk", None)
    # The layer that runs is there, in two copies while it is gathered. Holes that those before it
    # left in the heap were given back: else the peak is a quarter to a third of the base.
    assert usual["peak"] < 0.17 * size
    mapped = run_alone(warmup, base, directory, "disk", headroom)
    copied = run_alone(warmup, base, directory, "cpu", headroom)
    assert "allocate memory" in copied["error"]
    free = run_alone(warmup, base, directory, "cpu", None)
    assert mapped["losses"] == usual["losses"] == free["losses"]
    assert mapped["left"] == 0 or not can_drop
    modules_and_scratch = 8e6  # of a process that builds its first model of this size
    assert mapped["grown"] < 0.05 * size + modules_and_scratch
    assert free["grown"] > size
