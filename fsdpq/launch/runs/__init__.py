"""Run directories: made, owned, found again, compared with what they were made of."""
