"""Model shapes: from cards, from directories on this machine. No weight is read.

from_card.py       from the table of well-known models
from_directory.py  from config.json and the headers of safetensors files
find.py            whichever of both a recipe's ``model.name_or_path`` is
names.py           what architectures call their weights
"""

from fsdpq.plan.shapes.find import find_shape
from fsdpq.plan.shapes.from_card import shape_from_card
from fsdpq.plan.shapes.from_directory import shape_from_directory

__all__ = ["find_shape", "shape_from_card", "shape_from_directory"]
