"""70B on one card of 24 GiB: how long rows may be, how small the card, and its base on disk.

A step that did not fit leaves FSDP's groups half gathered, so lengths are found without one: memory
grows by the token, two measured lengths say where it ends, and that length is measured. Where it
fails all the same, the model is built anew. Only the smallest cap is found by failing, last of all.
"""

from __future__ import annotations

import tempfile
import threading
import time
from pathlib import Path
from types import TracebackType
from typing import Any

import psutil
import torch
from transformers import LlamaConfig

from fsdpq.dist import start_process_group
from fsdpq.fsdp.activations import build_host_activations
from fsdpq.metrics.peaks import GIB, cap_memory, release, status_bytes
from fsdpq.recipe.root import Recipe
from fsdpq.tensor_files.base_manifest import base_key
from fsdpq.worker.assemble import assemble_model
from fsdpq.worker.base import QuantizedBase
from fsdpq.worker.bench.shapes import Batch, Shape
from fsdpq.worker.quantize import build_frozen_model
from fsdpq.worker.random_base import RandomSource
from scripts.gpu.cases import ALONE, ALONE_DISK, ALONE_HOST_ALL, CAP_GIB, LORA_RANK
from scripts.gpu.parts import Bench
from scripts.gpu.parts.proof import batch_of
from scripts.gpu.training import (
    Trainer,
    build_recipe,
    build_trainer,
    device_memory,
    measure,
    set_layer_runs,
    trainer_of,
)

FIRST_LENGTHS = {False: (4096, 8192), True: (8192, 16384)}
"""Tokens of one row that are measured first; by whether layer inputs lie in host memory."""

MAX_TOKENS = 65_536
NEAR = 0.98
"""Of the cap, by what two lengths say: a step may not fail."""

HOST_SHARE = 0.85
"""Of free host memory, for layer inputs."""

CAPS_GIB = (8.0, 6.0, 4.0, 3.5, 3.0, 2.75, 2.5, 2.25, 2.0, 1.75, 1.5)


def pinned(bench: Bench) -> None:
    """Measures 70B with its base in pinned host memory, under a cap of 24 GiB and smaller ones."""
    device = start_process_group(bench.device.type)
    batch = batch_of(bench, ALONE)
    trainer = _build_pinned(bench, device, batch)
    if trainer is None:
        return
    for case, on_host in ((ALONE, False), (ALONE_HOST_ALL, True)):
        keep_inputs(trainer, on_host=on_host)
        if not bench.rows.attempt(case.name, measure, trainer, batch, rounds=2):
            return
    for on_host in (False, True):
        if not longest_rows(bench, trainer, on_host=on_host):
            trainer = None
            give_back(device)
            trainer = _build_pinned(bench, device, batch)
            if trainer is None:
                return
    keep_inputs(trainer, on_host=True)
    smallest_cap(bench, trainer, batch)


def _build_pinned(bench: Bench, device: torch.device, batch: Batch) -> Trainer | None:
    cap_memory(CAP_GIB, device)
    return bench.rows.build(
        ALONE.name, build_trainer, bench.shape(ALONE.shape), bench.tokens(MAX_TOKENS), device,
        lora_rank=LORA_RANK, sections=ALONE.recipe_sections(batch),
    )  # fmt: skip


def give_back(device: torch.device) -> None:
    """Gives memory of what is dropped back to the device and, pinned, to the host."""
    release(device)
    if device.type == "cuda":
        empty_host_cache = getattr(torch.accelerator, "empty_host_cache", None)
        (empty_host_cache or torch._C._host_emptyCache)()  # the second: torch 2.11


def keep_inputs(trainer: Trainer, *, on_host: bool) -> None:
    """Chooses where layer inputs lie, in place, and gives back what they took so far."""
    set_layer_runs(trainer, host=None)
    give_back(trainer.device)
    if on_host:
        host, notice = build_host_activations(trainer.device)
        if notice:
            raise RuntimeError(notice)  # what is measured then is something else
        set_layer_runs(trainer, host=host)


def longest_rows(bench: Bench, trainer: Trainer, *, on_host: bool) -> bool:
    """Measures one row of growing length, the last as long as fits; returns whether all did."""
    words = ", activation_offload=True" * on_host
    points: list[tuple[int, float]] = []
    for tokens in map(bench.tokens, FIRST_LENGTHS[on_host]):
        keep_inputs(trainer, on_host=on_host)
        if not _row_of(bench, trainer, tokens, f"70b, 1x{tokens}{words}", points):
            return False
    cap = CAP_GIB if bench.device.type == "cuda" else 1.05 * points[-1][1]
    for _ in range(2):
        keep_inputs(trainer, on_host=on_host)
        tokens = where_it_ends(points, NEAR * cap, step=bench.tokens(256))
        tokens = min(tokens, _host_tokens(trainer.shape) if on_host else tokens)
        tokens = min(tokens, bench.tokens(MAX_TOKENS))
        if tokens <= points[-1][0]:
            return True
        if not _row_of(bench, trainer, tokens, f"70b, longest row{words}, 1x{tokens}", points):
            return False
    return True


def where_it_ends(points: list[tuple[int, float]], cap: float, *, step: int) -> int:
    """Returns the tokens at which the line through the last two points reaches ``cap``.

    Args:
        points: tokens, and GiB that they took.
        cap: in GiB.
        step: tokens are a multiple of it, rounded down.
    """
    (few, low), (many, high) = points[-2:]
    per_token = (high - low) / (many - few)
    if per_token <= 0:
        return many
    return max(many, int(many + (cap - high) / per_token) // step * step)


def _row_of(
    bench: Bench, trainer: Trainer, tokens: int, name: str, points: list[tuple[int, float]]
) -> bool:
    def one_row() -> dict[str, Any]:
        found = measure(trainer, Batch(1, tokens), rounds=1, warmups=0)
        points.append((tokens, found.get("reserved_gib", found["peak_gib"])))
        return found

    fits = bench.rows.attempt(name, one_row)
    release(bench.device)
    return fits


def _host_tokens(shape: Shape) -> int:
    """Returns the tokens whose layer inputs the host has room for, in bf16.

    Pinned tensors are rounded up to a power of two.
    """
    of_layer = int(HOST_SHARE * psutil.virtual_memory().available) // shape.layers
    return (1 << (of_layer.bit_length() - 1)) // (2 * shape.hidden)


def smallest_cap(bench: Bench, trainer: Trainer, batch: Batch) -> None:
    """Lowers the cap until a step does not fit; the trainer is of no use afterwards."""
    for gib in CAPS_GIB[:2] if bench.device.type == "cpu" else CAPS_GIB:
        cap_memory(gib, bench.device)
        name = f"70b, {batch}, activation_offload=True, capped to {gib:g} GiB"
        if not bench.rows.attempt(name, measure, trainer, batch, rounds=1, warmups=0):
            return


def disk(bench: Bench) -> None:
    """Writes the base once and trains over its file, under the cap of 24 GiB."""
    case, device = ALONE_DISK, start_process_group(bench.device.type)
    cap_memory(CAP_GIB, device)
    batch, shape = batch_of(bench, case), bench.shape(case.shape)
    sections = case.recipe_sections(batch)
    recipe = build_recipe(shape, batch.tokens, device.type, lora_rank=LORA_RANK, sections=sections)
    with tempfile.TemporaryDirectory() as directory:
        config_dir, out = Path(directory) / "model", Path(directory) / "base"
        out.mkdir()
        config = LlamaConfig(**shape.config(batch.tokens), architectures=["LlamaForCausalLM"])
        config.save_pretrained(config_dir)
        base = QuantizedBase(out, made_up_key(recipe))
        written = bench.rows.attempt("disk, base", write_random, recipe, config_dir, base, device)
        if written:
            bench.rows.attempt(
                case.name, _from_disk, recipe, config_dir, base, shape, batch, device
            )


def made_up_key(recipe: Recipe) -> Any:
    """Returns the key of a base that is made of no checkpoint."""
    return base_key(
        model={"sha256": "0" * 64, "revision": None, "source": "random weights"},
        quantization=recipe.quantization.model_dump(mode="json"),
        dtype=recipe.model.dtype, device=recipe.launch.device,
    )  # fmt: skip


def write_random(
    recipe: Recipe, config_dir: Path, base: QuantizedBase, device: torch.device
) -> dict[str, Any]:
    """Writes a quantized base of random weights; returns its size and the time it took."""
    from fsdpq.model.loading.base_writer import write_base

    started = time.perf_counter()
    model = build_frozen_model(recipe, config_dir, dtype=torch.bfloat16, trust_remote_code=False)
    manifest = write_base(
        model, RandomSource(dtype=torch.bfloat16, device=device), base.directory, key=base.key,
        dtype=torch.bfloat16, device=device, report=lambda _done, _total: None,
    )  # fmt: skip
    seconds = time.perf_counter() - started
    gb = manifest.num_bytes / 1e9
    return {"file_gb": gb, "gb_per_s": gb / seconds}


def _from_disk(
    recipe: Recipe, config_dir: Path, base: QuantizedBase,
    shape: Shape, batch: Batch, device: torch.device,
) -> dict[str, Any]:  # fmt: skip
    started = time.perf_counter()
    with AnonymousPeak() as anonymous:
        assembled = assemble_model(
            recipe, config_dir, device=device, base=base, report_load=lambda _done, _total: None
        )
        trainer = trainer_of(assembled, recipe, shape, device=device, started=started)
        loaded, before = status_bytes("RssAnon"), read_bytes()
        rounds, warmups = 2, 1
        found = measure(trainer, batch, rounds=rounds, warmups=warmups)
    mapped = assembled.mapped_base
    return found | {
        "anon_loaded_gib": loaded / GIB,
        "anon_peak_gib": max(loaded, anonymous.peak_bytes) / GIB,
        "file_pages_gib": status_bytes("RssFile") / GIB,
        "read_gb_a_step": (read_bytes() - before) / 1e9 / (rounds + warmups),
        "load_gb_per_s": mapped.disk_bytes_per_s / 1e9 if mapped is not None else 0.0,
        **device_memory(device),
    }  # fmt: skip


class AnonymousPeak:
    """Looks at this process's anonymous memory every 20 ms while it is entered."""

    def __init__(self) -> None:
        self.peak_bytes = 0
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> AnonymousPeak:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:  # fmt: skip
        self._ended.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._ended.wait(0.02):
            self.peak_bytes = max(self.peak_bytes, status_bytes("RssAnon"))


def read_bytes() -> int:
    """Returns what this process has had read from disks."""
    lines = Path("/proc/self/io").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("read_bytes:"))
