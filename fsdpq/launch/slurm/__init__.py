"""Submitting a run to Slurm as a job, and asking what became of it."""
