"""Runs the contenders and prints the table: ``python -m scripts.bench_train``."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import tempfile
from pathlib import Path
from typing import Any

from fsdpq.launch.machine.cpu_rates import find_cpu_dtype
from scripts.bench_train.contenders import CONTENDERS, Options, write_checkpoint
from scripts.bench_train.processes import RATE, Found, Limits, measure_together
from scripts.bench_train.shapes import SHAPES, Batch, Shape, step_flops, with_layers

CPU_CONTENDERS = ("fsdpq", "transformers", "transformers-unprepared")
SPEED_TARGET = 1.0
AUTO_TARGET = 1.25
MEMORY_TARGETS = {"1x512": 0.85, "2x2048": 0.6}
"""Of transformers' peak, by batch."""

GPU_SPEED_TARGET, GPU_MEMORY_TARGET = 1.3, 0.8

Results = dict[tuple[str, Batch], Found]


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="bench_train", description="Measures training beside transformers."
    )
    add = parser.add_argument
    add("--device", choices=("cpu", "cuda"), default="cpu")
    add("--shape", choices=sorted(SHAPES), default="200m")
    add("--layers", type=int, help="fewer layers than the shape has")
    add("--batches", type=Batch.parse, nargs="+", default=[Batch(1, 512), Batch(2, 2048)])
    add("--rounds", type=int, default=5, help="timed steps of 512 tokens; fewer of longer batches")
    add("--contenders", nargs="+", choices=sorted(CONTENDERS), default=list(CPU_CONTENDERS))
    add("--dtypes", nargs="+", choices=("bf16", "fp32"), default=["bf16", "fp32"])
    add("--lora-rank", type=int, default=16)
    add("--weights", choices=("checkpoint", "device"), default="checkpoint")
    add("--offload", choices=("none", "cpu"), default="none", help="of fsdpq's base")
    add("--activation-offload", action="store_true", help="of fsdpq")
    add("--cap-gib", type=float, help="GPU memory that a process may use")
    add("--threads", type=int, default=os.cpu_count() or 1)
    add("--json", type=Path, help="write the numbers to this file")
    return parser.parse_args()


def names_of(arguments: argparse.Namespace) -> list[str]:
    """Returns the processes: every contender in every dtype, and the rates.

    In fp32 ``prepare_model_for_kbit_training`` has nothing to cast: one of the two is enough.
    """
    names = [
        f"{contender}:{dtype}"
        for dtype in arguments.dtypes
        for contender in arguments.contenders
        if not (contender == "transformers-unprepared" and dtype == "fp32")
    ]
    return names + [f"{RATE}:{dtype}" for dtype in arguments.dtypes]


def measure(arguments: argparse.Namespace, shape: Shape) -> Results:
    """Runs all processes: together on a CPU, one after the other on a GPU."""
    names = names_of(arguments)
    groups = [names] if arguments.device == "cpu" else [[name] for name in names]
    limits = Limits(arguments.threads, arguments.cap_gib)
    tokens = max(batch.tokens for batch in arguments.batches)
    found: Results = {}
    with tempfile.TemporaryDirectory(prefix="fsdpq-bench-") as directory:
        checkpoint = Path(directory) / "model" if arguments.weights == "checkpoint" else None
        if checkpoint is not None:
            write_checkpoint(checkpoint, shape, tokens)
        options = Options(
            shape, checkpoint, "", arguments.device, arguments.lora_rank, tokens,
            arguments.offload, arguments.activation_offload,
        )  # fmt: skip
        for group in groups:
            found |= measure_together(
                group, arguments.batches, options=options, limits=limits,
                rounds_of=lambda batch: max(1, arguments.rounds * 512 // batch.size),
            )  # fmt: skip
    return found


def rows_of(found: Results, shape: Shape, lora_rank: int) -> list[dict[str, Any]]:
    """Returns what the table shows, a row for each contender and batch."""
    rows: list[dict[str, Any]] = []
    for (name, batch), one in found.items():
        contender, _, dtype = name.partition(":")
        if contender == RATE:
            continue
        rates = sorted(found[f"{RATE}:{dtype}", batch].losses[1:])
        rate = rates[len(rates) // 2]
        done, model = (
            step_flops(shape, batch, lora_rank=lora_rank, recompute=recompute) / one.step_s / rate
            for recompute in (True, False)
        )
        rows.append(
            {
                "contender": contender,
                "dtype": dtype,
                "batch": str(batch),
                "tokens_per_s": batch.size / one.step_s,
                "cpu_s": one.step_cpu_s,
                "share": done,
                "mfu": model,
                "matmul_flops_per_s": rate,
                "peak_bytes": one.peak_bytes,
                "host_bytes": one.host_bytes,
                "first_loss": one.losses[0],
                "last_loss": one.losses[-1],
            }
        )
    return rows


def print_table(rows: list[dict[str, Any]]) -> None:
    print("                                           tokens/s  CPU s/step  share    MFU   peak MB")
    for row in sorted(rows, key=lambda row: (row["batch"], row["dtype"], row["contender"])):
        print(
            f"{row['batch']:<8}{row['dtype']:<6}{row['contender']:<26}{row['tokens_per_s']:>10.1f}"
            f"{row['cpu_s']:>12.2f}{row['share']:>7.2f}{row['mfu']:>7.2f}"
            f"{row['peak_bytes'] / 1e6:>10.0f}   loss {row['first_loss']:.4f} to "
            f"{row['last_loss']:.4f}"
        )
    for batch, dtype in sorted({(row["batch"], row["dtype"]) for row in rows}):
        rate = next(r for r in rows if r["batch"] == batch and r["dtype"] == dtype)
        print(f"matrix products, {batch}, {dtype}: {rate['matmul_flops_per_s'] / 1e9:.0f} GFLOP/s")


def ratios(rows: list[dict[str, Any]], device: str) -> list[tuple[str, float, float, bool]]:
    """Returns what is compared: words, ratio, target, and whether more is better."""
    by_key = {(row["contender"], row["dtype"], row["batch"]): row for row in rows}
    checks: list[tuple[str, float, float, bool]] = []
    for (who, dtype, batch), theirs in sorted(by_key.items()):
        ours = by_key.get(("fsdpq", dtype, batch))
        if who == "fsdpq" or ours is None:
            continue
        speed = SPEED_TARGET if device == "cpu" else GPU_SPEED_TARGET
        memory = MEMORY_TARGETS.get(batch, 1.0) if device == "cpu" else GPU_MEMORY_TARGET
        label = f"{batch} {dtype} of {who}"
        for key, target, more in (("tokens_per_s", speed, True), ("peak_bytes", memory, False)):
            checks.append((f"{key}, {label}", ours[key] / theirs[key], target, more))
    auto = find_cpu_dtype().dtype
    for who, dtype, batch in sorted(by_key):
        ours = by_key.get(("fsdpq", auto, batch))
        if device == "cpu" and who != "fsdpq" and dtype == "bf16" and ours is not None:
            ratio = ours["tokens_per_s"] / by_key[who, dtype, batch]["tokens_per_s"]
            label = f"tokens_per_s, {batch} auto ({auto}) of bf16 {who}"
            checks.append((label, ratio, AUTO_TARGET, True))
    return checks


def print_targets(checks: list[tuple[str, float, float, bool]]) -> None:
    for label, ratio, target, more in checks:
        good = ratio >= target if more else ratio <= target
        word = "at least" if more else "at most"
        print(f"{label:<70}{ratio:>6.2f}  {word} {target:<5}{'ok' if good else 'MISSED'}")


def main() -> None:
    arguments = parse_arguments()
    shape = with_layers(SHAPES[arguments.shape], arguments.layers)
    print(
        f"{shape.num_weights / 1e6:.0f}M weights, NF4 + double quantization, "
        f"LoRA r{arguments.lora_rank}, {arguments.device}, {arguments.threads} threads"
    )
    rows = rows_of(measure(arguments, shape), shape, arguments.lora_rank)
    print_table(rows)
    checks = ratios(rows, arguments.device)
    print_targets(checks)
    if arguments.json:
        document = {"shape": dataclasses.asdict(shape), "rows": rows}
        arguments.json.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
