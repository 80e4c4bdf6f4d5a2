"""Dealing rows to steps and ranks: order, batches, reading ahead, streams."""
