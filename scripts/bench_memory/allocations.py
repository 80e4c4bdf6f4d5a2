"""As `fsdpq.worker.bench.allocations`, for tests that were written before it moved there."""

from fsdpq.worker.bench.allocations import Allocation, Allocations, Fit, fit_line

__all__ = ["Allocation", "Allocations", "Fit", "fit_line"]
