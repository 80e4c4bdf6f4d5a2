"""Shapes of well-known models, known without their files: offline checks, lists and plans.

`card` says what a card is, `families` what an architecture's weights are, the modules named after
model families hold the published numbers, `find` looks a model up. Torch-free.
"""
