"""Measures the memory of training by phase, beside transformers: ``make bench-memory``.

A made-up Llama of 56 million weights in bf16 (`bench_memory.setups`) is written to a temporary
directory and trained by the worker's own code, each setup in fresh processes of one thread, which
train a tiny model first: what libraries set up on first use lies in the baseline.

- By phase, in the first step: resident memory over the libraries at its end, and the most within it
  (``VmHWM``, set back at each phase through /proc/self/clear_refs). On a GPU, its allocator's.
- Steps after it: the most that torch's allocator held beyond what it held before the step, and the
  largest single allocation; for several lengths with a straight line fitted to them.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

from bench_memory import chart
from bench_memory.allocations import fit_line
from bench_memory.process import run_process, write_models
from bench_memory.setups import LENGTH, LENGTHS, SHAPE, TINY, Setup, list_setups

MB = 1e6
PHASES = ("load", "init", "forward", "backward", "optimizer")
SCRIPTS = Path(__file__).parents[1]
CURVES = ("lora", "dora", "PEFT lora")
"""Setups of the plot."""


def start(setup: Setup, root: Path, index: int) -> list[dict[str, Any]]:
    """Runs the processes of a setup; returns what each measured."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {"OMP_NUM_THREADS": "1", "WORLD_SIZE": str(setup.num_ranks), "TQDM_DISABLE": "1"}
    shared |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    shared |= {"PYTHONPATH": os.pathsep.join([str(SCRIPTS), os.environ.get("PYTHONPATH", "")])}
    outs = [root / f"{index}-{rank}.json" for rank in range(setup.num_ranks)]
    command = [sys.executable, "-m", "bench_memory", "--process", json.dumps(asdict(setup))]
    logs = [out.with_suffix(".log") for out in outs]
    processes = [
        subprocess.Popen(
            [*command, str(root), str(out)],
            env=os.environ | shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=log.open("wb"),
            stderr=subprocess.STDOUT,
        )
        for rank, (out, log) in enumerate(zip(outs, logs, strict=True))
    ]
    try:
        codes = [process.wait() for process in processes]
    finally:
        for process in processes:
            process.kill()
    if any(codes):
        text = "\n".join(log.read_text(errors="replace")[-2000:] for log in logs)
        raise SystemExit(f"{setup.name}: exit codes {codes}\n{text}")
    print(f"measured: {setup.name}", file=sys.stderr, flush=True)
    return [json.loads(out.read_text()) for out in outs]


def worst(found: list[dict[str, Any]]) -> dict[str, Any]:
    """Returns one setup's row: of its ranks, the one with the higher peak over its libraries."""
    rows = [{**one, "over": _over_libraries(one)} for one in found]
    return max(rows, key=lambda row: max(use["peak"] for use in row["over"].values()))


def _over_libraries(found: dict[str, Any]) -> dict[str, dict[str, int]]:
    base = found["phases"]["libraries"]
    return {
        name: {
            "now": use["now"] - base["now"],
            "peak": use["peak"] - base["now"],
            "anonymous": use["anonymous"] - base["anonymous"],
        }
        for name, use in found["phases"].items()
        if name != "libraries"
    }


def print_phases(rows: dict[str, dict[str, Any]]) -> None:
    """Prints the table by phase."""
    heads = " | ".join(f"{phase}, peak" for phase in PHASES)
    print(f"\n| MB over the libraries | frozen | trained | loaded | {heads} | a step allocates |")
    print(f"|{' --- |' * (len(PHASES) + 5)}")
    for name, row in rows.items():
        over = row["over"]
        loaded = over.get("init", over["load"])["anonymous"]
        peaks = [over[phase]["peak"] if phase in over else 0 for phase in PHASES]
        length = min(row["steps"], key=lambda n: abs(int(n) - LENGTH))
        numbers = [row["frozen_bytes"], row["trained_bytes"], loaded, *peaks]
        numbers.append(row["steps"][length]["peak"])
        print(f"| {name} | " + " | ".join(f"{number / MB:.0f}" for number in numbers) + " |")


def print_lengths(rows: dict[str, dict[str, Any]]) -> None:
    """Prints what a step allocates at every length, with a straight line through the backward.

    The forward's peak is in the loss, which grows up to one chunk of logits and no further.
    """
    several = {name: row["steps"] for name, row in rows.items() if len(row["steps"]) > 1}
    lengths = max((list(steps) for steps in several.values()), key=len)
    print(f"\n| a step allocates, MB | {' | '.join(lengths)} | line | R² | n² |")
    print(f"|{' --- |' * (len(lengths) + 4)}")
    for name, steps in several.items():
        for phase in ("forward", "backward"):
            peaks = {n: step["phases"][phase] for n, step in steps.items()}
            cells = [f"{peaks[n] / MB:.1f}" if n in peaks else "" for n in lengths]
            fit = fit_line([int(n) for n in peaks], list(peaks.values()))
            line = f"{fit.base_bytes / MB:.1f} MB + {fit.token_bytes / 1e3:.1f} kB n"
            line = [line, f"{fit.r_squared:.5f}", f"{100 * fit.quadratic_share:.1f}%"]
            cells += line if phase == "backward" else [""] * 3
            print(f"| {name}, {phase} | {' | '.join(cells)} |")


def print_checks(rows: dict[str, dict[str, Any]]) -> None:
    """Prints the ratios that the tests hold on to."""

    def steps(name: str, key: str, length: int = LENGTH) -> float:
        step = rows[name]["steps"][str(length)]
        return step["phases"].get(key, step.get(key)) or 0

    def resident(name: str) -> float:
        return max(use["peak"] for use in rows[name]["over"].values())

    longest = LENGTHS[-1]
    logits, long_logits = (n * SHAPE["vocab_size"] * 4 for n in (LENGTH, longest))
    print()
    for what, value in {
        "dora / lora, a step": steps("dora", "peak") / steps("lora", "peak"),
        "dora / lora, backward": steps("dora", "backward") / steps("lora", "backward"),
        "dora / lora, resident": resident("dora") / resident("lora"),
        "PEFT dora / PEFT lora, resident": resident("PEFT dora") / resident("PEFT lora"),
        "lora / PEFT lora, a step": steps("lora", "peak") / steps("PEFT lora", "peak"),
        f"lora / PEFT lora, a step, {longest} tokens": (
            steps("lora", "peak", longest) / steps("PEFT lora", "peak", longest)
        ),
        "lora / PEFT lora, resident": resident("lora") / resident("PEFT lora"),
        "lora's largest piece / all logits": steps("lora", "largest") / logits,
        f"lora's largest piece / all logits, {longest} tokens": (
            steps("lora", "largest", longest) / long_logits
        ),
        "PEFT lora's largest piece / all logits": steps("PEFT lora", "largest") / logits,
    }.items():
        print(f"{what:<56}{value:>7.2f}")


def draw_plot(rows: dict[str, dict[str, Any]], path: Path) -> None:
    series = {
        name: [(float(n), step["peak"] / MB) for n, step in rows[name]["steps"].items()]
        for name in CURVES
    }
    title = "Allocated by a training step, over weights and optimizer states"
    path.write_text(chart.draw(title, "tokens in the row", "MB", series), encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description="Measures the memory of training by phase.")
    parser.add_argument("--full", action="store_true", help="rows of up to 8192 tokens")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="these setups")
    parser.add_argument("--json", type=Path, help="write the numbers to this file")
    parser.add_argument("--svg", type=Path, help="write the plot to this file")
    parser.add_argument("--process", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.process:
        setup, root, out = options.process
        run_process(Setup(**json.loads(setup)), Path(root), Path(out))
        return
    setups = list_setups(full=options.full)
    if options.only:
        setups = [setup for setup in setups if setup.name in options.only]
    with tempfile.TemporaryDirectory(prefix="fsdpq-bench-") as directory:
        root = Path(directory)
        write_models(root, {"tiny": TINY, "model": SHAPE})
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            found = pool.map(
                lambda numbered: start(numbered[1], root, numbered[0]), enumerate(setups)
            )
            rows = {setup.name: worst(one) for setup, one in zip(setups, found, strict=True)}
    print_phases(rows)
    if not options.only:
        print_lengths(rows)
        print_checks(rows)
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1) + "\n")
    if options.svg:
        draw_plot(rows, options.svg)


if __name__ == "__main__":
    main()
