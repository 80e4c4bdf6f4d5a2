"""Measures training from disk beside host memory: ``make bench-disk``.

A checkpoint of layers of TinyLlama's shape is made up in a temporary directory and quantized once
to NF4 with double quantization. Then LoRA is trained over that base by one rank, each variant in a
fresh process: a warm-up step and some measured ones.

- cpu: shards in host memory (``fsdp.offload: cpu``).
- disk: shards are pages of the file (``fsdp.offload: disk``).
- dropped: the same, and before every step the pages leave the page cache, which ``mincore``
  confirms: every step reads all of the base from the disk once.
- not announced: the same, and nothing asks for the pages of the next layers beforehand.
- random: the system's own reading ahead is switched off (``MADV_RANDOM``), as a bound: it reads a
  few MB ahead of a page that is missing, ``read_ahead_kb`` of the device.

anon: growth of ``RssAnon`` in /proc/self/status since before the model was built (a tiny one has
been trained by then), after loading, the most while training, and after the last step, freed heap
given back; adapters and their optimizer state are taken off. read: ``read_bytes`` of /proc/self/io,
what came from the disk. computed: seconds of a step that the training thread had a core; waited:
those in which it neither had one nor was ready to (/proc/thread-self/schedstat), for pages where
OMP_NUM_THREADS is 1. Both hold on a machine with other work, tokens/s do not.
"""

from __future__ import annotations

import argparse
import ctypes
import hashlib
import json
import mmap
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fsdpq.worker.bench.made_up import write_made_up
from fsdpq.worker.bench.shapes import SHAPES, with_layers

GB, MB = 1e9, 1e6
SHAPE, TINY = SHAPES["1b"], SHAPES["tiny"]


@dataclass(frozen=True)
class Variant:
    """How a base is trained over: what of ``fsdp.offload``, and what is done to its pages."""

    offload: str = "disk"
    drops: bool = True
    announces: bool = True
    random: bool = False


VARIANTS = {
    "cpu": Variant("cpu", drops=False),
    "disk": Variant(drops=False),
    "dropped": Variant(),
    "dropped, not announced": Variant(announces=False),
    "dropped, random": Variant(random=True),
    "dropped, random, not announced": Variant(random=True, announces=False),
}

HEADING = (
    f"{'':<32}tokens/s  anon: loaded    peak   after  read MB/step      MB/s  computed s  waited s"
)

LIBC = ctypes.CDLL(None, use_errno=True)


def make_recipe(directory: Path, offload: str) -> Any:
    from fsdpq.recipe.root import Recipe

    return Recipe.model_validate(
        {
            "version": 1,
            "name": "bench",
            "model": {"name_or_path": str(directory), "dtype": "bf16"},
            "quantization": {"kind": "bnb", "quant_type": "nf4", "double_quant": True},
            "adapter": {"kind": "lora", "rank": 8, "alpha": 16.0},
            "data": {"path": "rows.jsonl"},
            "fsdp": {"offload": offload},
            "optimizer": {"kind": "adamw", "lr": 1e-4},
            "lr_scheduler": {"kind": "constant"},
            "training": {"steps": 1, "global_batch_size": 1, "micro_batch_size": 1},
            "launch": {"device": "cpu", "nproc_per_node": 1},
        }
    )


def base_of(root: Path) -> Any:
    from fsdpq.tensor_files.base_manifest import base_key
    from fsdpq.worker.base import QuantizedBase

    recipe = make_recipe(root / "model", "disk")
    sha256 = hashlib.sha256((root / "model" / "config.json").read_bytes()).hexdigest()
    key = base_key(
        model={"sha256": sha256, "revision": None, "source": "made up"},
        quantization=recipe.quantization.model_dump(mode="json"),
        dtype="bf16",
        device="cpu",
    )
    return QuantizedBase(root / "base", key)


def write_quantized(root: Path) -> None:
    import torch

    from fsdpq.worker.quantize import write_recipe_base

    (root / "base").mkdir()
    write_recipe_base(
        make_recipe(root / "model", "disk"),
        root / "model",
        root / "base",
        key=base_of(root).key,
        device=torch.device("cpu"),
        report=lambda _done, _total: None,
    )


def anonymous_bytes() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("RssAnon:"))


class Peak:
    """Looks at the memory every 10 ms, until it is asked for the most that it saw."""

    def __init__(self) -> None:
        self._most, self._ended = 0, threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def _watch(self) -> None:
        while not self._ended.wait(0.01):
            self._most = max(self._most, anonymous_bytes())

    def end(self) -> int:
        """Returns the most memory that it saw, and looks no more."""
        self._ended.set()
        self._thread.join()
        return self._most


def read_bytes() -> int:
    lines = Path("/proc/self/io").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("read_bytes:"))


def thread_s() -> tuple[float, float]:
    """Seconds in which this thread computed, and in which it was ready to and had no core."""
    on_core, ready = Path("/proc/thread-self/schedstat").read_text().split()[:2]
    return int(on_core) / 1e9, int(ready) / 1e9


def mappings(path: Path) -> list[tuple[int, int]]:
    lines = [line.split() for line in Path("/proc/self/maps").read_text().splitlines()]
    spans = [words[0].split("-") for words in lines if words[-1] == str(path)]
    return [(int(start, 16), int(stop, 16) - int(start, 16)) for start, stop in spans]


def advise(path: Path, advice: int) -> None:
    for address, size in mappings(path):
        LIBC.madvise(ctypes.c_void_p(address), ctypes.c_size_t(size), advice)


def drop_pages(path: Path) -> None:
    """Takes the file out of memory; ends the process where something of it stays."""
    advise(path, mmap.MADV_DONTNEED)
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(descriptor)
    for address, size in mappings(path):
        pages = (ctypes.c_ubyte * -(-size // mmap.PAGESIZE))()
        LIBC.mincore(ctypes.c_void_p(address), ctypes.c_size_t(size), pages)
        if left := sum(page & 1 for page in pages):
            raise SystemExit(f"{left} pages of {path} stay in memory: use a disk, not a tmpfs")


def assemble(recipe: Any, directory: Path, base: Any) -> Any:
    import torch

    from fsdpq.worker.assemble import assemble_model

    return assemble_model(
        recipe,
        directory,
        device=torch.device("cpu"),
        report_load=lambda _done, _total: None,
        base=base,
    )


def step_function(assembled: Any, num_tokens: int, vocab_size: int) -> Callable[[], float]:
    """Returns what trains a step on made-up tokens and gives its loss."""
    import torch

    from fsdpq.data.dealing.collate import build_step
    from fsdpq.data.text.tokenize import Row
    from fsdpq.training.step import train_step

    optimizer = torch.optim.AdamW(assembled.trainable, lr=1e-4, fused=True)
    generator = torch.Generator().manual_seed(0)

    def step() -> float:
        ids = torch.randint(3, vocab_size, (num_tokens,), generator=generator).tolist()
        row = Row(ids, [True] * num_tokens)
        return train_step(
            assembled.model,
            build_step([row], micro_batch_size=1, rank=0, world_size=1),
            optimizer=optimizer,
            parameters=assembled.trainable,
            max_grad_norm=1.0,
            device=torch.device("cpu"),
        ).loss.item()

    return step


def train(root: Path, name: str, num_steps: int, num_tokens: int) -> dict[str, Any]:
    from fsdpq.fsdp import group_read_ahead

    variant = VARIANTS[name]
    if not variant.announces:
        group_read_ahead.GROUPS_AHEAD = 0
    tiny = assemble(make_recipe(root / "tiny", "cpu"), root / "tiny", None)
    step_function(tiny, num_tokens, TINY.vocab)()  # what libraries set up on first use
    del tiny
    before, path = anonymous_bytes(), root / "base" / "base.safetensors"
    recipe = make_recipe(root / "model", variant.offload)
    assembled = assemble(recipe, root / "model", base_of(root))
    loaded = anonymous_bytes() - before
    step = step_function(assembled, num_tokens, SHAPE.vocab)
    losses: list[float] = []
    seconds, computed, waited, read = 0.0, 0.0, 0.0, 0
    peak = Peak()
    for index in range(num_steps + 1):
        if variant.drops:
            drop_pages(path)
        if variant.random:
            advise(path, mmap.MADV_RANDOM)
        started = (read_bytes(), thread_s(), time.perf_counter())
        losses.append(step())
        if index:  # the first one warms up
            took, now = time.perf_counter() - started[2], thread_s()
            on_core, ready = now[0] - started[1][0], now[1] - started[1][1]
            seconds, computed = seconds + took, computed + on_core
            waited += took - on_core - ready
            read += read_bytes() - started[0]
    most = peak.end()
    LIBC.malloc_trim(0)  # as a run from disk does at every log line
    states = 3 * sum(p.to_local().nbytes for p in assembled.trainable)
    return {
        "variant": name,
        "tokens_per_s": num_steps * num_tokens / seconds,
        "step_s": seconds / num_steps,
        "loaded_anonymous_bytes": loaded,
        "peak_anonymous_bytes": most - before,
        "trained_anonymous_bytes": anonymous_bytes() - before,
        "adapter_and_optimizer_bytes": states,
        "read_bytes_per_step": read / num_steps,
        "read_bytes_per_s": read / seconds,
        "computed_s_per_step": computed / num_steps,
        "waited_s_per_step": waited / num_steps,
        "losses": losses,
    }


def run_process(root: Path, name: str, num_steps: int, num_tokens: int, out: Path) -> None:
    from fsdpq.dist import start_process_group

    start_process_group("cpu")
    if name == "quantize":
        write_quantized(root)
    else:
        out.write_text(json.dumps(train(root, name, num_steps, num_tokens)))


def print_row(row: dict[str, Any], base_bytes: int) -> None:
    states = row["adapter_and_optimizer_bytes"]
    print(
        f"{row['variant']:<31}{row['tokens_per_s']:>9.1f}"
        f"{row['loaded_anonymous_bytes'] / base_bytes:>14.1%}"
        f"{(row['peak_anonymous_bytes'] - states) / base_bytes:>8.1%}"
        f"{(row['trained_anonymous_bytes'] - states) / base_bytes:>8.1%}"
        f"{row['read_bytes_per_step'] / MB:>14.0f}{row['read_bytes_per_s'] / MB:>10.0f}"
        f"{row['computed_s_per_step']:>12.2f}{row['waited_s_per_step']:>10.2f}",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description="Measures training from disk.")
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--directory", type=Path, help="where the base lies: a disk, not a tmpfs")
    parser.add_argument("--json", type=Path, help="write the numbers to this file")
    parser.add_argument("--process", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.process:
        name, root, out = options.process
        run_process(Path(root), name, options.steps, options.tokens, Path(out))
        return
    with tempfile.TemporaryDirectory(prefix="fsdpq-bench-", dir=options.directory) as directory:
        root = Path(directory)
        write_made_up(root / "model", with_layers(SHAPE, options.layers))
        write_made_up(root / "tiny", TINY)
        rows: list[dict[str, Any]] = []
        for name in ("quantize", *VARIANTS):
            out = root / "out.json"
            sizes = ["--steps", str(options.steps), "--tokens", str(options.tokens)]
            command = [sys.executable, __file__, *sizes, "--process", name, str(root), str(out)]
            subprocess.run(command, check=True)
            if name == "quantize":
                base_bytes = (root / "base" / "base.safetensors").stat().st_size
                print(f"{base_bytes / GB:.3f} GB of base, {os.cpu_count()} cores\n{HEADING}")
                continue
            rows.append(json.loads(out.read_text()))
            print_row(rows[-1], base_bytes)
    same = all(row["losses"] == rows[0]["losses"] for row in rows)
    print(f"losses {'bit-identical' if same else 'DIFFER'}")
    if options.json:
        found = {"base_bytes": base_bytes, "cores": os.cpu_count(), "rows": rows}
        options.json.write_text(json.dumps(found, indent=1) + "\n")
    if not same:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
