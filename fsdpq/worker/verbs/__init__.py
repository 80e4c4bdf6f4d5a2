"""The verbs of ``python -m fsdpq.worker``: their arguments and, once called, what they import.

A module is a group of verbs. Its ``add_*`` names them and their arguments without importing
anything heavy; the functions below run on a rank, under the guard (`fsdpq.worker.guard`).
"""
