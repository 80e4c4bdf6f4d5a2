"""Reports made of the files in run directories; torch-free, for both halves."""
