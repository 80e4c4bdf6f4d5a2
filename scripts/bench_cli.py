"""Prints how long ``fsdpq validate`` takes on the largest shipped recipe: ``make bench``.

Beside it, ``python -c pass`` and ``python -c "import torch"``: the floor, and what the torch-free
front half saves. The commands take turns, so that other work on the machine hits all of them alike;
wall times in milliseconds, and the ratio to ``python -c pass``, which depends less on the machine.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
NUM_RUNS = 15
TARGET_MS = 350

ENVIRONMENT = {name: text for name, text in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
"""With modules compiled once, as for a user: that variable makes every start compile them anew."""


def wall_ms(command: list[str]) -> float:
    started = time.perf_counter()
    subprocess.run(command, cwd=ROOT, env=ENVIRONMENT, check=True, stdout=subprocess.DEVNULL)
    return 1000 * (time.perf_counter() - started)


def main() -> None:
    recipes = (ROOT / "recipes").glob("*.yaml")
    largest = max(recipes, key=lambda path: path.stat().st_size).relative_to(ROOT)
    python = sys.executable
    commands = {
        "python -c pass": [python, "-c", "pass"],
        f"fsdpq validate {largest}": [python, "-m", "fsdpq", "validate", str(largest)],
        'python -c "import torch"': [python, "-c", "import torch"],
    }
    times: dict[str, list[float]] = {name: [] for name in commands}
    for run in range(NUM_RUNS + 1):
        for name, command in commands.items():
            found = wall_ms(command)
            if run > 0:  # the first one fills the file cache
                times[name].append(found)
    floor = statistics.median(times["python -c pass"])
    width = max(map(len, commands))
    print(f"{'':{width}}  median     min   ratio   ({NUM_RUNS} runs)")
    for name, found in times.items():
        median = statistics.median(found)
        print(f"{name:{width}}  {median:6.0f}  {min(found):6.0f}  {median / floor:6.1f}")
    print(f"target for validate: a median of at most {TARGET_MS} ms on two quiet cores")


if __name__ == "__main__":
    main()
