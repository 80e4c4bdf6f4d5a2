"""A rank without torch: started by a real torchrun, it does what ``FAKE_MODE`` says."""

import json
import mmap
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

# What torchrun is started with, so that signals for all processes of a job do not end the ranks.
signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM, signal.SIGINT, signal.SIGUSR1})
run_dir, rank = Path(sys.argv[-1]), int(os.environ["RANK"])
mode = os.environ["FAKE_MODE"]


def append(name: str, **row: object) -> None:
    if rank == 0:
        with (run_dir / name).open("a") as file:
            file.write(json.dumps({**row, "time": time.time()}) + "\n")


def record(kind: str, message: str, *, traceback: str = "", exit_code: int = 1) -> None:
    fields = {
        "rank": rank, "kind": kind, "message": message, "hint": "a hint",
        "traceback": traceback, "exit_code": exit_code, "time": time.time(),
    }  # fmt: skip
    (run_dir / "logs" / f"rank-{rank}.error.json").write_text(json.dumps(fields))


waits_for_peer = False
if mode == "kill-once":  # the second start comes to its end
    mode = "finish" if (run_dir / f"arguments-{rank}").exists() else "kill"
    (run_dir / f"arguments-{rank}").write_text(" ".join(sys.argv))
    waits_for_peer = True
(run_dir / f"pid-{rank}").write_text(str(os.getpid()))
for step in (1, 2, 3):
    values = {"loss": 1.5, "lr": 1e-4, "tokens_per_s": 100.0, "memory_bytes": 2**20}
    append("metrics.jsonl", event="step", step=step, total_steps=9, **values)
if mode == "finish":
    append("events.jsonl", event="done")
    sys.exit(0)
if mode == "stubborn":  # does not end when asked, and has a child in a session of its own
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    (run_dir / f"pid-child-{rank}").write_text(str(child.pid))
(run_dir / f"ready-{rank}").touch()
while not (run_dir / "ready-0").exists() or not (run_dir / "ready-1").exists():
    time.sleep(0.01)
if mode == "raise" and rank == 1:
    record("ValueError", "boom", traceback="Traceback ...\nValueError: boom")
    sys.exit(1)
if mode == "own-error" and rank == 1:
    record("TrainingError", "the loss is nan at step 3", exit_code=1)
    sys.exit(1)
if mode == "cut" and rank == 1:  # the file of the weights is cut while it is mapped
    with (run_dir / "base" / "base.safetensors").open("r+b") as file:
        mapping = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        file.truncate(100)
    bytes(mapping[-1:])
if mode == "kill" and rank == 1:
    while waits_for_peer and not (run_dir / "logs" / "rank-0.error.json").exists():
        time.sleep(0.01)  # the test looks for the peer's record, which torchrun may come before
    os.kill(os.getpid(), signal.SIGKILL)
if mode in ("kill", "cut"):  # what a peer of a killed rank does
    time.sleep(0.05)
    record("RuntimeError", "Connection closed by peer [127.0.0.1]:4711", traceback="Traceback")
    sys.exit(1)
time.sleep(600)
