"""Measures fsdpq on one GPU: ``python -m scripts.gpu --out DIRECTORY``.

One command does everything in a few minutes, in processes with time limits of their own, so that a
part that fails or hangs loses nothing but itself. Every number is a row of ``rows.jsonl``, written
as soon as it is known; the table of all rows is printed last.

- ``scripts.gpu.plan``: the parts, which of them run at the same time, and their limits.
- ``scripts.gpu.part``: the process of one part.
- ``scripts.gpu.parts``: what the parts do.
- ``scripts/gpu/torch_2_11``: stand-ins for a machine that has nothing newer than torch 2.11.

``--plan smoke --device cpu`` runs the same code with tiny shapes on a CPU.
"""
