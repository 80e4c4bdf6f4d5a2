"""Fills a sharded model on meta with a base: from a checkpoint, row slice by row slice."""
