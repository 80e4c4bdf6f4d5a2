"""The trained weights of a checkpoint, without all that training needs beside them."""

from __future__ import annotations

from pathlib import Path

import torch

from fsdpq import dist
from fsdpq.checkpoint.sharded import load_pieces
from fsdpq.checkpoint.storage import CheckpointReader
from fsdpq.errors import CheckpointError
from fsdpq.protocols import Piece, own_piece
from fsdpq.tensor_files.checkpoint_manifest import read_checkpoint
from fsdpq.worker.assemble import Assembled
from fsdpq.worker.keeping.run_state import INITIAL, WEIGHTS


def load_saved_weights(assembled: Assembled, directory: Path) -> None:
    """Fills what is trained from a checkpoint that any number of ranks saved, in place.

    Ranks: all (collective).

    Args:
        assembled: what is trained at its initial values.
        directory: of the checkpoint; its bytes were checked by who chose it.

    Raises:
        CheckpointError: it does not fit the model, or a file is damaged.
    """
    reader = CheckpointReader(directory, read_checkpoint(directory))
    pieces = {f"{WEIGHTS}/{n}": own_piece(p) for n, p in assembled.named_trainable.items()}
    saved = {name for name in reader.names if name.startswith(f"{WEIGHTS}/")}
    if differing := sorted(saved ^ pieces.keys()):
        name = differing[0].removeprefix(f"{WEIGHTS}/")
        raise CheckpointError(
            f"{directory} does not fit the model: one of them has no `{name}`",
            hint="the run's `recipe.resolved.yaml` and its checkpoints belong together",
        )
    first: dict[str, Piece] = {}
    for name, layer in assembled.adapted_layers.items():
        for key, rows in layer.initial.items():
            like = own_piece(getattr(layer, key))
            empty = Piece(torch.zeros_like(rows), like.shape, like.start)
            first[f"{INITIAL}/{name}/{key}"] = empty
    load_pieces(reader, pieces | first, dist.new_host_group())
    for name, layer in assembled.adapted_layers.items():
        if layer.initial:
            rows = {key: first[f"{INITIAL}/{name}/{key}"].rows for key in layer.initial}
            layer.restore_initial(rows)
