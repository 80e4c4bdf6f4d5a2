"""Runs on several machines: one launcher each, which agree over a connection of their own."""
