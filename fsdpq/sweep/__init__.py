"""Variants of a recipe: which there are, running them, what came of them."""
