"""Quantizers: each packs frozen matrices into sharded bytes and back, as its library does."""
