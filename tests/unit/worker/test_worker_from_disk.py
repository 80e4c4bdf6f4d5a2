"""What a run from disk tells the user beforehand."""

from __future__ import annotations

from typing import Any

from fsdpq.worker.from_disk import describe_reading

CASE: dict[str, Any] = {
    "free_bytes": 24 * 10**9, "bytes_per_s": 1.5e9, "num_micro_batches": 2, "num_passes": 2,
}  # fmt: skip


def test_base_larger_than_memory_comes_with_the_arithmetic_of_a_step() -> None:
    # 12 GB are missing, four times a step: 48 GB at 1.5 GB/s.
    assert describe_reading(36 * 10**9, **CASE) == (
        "the base (36.0 GB) is larger than the memory that is free (24.0 GB): about 12.0 GB of it "
        "are read from the disk 4 times a step, 48.0 GB; at the 1.50 GB/s of the check at the "
        "start that is 32 s a step, less what computing hides; a larger "
        "`training.micro_batch_size` with `training.layer_chunks` reads less often"
    )


def test_passes_in_one_direction_read_all_of_it() -> None:
    told = describe_reading(36 * 10**9, **{**CASE, "num_passes": 1})
    assert "about 36.0 GB of it are read from the disk 2 times a step, 72.0 GB" in told


def test_base_that_fits_needs_no_word() -> None:
    assert describe_reading(24 * 10**9, **CASE) == ""


def test_rate_that_was_not_seen_is_not_made_up() -> None:
    told = describe_reading(36 * 10**9, **{**CASE, "bytes_per_s": 0.0})
    assert told.endswith("48.0 GB; how long that takes is not known, as its pages were in memory "
                         "at the start")  # fmt: skip
