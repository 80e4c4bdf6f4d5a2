"""Runs a plan and prints all rows: ``python -m scripts.gpu``."""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import IO

from scripts.gpu.plan import PARTS, PLANS, Stage, Task
from scripts.gpu.rows import Rows, print_table, read_rows


def start(task: Task, *, rows: Path, device: str, log: IO[str]) -> subprocess.Popen[str]:
    """Starts a part as a process group of its own."""
    command = [sys.executable, "-m", "scripts.gpu.part", task.part]
    command += ["--rows", str(rows), "--device", device, *(["--tiny"] if task.tiny else [])]
    return subprocess.Popen(command, stdout=log, stderr=log, text=True, start_new_session=True)


def end(process: subprocess.Popen[str]) -> int:
    """Ends a part and what it started, if it still runs; returns its exit code."""
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
    return process.wait()


def run_stage(stage: Stage, *, rows: Path, device: str, log: IO[str], deadline: float) -> None:
    """Runs the parts of a stage at the same time, and ends those that take too long."""
    started = time.monotonic()
    running = {task: start(task, rows=rows, device=device, log=log) for task in stage}
    try:
        for task, process in running.items():
            limit = min(started + task.seconds, deadline) - time.monotonic()
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(max(1.0, limit))
            code = end(process)
            if code:
                after = {"exit": code, "after_s": time.monotonic() - started}
                Rows(rows, task.part).write("ended early", after)
    finally:
        for process in running.values():
            end(process)
    print(f"{[task.part for task in stage]}: {time.monotonic() - started:.0f} s", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(prog="scripts.gpu", description=__doc__)
    parser.add_argument("--plan", choices=sorted(PLANS), default="full")
    parser.add_argument("--parts", nargs="+", choices=sorted(PARTS), help="only these")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda")
    parser.add_argument("--seconds", type=float, default=3600.0, help="start nothing after these")
    parser.add_argument("--out", type=Path, required=True, help="directory for rows and log")
    arguments = parser.parse_args()
    deadline = time.monotonic() + arguments.seconds
    arguments.out.mkdir(parents=True, exist_ok=True)
    rows = arguments.out / "rows.jsonl"
    rows.unlink(missing_ok=True)
    with (arguments.out / "log.txt").open("w", encoding="utf-8") as log:
        for stage in PLANS[arguments.plan]:
            chosen = tuple(t for t in stage if not arguments.parts or t.part in arguments.parts)
            if chosen and time.monotonic() < deadline:
                run_stage(
                    chosen, rows=rows, device=arguments.device, log=log, deadline=deadline
                )  # fmt: skip
    print_table(read_rows(rows))


if __name__ == "__main__":
    main()
