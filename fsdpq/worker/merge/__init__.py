"""Merging what a run trained into its base, a few rows at a time, with a receipt."""
