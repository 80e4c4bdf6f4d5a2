"""Drawing a run: what is trained, how it goes, what came of it. All on stderr."""
