"""Configs of other tools, turned into recipes, with an account of every key. Torch-free.

`fsdpq.importing.convert` is the way in. Each tool has a module with a table: key of the tool ->
what becomes of it. Nothing that a config names is ever imported, fetched or run.
"""
