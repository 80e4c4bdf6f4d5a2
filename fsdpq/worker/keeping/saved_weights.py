"""The trained weights of a checkpoint, without all that training needs beside them."""

from __future__ import annotations

from pathlib import Path

from fsdpq import dist
from fsdpq.checkpoint.storage import CheckpointReader
from fsdpq.errors import CheckpointError
from fsdpq.tensor_files.checkpoint_manifest import read_checkpoint
from fsdpq.worker.assemble import Assembled
from fsdpq.worker.keeping.run_state import WEIGHTS, restore_weights


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
    wanted = {f"{WEIGHTS}/{name}" for name in assembled.named_trainable}
    saved = {name for name in reader.names if name.startswith(f"{WEIGHTS}/")}
    if differing := sorted(saved ^ wanted):
        name = differing[0].removeprefix(f"{WEIGHTS}/")
        raise CheckpointError(
            f"{directory} does not fit the model: one of them has no `{name}`",
            hint="the run's `recipe.resolved.yaml` and its checkpoints belong together",
        )
    restore_weights(assembled, reader, dist.new_host_group())
