"""What a plan is for: a machine, and the GPUs that people name."""
