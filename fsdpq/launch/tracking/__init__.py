"""Sending what a run measures to Weights & Biases, from a process of its own."""
