"""Variants of a recipe: which there are (`grid`), running them, what came of them."""
