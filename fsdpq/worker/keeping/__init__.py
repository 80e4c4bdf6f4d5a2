"""What keeps a run: checkpoints, ends that were asked for, hangs, and what memory ran out for."""
