"""What a checkpoint costs: bytes, the pause of training, writing, checking and loading.

    python scripts/bench_checkpoint.py --weights 20000000

One process; trained weights and the two means of AdamW for each, in fp32, as 64 matrices each. The
pause of training is the copy to the host; writing goes on beside it. CPU seconds stand beside those
of the clock: other processes do not change them much.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

from fsdpq.checkpoint.sharded import load_pieces, save_pieces
from fsdpq.checkpoint.storage import CheckpointReader, CheckpointWriter
from fsdpq.dist import new_host_group, start_process_group
from fsdpq.protocols import Piece
from fsdpq.tensor_files.checkpoint_manifest import (
    SavedCheckpoint,
    SavedFile,
    check_checkpoint,
    step_directory,
)
from fsdpq.worker.keeping.run_state import copy_to_host

MATRICES = 64
KINDS = ("weights", "exp_avg", "exp_avg_sq")


def make_pieces(num_weights: int) -> dict[str, Piece]:
    """Returns weights and AdamW's states, random."""
    shape = (64, num_weights // MATRICES // 64)
    return {
        f"{kind}/{index}": Piece(torch.randn(shape), shape)
        for kind in KINDS
        for index in range(MATRICES)
    }


def describe(files: dict[str, SavedFile]) -> SavedCheckpoint:
    """Returns a manifest."""
    return SavedCheckpoint(1, 1, 1, None, time.time(), {}, "", {}, files)


def timed(action: Callable[[], object]) -> tuple[float, float]:
    """Returns the seconds of the clock and of the CPU that ``action`` takes."""
    started, cpu = time.perf_counter(), time.process_time()
    action()
    return time.perf_counter() - started, time.process_time() - cpu


def main() -> None:
    """Measures and prints a table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--weights", type=int, default=20_000_000)
    num_weights: int = parser.parse_args().weights
    start_process_group("cpu")
    group, pieces = new_host_group(), make_pieces(num_weights)
    copies: dict[str, Piece] = {}
    with tempfile.TemporaryDirectory() as folder:
        directory = step_directory(Path(folder), 1)
        writer = CheckpointWriter(directory, b"{}", describe)
        seconds = {
            "copy to the host": timed(lambda: copies.update(copy_to_host(pieces))),
            "write, hash, sync": timed(lambda: save_pieces(writer, copies, group)),
            "check every byte": timed(lambda: check_checkpoint(directory)),
        }
        saved = check_checkpoint(directory)
        reader = CheckpointReader(directory, saved)
        seconds["load"] = timed(lambda: load_pieces(reader, pieces, group))
    size = saved.num_bytes
    sys.stdout.write(f"{size / 1e6:.1f} MB, {size / num_weights:.2f} bytes a trained weight\n")
    for what, (clock, cpu) in seconds.items():
        sys.stdout.write(f"{what:18} {clock:6.2f} s, of a CPU {cpu:5.2f} s\n")


if __name__ == "__main__":
    main()
