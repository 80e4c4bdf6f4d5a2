"""Kills runs at random moments, lets them go on, and compares what comes out: ``make chaos``."""
