"""As `fsdpq.worker.bench.resident`, for tests that were written before it moved there."""

from fsdpq.worker.bench.resident import Resident, Use

__all__ = ["Resident", "Use"]
