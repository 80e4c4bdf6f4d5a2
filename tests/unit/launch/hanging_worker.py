"""A rank without torch that beats like the real one, and hangs as ``FAKE_MODE`` says on rank 1."""

import os
import signal
import sys
import time
from pathlib import Path

from fsdpq.run_files.paths import RunFiles
from fsdpq.worker.keeping.heartbeat import Heartbeat
from fsdpq.worker.keeping.signals import note_signals, received_signal, tell_stack_on_request

files, rank, mode = RunFiles(Path(sys.argv[1])), int(os.environ["RANK"]), os.environ["FAKE_MODE"]


def spin() -> None:
    while True:
        pass


note_signals()
tell_stack_on_request(files.rank_stack(rank))
heartbeat = Heartbeat(files.heartbeat(rank))
heartbeat.enter("train")
for step in range(1, 10**6):
    heartbeat.beat("forward", step)
    time.sleep(0.05)
    heartbeat.beat("backward")
    if rank == 1 and step == 3:
        if mode == "stopped":
            os.kill(os.getpid(), signal.SIGSTOP)
        if mode == "spin":
            spin()
    if rank == 0 and step == 3 and mode != "signals":  # one sign further than the one that hangs
        heartbeat.beat("optimizer")
        time.sleep(600)
    if mode == "signals" and received_signal():
        (files.root / f"signal-{rank}").write_text(received_signal())
        break
