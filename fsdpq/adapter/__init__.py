"""Adapters: what is trained beside (or instead of) the frozen base."""
