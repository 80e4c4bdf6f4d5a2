"""Files of rows: which there are, and reading each sort of them. Torch-free.

A bad row is yielded with what is wrong with it instead of raised, so that all of them are reported
at once. Memory holds a line, an item of a JSON list, a batch of an Arrow file, or a row group of a
parquet file; a row of more than 64 MiB is a mistake.
"""
