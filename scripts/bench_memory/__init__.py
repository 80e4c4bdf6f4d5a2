"""Measures the memory of training, phase by phase: ``make bench-memory``; see `__main__`."""
