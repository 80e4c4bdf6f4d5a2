"""What each choice of a recipe costs: arithmetic on its options. No torch.

The worker half builds its tensors by the same functions, so a plan and a run cannot differ.
"""
