"""Tokenizing all rows once, in several processes, into files that the ranks map."""
