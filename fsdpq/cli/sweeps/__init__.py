"""``fsdpq sweep``: its options, its screen, its end."""
