"""Stands in for ``fsdpq train`` of a trial: writes rows, saves when it is asked to, goes on.

What it does is in the recipe's description: words ``key=value``. ``loss`` is the held-out loss at
the last step (``rank+lr`` is their sum in the recipe), ``step_s`` how long a step takes, ``exit``
its exit code after ``say`` was printed. ``crash_at`` ends it by SIGKILL there, the first time.
"""

from __future__ import annotations

import fcntl
import json
import os
import signal
import sys
import time
from pathlib import Path

import yaml

STEPS, EVERY = 6, 2


def main() -> None:
    """Does what the description says."""
    arguments = sys.argv[1:]
    run = Path(arguments[arguments.index("--run-dir") + 1])
    recipe = yaml.safe_load(Path(arguments[0]).read_text(encoding="utf-8"))
    wanted = dict(word.split("=", 1) for word in recipe["description"].split())
    asked: list[int] = []
    for each in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(each, lambda number, _: asked.append(number))
    run.mkdir(parents=True, exist_ok=True)
    with (run / "starts.jsonl").open("a") as file:
        seen = {name: os.environ.get(name) for name in ("CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS")}
        file.write(json.dumps({"arguments": arguments, "pid": os.getpid(), **seen}) + "\n")
    lock = os.open(run, os.O_RDONLY)
    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # two at once would be a mistake
    if "exit" in wanted:
        sys.stderr.write(wanted["say"].replace("_", " ").replace("~", "\n") + "\n")
        sys.exit(int(wanted["exit"]))
    saved = run / "saved"
    done = int(saved.read_text()) if saved.exists() else 0
    write(run / "events.jsonl", {"event": "setup", "total_steps": STEPS})
    for step in range(done, STEPS + 1):
        loss = final_loss(wanted["loss"], recipe) + (STEPS - step)
        if step % EVERY == 0:
            write(run / "metrics.jsonl", {"event": "eval", "step": step, "loss": loss})
        if step:
            row = {"event": "step", "step": step, "total_steps": STEPS, "loss": loss}
            write(run / "metrics.jsonl", row)
        if str(step) == wanted.get("crash_at") and not (run / "crashed").exists():
            (run / "crashed").touch()
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(float(wanted.get("step_s", 0)))
        if asked or os.getppid() != int(os.environ["FSDPQ_PARENT_PID"]):
            saved.write_text(str(step))
            (run / "asked").write_text(" ".join(signal.Signals(each).name for each in asked))
            sys.exit(75)
    write(run / "events.jsonl", {"event": "done"})


def final_loss(text: str, recipe: dict[str, dict[str, float]]) -> float:
    """Returns the loss at the last step."""
    if text == "rank+lr":
        return recipe["adapter"]["rank"] + float(recipe["optimizer"]["lr"])
    return float(text)


def write(path: Path, row: dict[str, object]) -> None:
    """Appends a row."""
    with path.open("a") as file:
        file.write(json.dumps({**row, "time": time.time()}) + "\n")


main()
