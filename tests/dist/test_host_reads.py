"""Nothing waits for the device between two log lines: counted in the operators of real steps."""

from __future__ import annotations

import bisect
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from support.ranks import RankPool
from support.sharded import CPU, assemble
from support.tiny import random_rows, save_tiny_llama, tiny_recipe
from torch import Tensor

from fsdpq.data.dealing.collate import Step, build_step
from fsdpq.training.loop import Trainer
from fsdpq.training.scaler import LossScaler
from fsdpq.worker.bench.allocations import Allocations

READS = {"aten::_local_scalar_dense", "aten::nonzero", "aten::masked_select", "aten::equal"}
"""Operators whose result the host needs: on a GPU it waits for them."""

NUM_STEPS, LOG_INTERVAL, MICRO_BATCHES, CLIPPING = 6, 3, 2, 1


class Marks:
    """Takes metrics rows; marks in the record of operators where each log line ends."""

    def __init__(self, record: Allocations) -> None:
        self.record = record

    def write(self, row: Any) -> None:
        """Marks the end of a log line."""
        assert row["event"] == "step"
        self.record.end_phase("log")

    def steps(self) -> Iterator[Step]:
        """Yields steps, and marks where each begins."""
        step = build_step(random_rows(8), micro_batch_size=4, rank=0, world_size=1)
        while True:
            self.record.end_phase("step")
            yield step


def reads_by_step(directory: Path, fp16: bool, masks: bool) -> list[int]:
    """Trains; returns how often each step, with the log line behind it, reads from the device."""
    dtype = {"model": {"dtype": "fp16"}} if fp16 else {}
    assembled = assemble(directory, **dtype)
    # The fused AdamW of CPUs reads its count of steps, which is on the host; that of GPUs does not.
    optimizer = torch.optim.SGD(assembled.trainable, lr=1e-3, foreach=True)
    # transformers looks once a forward pass whether position ids say that rows are packed.
    looks = mock.patch("transformers.masking_utils.find_packed_sequence_indices", _look)
    with Allocations() as record, looks if not masks else mock.patch.dict({}):
        marks = Marks(record)
        Trainer(
            model=assembled.model,
            parameters=assembled.trainable,
            optimizer=optimizer,
            schedule=lambda _step: 1.0,
            options=tiny_recipe().training,
            total_steps=NUM_STEPS,
            log_interval=LOG_INTERVAL,
            metrics=marks,
            evaluate=None,
            device=CPU,
            scaler=LossScaler() if fp16 else None,
        ).run(marks.steps())
    begins = [time for name, time in record.phases if name == "step"]
    counts = [0] * len(begins)
    for name, time in record.operators:
        if name in READS and time > begins[0]:
            counts[bisect.bisect(begins, time) - 1] += 1
    assert [name for name, _ in record.phases].count("log") == NUM_STEPS / LOG_INTERVAL
    return counts


def _look(_position_ids: Tensor) -> None:
    return None


@pytest.mark.parametrize("fp16", [False, True])
def test_only_log_lines_read_from_the_device(ranks: RankPool, tmp_path: Path, fp16: bool) -> None:
    directory = save_tiny_llama(tmp_path)
    counts = ranks.run(1, reads_by_step, directory, fp16, False)[0]
    logged = [index for index in range(NUM_STEPS) if (index + 1) % LOG_INTERVAL == 0]
    assert all(counts[index] > 0 for index in logged), "the count is blind"
    # A scaled loss asks once a step whether the gradients overflowed. Clipping reads a norm only
    # where it is on the host.
    others = [count for index, count in enumerate(counts) if index not in logged]
    assert others == [CLIPPING + int(fp16)] * len(others)


def test_all_other_reads_are_transformers_looking_for_packed_rows(
    ranks: RankPool, tmp_path: Path
) -> None:
    directory = save_tiny_llama(tmp_path)
    counts = ranks.run(1, reads_by_step, directory, False, True)[0]
    assert counts[0] == counts[1] == MICRO_BATCHES + CLIPPING
