"""The worker half's entry: what every rank runs, started as ``python -m fsdpq.worker``."""
