"""The training loop: one optimizer step, the loop around it, evaluation and samples."""
