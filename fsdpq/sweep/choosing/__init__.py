"""Which trials a sweep has: what is asked, the grammar, the space, what fits."""
