"""What another recipe would take: changes that fit, how far it can go, what hides transfers.

moves.py     single changes, by dimension, the mildest first
settings.py  applies changes to a recipe, and says which rules they break
edits.py     the smallest changes that make a recipe fit
savings.py   the changes that free most, for a run that is out of memory
limits.py    the longest rows, largest batch and rank that fit
variants.py  strategies, offload and checkpointing beside each other
hiding.py    the batch and chunks behind which a transfer hides
"""
