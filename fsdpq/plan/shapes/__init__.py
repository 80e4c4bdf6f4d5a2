"""Model shapes: from cards, from directories on this machine. No weight is read.

- ``find``: whatever a recipe's ``model.name_or_path`` is
- ``from_card``: from the table of well-known models
- ``from_directory``: from a directory; `fsdpq.fetch.hub_shape` does so from the hub
- ``from_files``: from a config and the headers of weight files
- ``from_tensors``: the groups of any family, by the names and shapes of its tensors
- ``experts``: experts put together as transformers keeps them
- ``layer_facts``: what a decoder layer's tensors say of how it computes
- ``config_facts``: sizes in the words of any config.json
- ``names``: what the families with cards call their weights
"""

from fsdpq.plan.shapes.find import find_shape
from fsdpq.plan.shapes.from_card import shape_from_card
from fsdpq.plan.shapes.from_directory import shape_from_directory

__all__ = ["find_shape", "shape_from_card", "shape_from_directory"]
