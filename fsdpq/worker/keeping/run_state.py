"""All that a run is between two steps, taken apart for a checkpoint and put together from one.

Trained weights, optimizer, loss scale, generators, place in the data, the loop's own numbers, and
the first values of adapters that changed the base. Of the frozen base nothing: it is loaded again.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from fsdpq.checkpoint.sharded import load_pieces
from fsdpq.checkpoint.storage import CheckpointReader
from fsdpq.data.dealing.loader import Loader
from fsdpq.dist import own_shard
from fsdpq.errors import CheckpointError
from fsdpq.optimizer.saved_state import OptimizerState
from fsdpq.protocols import Piece, own_piece
from fsdpq.training.loop import LoopState, Trainer
from fsdpq.training.saved_loop import loop_facts, restore_loop, window_pieces
from fsdpq.worker.assemble import Assembled
from fsdpq.worker.keeping.random_state import random_pieces, restore_random

WEIGHTS = "weights"
INITIAL = "initial"

SavedFacts = Mapping[str, Any]
"""``state.json``: all of a checkpoint that is no tensor."""


@dataclass(frozen=True)
class RunState:
    """What a checkpoint is taken of.

    Attributes:
        assembled: the model.
        trainer: with optimizer and scaler.
        loader: of the training rows.
        seed: ``training.seed``.
    """

    assembled: Assembled
    trainer: Trainer
    loader: Loader
    seed: int

    def pieces(self, state: LoopState) -> dict[str, Piece]:
        """Returns this rank's part of every tensor, not copied."""
        named = self.assembled.named_trainable
        return {
            **{f"{WEIGHTS}/{name}": own_piece(parameter) for name, parameter in named.items()},
            **self._optimizer().pieces(),
            **initial_pieces(self.assembled),
            **window_pieces(state.window),
            **random_pieces(self.trainer.device),
        }

    def facts(self, state: LoopState) -> dict[str, Any]:
        """Returns all else, as plain JSON data."""
        scaler = self.trainer.scaler
        return {
            "loop": loop_facts(state),
            "loader": self.loader.state_dict(),
            "optimizer": self._optimizer().facts(),
            "scaler": None
            if scaler is None
            else {
                "scale": scaler.scale,
                "num_good": scaler.num_good,
                "num_skipped": scaler.num_skipped,
            },
            "has_cuda": self.trainer.device.type == "cuda",
        }

    def restore(
        self,
        reader: CheckpointReader,
        facts: SavedFacts,
        group: dist.ProcessGroup,
        *,
        world_size: int,
        with_optimizer: bool,
        other_rows: bool = False,
    ) -> LoopState:
        """Puts a checkpoint's state into model, optimizer, scaler, loader and generators.

        Ranks: all (collective).

        Args:
            reader: of the checkpoint.
            facts: of the checkpoint.
            group: all ranks, over gloo.
            world_size: ranks that saved it.
            with_optimizer: False starts with a new optimizer.
            other_rows: start at the first row, the place in the data means nothing in these rows.

        Raises:
            CheckpointError: it does not fit the model or the data.
        """

        def read(names: Sequence[str]) -> dict[str, Tensor]:
            pieces = {name: reader.empty_piece(name) for name in names}
            load_pieces(reader, pieces, group)
            return {name: piece.rows for name, piece in pieces.items()}

        if not other_rows:
            self.loader.load_state_dict(facts["loader"])
        self._restore_tensors(reader, facts, group, with_optimizer=with_optimizer)
        self._restore_scaler(facts)
        step = facts["loop"]["progress"]["steps"]
        device = self.trainer.device
        state = restore_loop(
            facts["loop"],
            read,
            saved_world_size=world_size,
            device=device,
            norm_device=own_shard(self.trainer.parameters[0]).rows.device,
        )
        restore_random(
            read, saved_world_size=world_size, has_cuda=facts["has_cuda"], device=device,
            seed=self.seed, step=step,
        )  # fmt: skip
        return state

    def _restore_tensors(
        self,
        reader: CheckpointReader,
        facts: SavedFacts,
        group: dist.ProcessGroup,
        *,
        with_optimizer: bool,
    ) -> None:
        optimizer = self._optimizer()
        beside = optimizer.prepare(facts["optimizer"]) if with_optimizer else {}
        restore_weights(self.assembled, reader, group, beside=beside)
        if with_optimizer:
            optimizer.finish()

    def _restore_scaler(self, facts: SavedFacts) -> None:
        scaler = self.trainer.scaler
        if scaler is not None and facts["scaler"] is not None:
            for name, value in facts["scaler"].items():
                setattr(scaler, name, value)

    def _optimizer(self) -> OptimizerState:
        return OptimizerState(self.trainer.optimizer, self.assembled.named_trainable)


def initial_pieces(assembled: Assembled) -> dict[str, Piece]:
    """Returns the first values of adapters that took them from the base, dealt as Parameters."""
    found: dict[str, Piece] = {}
    for name, layer in assembled.adapted_layers.items():
        for key, rows in layer.initial.items():
            parameter: Tensor = getattr(layer, key)
            like = own_piece(parameter)
            found[f"{INITIAL}/{name}/{key}"] = Piece(rows, like.shape, like.start)
    return found


def restore_weights(
    assembled: Assembled,
    reader: CheckpointReader,
    group: dist.ProcessGroup,
    *,
    beside: Mapping[str, Piece] = MappingProxyType({}),
) -> None:
    """Puts the trained weights of a checkpoint into the model, on any number of ranks.

    Ranks: all (collective).

    Args:
        assembled: the model.
        reader: of the checkpoint.
        group: all ranks, over gloo.
        beside: other pieces to be filled.

    Raises:
        CheckpointError: it does not fit the model.
    """
    named = assembled.named_trainable
    pieces = {f"{WEIGHTS}/{name}": own_piece(parameter) for name, parameter in named.items()}
    saved = {name for name in reader.names if name.startswith(f"{WEIGHTS}/")}
    if missing := sorted(saved - pieces.keys()):
        name = missing[0].removeprefix(f"{WEIGHTS}/")
        raise CheckpointError(
            f"the checkpoint has `{name}`, which this run does not train",
            hint="go on with the recipe that it was saved with",
        )
    first = {
        name: Piece(torch.zeros_like(piece.rows), piece.shape, piece.start)
        for name, piece in initial_pieces(assembled).items()
    }
    load_pieces(reader, pieces | first | dict(beside), group)
    for name, layer in assembled.adapted_layers.items():
        if layer.initial:
            layer.restore_initial(
                {key: first[f"{INITIAL}/{name}/{key}"].rows for key in layer.initial}
            )


def copy_to_host(pieces: Mapping[str, Piece]) -> dict[str, Piece]:
    """Returns copies that training does not change any more; waits for the device."""
    return {
        name: Piece(piece.rows.detach().to("cpu", copy=True), piece.shape, piece.start)
        for name, piece in pieces.items()
    }
