"""Running the trials of a sweep: here, at once, again, as an array, by a search."""
