"""The run directory, where the two halves meet: paths, rows, signs of life, and their writing."""
