"""Verbs about runs that are there: list, follow, ask, end, report."""
