"""Counts what a step gathers when layers run in chunks: ``make bench-chunks``.

Two gloo ranks train one step on the same rows: in 16 micro-batches of one row, in 4 of four rows
that layers run over in 4 chunks, and in one of sixteen rows in 16 chunks. A chunk is one row each
time. Last, sixteen rows at once, without chunks. Nothing is timed: gathers are counted in the
dispatcher, and memory by torch's host allocator.

- gathered: bytes that come out of a rank's gathers, over the tokens that the rank computes.
- shards: bytes that go in, the rank's own rows. With ``fsdp.offload: cpu`` these are copied from
  host to device for every gather, with ``disk`` they are read from the mapped file.
- peak: the most that forward, backward and optimizer held at once of what they allocated. Of that,
  inputs: what checkpointing keeps of every layer; ``fsdp.activation_offload`` moves it to the host.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import multiprocessing
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoConfig, AutoModelForCausalLM

from fsdpq.data.dealing.collate import build_step
from fsdpq.data.text.tokenize import Row
from fsdpq.recipe.root import Recipe
from fsdpq.training.step import train_step
from fsdpq.worker.assemble import assemble_model

NUM_RANKS = 2
ROWS_PER_RANK = 16
ROW_TOKENS = 64
PLAN = ((1, 1), (4, 4), (16, 16), (16, 1))
"""``micro_batch_size`` and ``layer_chunks``."""

SHAPE: dict[str, Any] = {
    "hidden_size": 256,
    "intermediate_size": 704,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 64,
}
CPU = torch.device("cpu")
MIB, KIB = 1 << 20, 1 << 10


@dataclass(frozen=True)
class Counts:
    """What one rank did in one step.

    Attributes:
        gathers: gathers of a group of parameters.
        gathered_bytes: bytes that came out of them.
        shard_bytes: bytes that went in.
        tokens: tokens that the rank computed.
        peak_bytes: most bytes held at once, of those that the step allocated; of rank 0.
        input_bytes: checkpointed inputs of the layers, of one micro-batch.
        loss: mean token loss over all ranks.
    """

    gathers: int
    gathered_bytes: int
    shard_bytes: int
    tokens: int
    peak_bytes: int
    input_bytes: int
    loss: float


class CountedGathers(TorchDispatchMode):
    """Counts the gathers that FSDP starts while it is active.

    Attributes:
        sizes: bytes that came out and that went in, one pair a gather.
    """

    def __init__(self) -> None:
        super().__init__()
        self.sizes: list[tuple[int, int]] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func is torch.ops.c10d._allgather_base_.default:
            self.sizes.append((args[0].nbytes, args[1].nbytes))
        return func(*args, **(kwargs or {}))


def save_model(directory: Path, **changes: Any) -> Path:
    """Saves a random Llama in bf16."""
    torch.manual_seed(0)
    config = AutoConfig.for_model("llama", **(SHAPE | changes))
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(directory)
    return directory


def build_recipe(micro_batch_size: int, layer_chunks: int, offload: str) -> Recipe:
    """Returns NF4 with LoRA on every linear, in bf16, all layers checkpointed."""
    document: dict[str, Any] = {
        "version": 1,
        "name": "chunks",
        "model": {"name_or_path": "tiny", "dtype": "bf16"},
        "quantization": {"kind": "bnb"},
        "adapter": {"kind": "lora", "rank": 8, "alpha": 16.0},
        "fsdp": {"offload": offload},
        "data": {"path": "rows.jsonl"},
        "optimizer": {"kind": "adamw", "lr": 1e-3},
        "lr_scheduler": {"kind": "constant"},
        "training": {
            "steps": 1,
            "micro_batch_size": micro_batch_size,
            "global_batch_size": ROWS_PER_RANK * NUM_RANKS,
            "layer_chunks": layer_chunks,
        },
        "launch": {"device": "cpu"},
    }
    return Recipe.model_validate(document)


def make_rows(num_rows: int, vocab_size: int) -> list[Row]:
    """Returns rows of the same length."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, vocab_size, (num_rows, ROW_TOKENS), generator=generator).tolist()
    return [Row(row, [True] * ROW_TOKENS) for row in ids]


def peak_bytes(run: Callable[[], Any]) -> int:
    """Returns the most that ``run`` held at once of what it allocated, by all threads."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "trace.json"
        profiler.export_chrome_trace(str(path))
        events = json.loads(path.read_text(encoding="utf-8"))["traceEvents"]
    memory = [event for event in events if event["name"] == "[memory]"]
    first = min(memory, key=lambda event: event["ts"])["args"]
    before = first["Total Allocated"] - first["Bytes"]
    return max(event["args"]["Total Allocated"] for event in memory) - before


def measure(
    directory: Path,
    micro_batch_size: int,
    layer_chunks: int,
    *,
    rows_per_rank: int = ROWS_PER_RANK,
    offload: str = "none",
) -> Counts:
    """Returns what the first step of this rank gathers, and the second allocates.

    Ranks: all (collective).
    """
    recipe = build_recipe(micro_batch_size, layer_chunks, offload)
    assembled = assemble_model(recipe, directory, device=CPU, report_load=lambda *_: None)
    config = assembled.model.hf.config
    step = build_step(
        make_rows(rows_per_rank * dist.get_world_size(), config.vocab_size),
        micro_batch_size=micro_batch_size,
        rank=dist.get_rank(),
        world_size=dist.get_world_size(),
    )
    optimizer = torch.optim.AdamW(assembled.trainable, lr=0.0, fused=True)

    def run() -> torch.Tensor:
        return train_step(
            assembled.model,
            step,
            optimizer=optimizer,
            parameters=assembled.trainable,
            max_grad_norm=1.0,
            device=CPU,
        ).loss

    with CountedGathers() as counted:
        loss = run()
    dist.all_reduce(loss)
    if dist.get_rank():
        run()
    peak = 0 if dist.get_rank() else peak_bytes(run)
    tokens = rows_per_rank * ROW_TOKENS
    gathered, shards = (sum(sizes) for sizes in zip(*counted.sizes, strict=True))
    inputs = micro_batch_size * ROW_TOKENS * config.hidden_size * config.num_hidden_layers * 2
    return Counts(len(counted.sizes), gathered, shards, tokens, peak, inputs, loss.item())


def run_rank(rank: int, root: Path) -> None:
    """Measures the plan as one of the ranks; rank 0 writes what it found."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")  # the profiler's, and hqq's imports
    store = dist.FileStore(str(root / "store"), NUM_RANKS)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=NUM_RANKS)
    found = [asdict(measure(root / "model", *setting)) for setting in PLAN]
    if rank == 0:
        (root / "found.json").write_text(json.dumps(found), encoding="utf-8")
    dist.barrier()
    dist.destroy_process_group()


def print_table(found: Sequence[Counts]) -> None:
    print("micro-batch  chunks  gathers  gathered     shards    peak  inputs    rest     loss")
    print("       rows                    KiB/token  KiB/token   MiB     MiB     MiB")
    for (micro, chunks), counts in zip(PLAN, found, strict=True):
        gathered = counts.gathered_bytes / counts.tokens / KIB
        shards = counts.shard_bytes / counts.tokens / KIB
        peak, inputs = counts.peak_bytes / MIB, counts.input_bytes / MIB
        print(
            f"{micro:11} {chunks:7} {counts.gathers:8} {gathered:10.2f} {shards:10.2f} "
            f"{peak:7.1f} {inputs:7.1f} {peak - inputs:7.1f}  {counts.loss:.6f}"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="also write the numbers there")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="fsdpq-bench-") as directory:
        root = Path(directory)
        save_model(root / "model")
        multiprocessing.spawn(run_rank, (root,), NUM_RANKS)
        text = (root / "found.json").read_text(encoding="utf-8")
    sizes = f"{SHAPE['num_hidden_layers']} layers, hidden {SHAPE['hidden_size']}, NF4, bf16"
    print(f"{sizes}, {NUM_RANKS} ranks, {ROWS_PER_RANK} rows of {ROW_TOKENS} tokens a rank")
    print_table([Counts(**row) for row in json.loads(text)])
    if options.json:
        options.json.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
