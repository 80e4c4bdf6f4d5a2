"""The recipe: reading YAML with positions, overrides, validation, and the checked document.

Torch-free. `fsdpq.recipe.load.load_recipe` is the way in for both halves; the sections are pydantic
models, one file per group of sections, and `fsdpq.recipe.root.Recipe` holds them together.
"""
