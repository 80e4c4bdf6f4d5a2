"""Measures loading a base in NF4 on CPUs, beside transformers: ``make bench-load``.

A checkpoint of TinyLlama's shape (1.1 billion weights in bf16, 2.2 GB) is made up in a temporary
directory. Then it is loaded, quantized to NF4 with double quantization, by 1, 2 and 4 ranks of
fsdpq and by 1 and 2 processes of ``AutoModelForCausalLM.from_pretrained``. Every process is fresh,
has ``cores / processes`` threads (one rank runs on a single thread too, to compare ranks with),
and loads a tiny model first, so that imports and what libraries set up on first use lie in its
baseline.

- peak: ``VmHWM`` of /proc/self/status at the end, set back before the load through
  /proc/self/clear_refs, less ``VmRSS`` at that moment. File-backed pages count.
- read: growth of ``rchar`` in /proc/self/io, over all ranks. Mappings, as in transformers, are not
  counted there.
- wall: from before the model is built until it is loaded, the slowest process.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

MB, GB = 1e6, 1e9
SHAPE = {"hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 22}
HEADS = {"num_attention_heads": 32, "num_key_value_heads": 4}
TINY = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 1}
VOCAB_SIZE = 32000
PIECE = 1 << 22


def tensor_shapes(shape: dict[str, int], vocab_size: int) -> dict[str, tuple[int, ...]]:
    hidden, ffn = shape["hidden_size"], shape["intermediate_size"]
    key_value = hidden // HEADS["num_attention_heads"] * HEADS["num_key_value_heads"]
    layer = {
        "input_layernorm": (hidden,),
        "mlp.down_proj": (hidden, ffn),
        "mlp.gate_proj": (ffn, hidden),
        "mlp.up_proj": (ffn, hidden),
        "post_attention_layernorm": (hidden,),
        "self_attn.k_proj": (key_value, hidden),
        "self_attn.o_proj": (hidden, hidden),
        "self_attn.q_proj": (hidden, hidden),
        "self_attn.v_proj": (key_value, hidden),
    }
    names = {"lm_head.weight": (vocab_size, hidden), "model.norm.weight": (hidden,)}
    names |= {"model.embed_tokens.weight": (vocab_size, hidden)}
    for index in range(shape["num_hidden_layers"]):
        names |= {f"model.layers.{index}.{name}.weight": size for name, size in layer.items()}
    return names


def write_checkpoint(directory: Path, shape: dict[str, int], vocab_size: int) -> int:
    """Writes config and weights in pieces; returns the bytes of the weights."""
    import numpy as np

    from fsdpq.fetch.bf16_safetensors import TensorPlan, write_bf16

    directory.mkdir()
    config = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "dtype": "bfloat16"}
    config |= shape | HEADS | {"vocab_size": vocab_size, "tie_word_embeddings": False}
    (directory / "config.json").write_text(json.dumps(config))
    plans = [TensorPlan(name, size) for name, size in tensor_shapes(shape, vocab_size).items()]
    block = np.random.default_rng(0).standard_normal(2 * PIECE, dtype=np.float32) * 0.02

    def pieces() -> Iterator[Any]:
        offset = 0
        for plan in plans:
            left = math.prod(plan.shape)
            while left:
                size, offset = min(left, PIECE), (offset + 7919) % PIECE
                yield block[offset : offset + size]
                left -= size

    write_bf16(directory / "model.safetensors", plans, pieces())
    return sum(plan.num_bytes for plan in plans)


def status_bytes(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(f"{field}:"))


def read_bytes() -> int:
    return int(Path("/proc/self/io").read_text().split()[1])


def load_with_fsdpq(directory: Path) -> Callable[[], int]:
    """Loads; returns a function for the bytes of this rank's shards."""
    import torch

    from fsdpq.recipe.root import Recipe
    from fsdpq.worker.assemble import assemble_model

    recipe = Recipe.model_validate(
        {
            "version": 1,
            "name": "bench",
            "model": {"name_or_path": str(directory), "dtype": "bf16"},
            "quantization": {"kind": "bnb", "quant_type": "nf4", "double_quant": True},
            "adapter": {"kind": "lora", "rank": 1, "alpha": 1.0},
            "data": {"path": "rows.jsonl"},
            "optimizer": {"kind": "adamw", "lr": 1e-4},
            "lr_scheduler": {"kind": "constant"},
            "training": {"steps": 1, "global_batch_size": 4, "micro_batch_size": 1},
            "launch": {"device": "cpu"},
        }
    )
    loaded = assemble_model(
        recipe, directory, device=torch.device("cpu"), report_load=lambda _done, _total: None
    )
    return lambda: loaded.own_bytes(trainable=False) + loaded.own_bytes(trainable=True)


def load_with_transformers(directory: Path) -> Callable[[], int]:
    """Loads; returns a function for the bytes of the model."""
    import torch
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    options = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    model = AutoModelForCausalLM.from_pretrained(
        directory, quantization_config=options, dtype=torch.bfloat16, device_map="cpu"
    )
    return lambda: sum(tensor.nbytes for tensor in model.parameters())


LOADERS = {"fsdpq": load_with_fsdpq, "transformers": load_with_transformers}


def run_process(who: str, root: Path, out: Path) -> None:
    """One process: warms up, loads, writes what it measured."""
    import torch

    from fsdpq.dist import start_process_group, wait_for_all

    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    start_process_group("cpu")
    load = LOADERS[who]
    load(root / "tiny")
    wait_for_all()
    Path("/proc/self/clear_refs").write_text("5")
    baseline, read_before, started = status_bytes("VmRSS"), read_bytes(), time.perf_counter()
    own_bytes = load(root / "model")
    wall_s = time.perf_counter() - started
    found = {
        "wall_s": wall_s,
        "baseline_bytes": baseline,
        "peak_bytes": status_bytes("VmHWM") - baseline,
        "read_bytes": read_bytes() - read_before,
        "own_bytes": own_bytes(),
    }
    out.write_text(json.dumps(found))
    wait_for_all()


def run_ranks(who: str, num_ranks: int, threads: int, root: Path) -> dict[str, Any]:
    """Starts fresh processes of ``threads`` each and returns what they measured together."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {"OMP_NUM_THREADS": str(threads), "WORLD_SIZE": str(num_ranks)}
    shared |= {"TQDM_DISABLE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    outs = [root / f"{who}-{num_ranks}-{rank}.json" for rank in range(num_ranks)]
    processes = [
        subprocess.Popen(
            [sys.executable, __file__, "--process", who, str(root), str(out)],
            env=os.environ | shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
        )
        for rank, out in enumerate(outs)
    ]
    try:
        codes = [process.wait() for process in processes]
    finally:
        for process in processes:
            process.kill()
    if any(codes):
        raise SystemExit(f"{who} with {num_ranks} processes failed: exit codes {codes}")
    found = [json.loads(out.read_text()) for out in outs]
    return {
        "who": who,
        "ranks": num_ranks,
        "threads": threads,
        "wall_s": max(one["wall_s"] for one in found),
        "peak_bytes": max(one["peak_bytes"] for one in found),
        "over_own_bytes": max(one["peak_bytes"] - one["own_bytes"] for one in found),
        "own_bytes": max(one["own_bytes"] for one in found),
        "read_bytes": sum(one["read_bytes"] for one in found),
        "baseline_bytes": max(one["baseline_bytes"] for one in found),
    }


def print_row(row: dict[str, Any], weight_bytes: int) -> None:
    mapped = row["who"] == "transformers"
    read = "mapped" if mapped else f"{row['read_bytes'] / weight_bytes:.3f} x"
    print(
        f"{row['who']:<13}{row['ranks']:>5}{row['threads']:>9}{row['wall_s']:>9.1f}"
        f"{row['peak_bytes'] / MB:>10.0f}{row['own_bytes'] / MB:>12.0f}"
        f"{row['over_own_bytes'] / MB:>12.0f}{read:>10}",
        flush=True,
    )


def print_targets(rows: list[dict[str, Any]], weight_bytes: int) -> None:
    found = [row for row in rows if row["who"] == "fsdpq"]
    ours = {row["ranks"]: row for row in found}
    alone = [row for row in found if row["ranks"] == row["threads"] == 1]
    theirs = {row["ranks"]: row for row in rows if row["who"] == "transformers"}
    checks = [
        (f"peak over own shards, {n} ranks, MB", row["over_own_bytes"] / MB, 300)
        for n, row in ours.items()
    ]
    checks += [
        (f"read by {n} ranks, of the checkpoint", row["read_bytes"] / weight_bytes, 1.1)
        for n, row in ours.items()
    ]
    if alone and 2 in ours and ours[2]["threads"] == 1:
        ratio = ours[2]["wall_s"] / alone[0]["wall_s"]
        checks.append(("wall, 2 ranks of 1, a thread each", ratio, 0.65))
    if 2 in ours and 2 in theirs:
        pairs = (("peak_bytes", 0.5), ("wall_s", 0.6))
        for field, target in pairs:
            ratio = ours[2][field] / theirs[2][field]
            checks.append((f"{field} at 2 ranks, of transformers", ratio, target))
    print()
    for what, value, target in checks:
        verdict = "ok" if value <= target else "MISSED"
        print(f"{what:<42}{value:>9.3f}  target {target:<6} {verdict}")


def main() -> None:
    parser = argparse.ArgumentParser(description="Measures loading a base beside transformers.")
    parser.add_argument("--layers", type=int, default=SHAPE["num_hidden_layers"])
    parser.add_argument("--ranks", type=int, nargs="*", default=[1, 2, 4], help="of fsdpq")
    parser.add_argument("--transformers", type=int, nargs="*", default=[1, 2], help="processes")
    parser.add_argument("--json", type=Path, help="write the numbers to this file")
    parser.add_argument("--process", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.process:
        who, root, out = options.process
        run_process(who, Path(root), Path(out))
        return
    shape = SHAPE | {"num_hidden_layers": options.layers}
    with tempfile.TemporaryDirectory(prefix="fsdpq-bench-") as directory:
        root = Path(directory)
        write_checkpoint(root / "tiny", TINY, 256)
        weight_bytes = write_checkpoint(root / "model", shape, VOCAB_SIZE)
        print(f"{weight_bytes / GB:.2f} GB of bf16 weights, {os.cpu_count()} cores")
        print("               ranks  threads   wall s   peak MB  own shards  over shards      read")
        rows: list[dict[str, Any]] = []
        cores = os.cpu_count() or 1
        plan = [("fsdpq", 1, 1)] if 1 in options.ranks and cores > 1 else []
        plan += [("fsdpq", n, max(1, cores // n)) for n in options.ranks]
        plan += [("transformers", n, max(1, cores // n)) for n in options.transformers]
        for who, num_ranks, threads in plan:
            rows.append(run_ranks(who, num_ranks, threads, root))
            print_row(rows[-1], weight_bytes)
    print_targets(rows, weight_bytes)
    if options.json:
        found = {"weight_bytes": weight_bytes, "cores": os.cpu_count(), "rows": rows}
        options.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
