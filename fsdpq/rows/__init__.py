"""The rows of a dataset as they stand in its files: reading, formats, mistakes; torch-free.

Both halves read through this room: the launcher checks every row before any rank starts, the worker
reads the same rows again to render and tokenize them.
"""
