"""What a run leaves behind for others to load."""
