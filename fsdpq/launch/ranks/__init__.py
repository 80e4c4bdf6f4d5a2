"""Processes of ours: ranks under torchrun, single workers, and why they ended."""
