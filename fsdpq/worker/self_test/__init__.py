"""Checks on the user's own device that shards, bytes, gradients and collectives are right."""
