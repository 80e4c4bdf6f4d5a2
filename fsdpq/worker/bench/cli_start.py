"""``fsdpq bench cli``: how long commands take that load no model.

Beside them ``python -c pass``, the floor, and what a command would take at least that imports torch
or transformers. The commands take turns, so that other work on the machine hits all of them alike;
their ratio to the floor depends less on the machine than their time.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from fsdpq.errors import LaunchError
from fsdpq.recipe.shipped import shipped_recipes
from fsdpq.run_files.bench_record import BenchResult, Cell, Column, Plot, Spread, Table, ratio
from fsdpq.run_files.benchmarks import BenchJob
from fsdpq.worker.bench.contender_processes import Tell

FLOOR = "python -c pass"
TARGETS_MS = {"fsdpq validate": 350.0, "fsdpq plan": 500.0}
PLANNED, GPUS = "llama-3-8b-qlora-1x24gb.yaml", "1x24GiB"
COLUMNS = (
    Column("command", "command"),
    Column("wall_ms", "wall, ms"),
    Column("cpu_ms", "CPU, ms"),
    Column("of_floor", "of an empty Python", 1),
)


def measure_cli(job: BenchJob, tell: Tell) -> BenchResult:
    """Returns how long commands take."""
    commands = list_commands(compare=job.compare)
    environment = {
        name: text for name, text in os.environ.items()
        if name not in ("PYTHONDONTWRITEBYTECODE", "FSDPQ_LAUNCHER_PID")
    }  # fmt: skip
    wall: dict[str, list[float]] = {name: [] for name in commands}
    cpu: dict[str, list[float]] = {name: [] for name in commands}
    for run in range(job.number("runs") + 1):
        tell(f"round {run} of {job.number('runs')}")
        for name, command in commands.items():
            wall_ms, cpu_ms = time_command(command, environment, job.directory)
            if run > 0:  # the first one fills the file cache and compiles modules
                wall[name].append(wall_ms)
                cpu[name].append(cpu_ms)
    floor = Spread.of(wall[FLOOR]).median
    rows: list[dict[str, Cell]] = [
        {
            "command": name,
            "wall_ms": Spread.of(times),
            "cpu_ms": Spread.of(cpu[name]),
            "of_floor": Spread.of(times).median / floor,
        }
        for name, times in wall.items()
    ]
    ratios = [
        ratio(
            f"{command}, of {target_ms:.0f} ms, for two quiet cores", wall[command],
            [target_ms] * len(wall[command]), better="lower", target=1.0,
        )
        for verb, target_ms in TARGETS_MS.items()
        for command in commands if command.startswith(verb)
    ]  # fmt: skip
    heights = {name: Spread.of(times).median for name, times in wall.items()}
    bars = {name: {"wall": height} for name, height in heights.items()}
    plot = Plot("cli-start", "Commands that load no model", "", "ms", bars=bars)
    return BenchResult([Table("commands in turns", COLUMNS, rows)], ratios, [plot])


def list_commands(*, compare: bool) -> Mapping[str, Sequence[str]]:
    """Returns names -> commands."""
    python = sys.executable
    largest = max(shipped_recipes().glob("*.yaml"), key=lambda path: path.stat().st_size)
    fsdpq = (python, "-m", "fsdpq")
    commands: dict[str, Sequence[str]] = {
        FLOOR: (python, "-c", "pass"),
        "fsdpq --help": (*fsdpq, "--help"),
        f"fsdpq validate {largest.name}": (*fsdpq, "validate", str(largest)),
        f"fsdpq plan {PLANNED}": (
            *fsdpq, "plan", str(shipped_recipes() / PLANNED), "--gpus", GPUS, "--ram", "64GiB",
        ),
        'python -c "import torch"': (python, "-c", "import torch"),
    }  # fmt: skip
    if compare:
        commands['python -c "import transformers.trainer"'] = (
            python, "-c", "import transformers.trainer",
        )  # fmt: skip
    return commands


def time_command(
    command: Sequence[str], environment: Mapping[str, str], directory: Path
) -> tuple[float, float]:
    """Returns milliseconds on the clock and on cores that a command takes.

    Raises:
        LaunchError: it failed.
    """
    with (directory / "log").open("wb") as log:
        started = time.perf_counter()
        process = subprocess.Popen(
            command, env=dict(environment), stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
            stderr=log,
        )  # fmt: skip
        _, status, usage = os.wait4(process.pid, 0)
        wall_ms = 1000 * (time.perf_counter() - started)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode != 0:
        text = (directory / "log").read_text(encoding="utf-8", errors="replace")
        raise LaunchError(f"`{' '.join(command)}` ended with {process.returncode}", "", text)
    return wall_ms, 1000 * (usage.ru_utime + usage.ru_stime)
