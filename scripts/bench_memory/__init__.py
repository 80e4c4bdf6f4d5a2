"""Modules that moved into `fsdpq.worker.bench`."""
