"""Ranks, rows and tokens of a step, as a recipe asks for them."""

from __future__ import annotations

from dataclasses import dataclass

from fsdpq.recipe.root import Recipe


@dataclass(frozen=True)
class Workload:
    """What one optimizer step is, at its largest: every row as long as ``data.seq_len``.

    Attributes:
        num_ranks: of the run, over all machines.
        num_local_ranks: of one machine.
        rows: of a micro-batch of one rank.
        seq_len: tokens of a row.
        micro_batches: of one rank in a step.
        global_rows: of a step, over all ranks.
        layer_chunks: parts of a micro-batch that a decoder layer runs over, at most ``rows``.
    """

    num_ranks: int
    num_local_ranks: int
    rows: int
    seq_len: int
    micro_batches: int
    global_rows: int
    layer_chunks: int = 1

    @property
    def tokens(self) -> int:
        """Tokens of a micro-batch."""
        return self.rows * self.seq_len

    @property
    def chunk_rows(self) -> int:
        """Rows of the largest chunk that a decoder layer runs over."""
        return -(-self.rows // self.layer_chunks)

    @property
    def chunk_tokens(self) -> int:
        """Tokens of the largest chunk that a decoder layer runs over."""
        return self.chunk_rows * self.seq_len

    @property
    def step_tokens(self) -> int:
        """Tokens of a step, over all ranks."""
        return self.global_rows * self.seq_len


def workload_of(recipe: Recipe) -> Workload:
    """Returns the workload of a resolved recipe (`fsdpq.launch.machine.resolve`).

    A rank whose rows of a step are fewer than ``training.micro_batch_size`` has them in one
    micro-batch.
    """
    launch, training = recipe.launch, recipe.training
    local_ranks = int(launch.nproc_per_node)
    num_ranks = local_ranks * launch.max_nodes
    global_rows = training.global_batch_size or training.micro_batch_size * num_ranks
    own_rows = max(1, -(-global_rows // num_ranks))
    rows = min(training.micro_batch_size, own_rows)
    return Workload(
        num_ranks=num_ranks,
        num_local_ranks=local_ranks,
        rows=rows,
        seq_len=recipe.data.seq_len,
        micro_batches=-(-own_rows // rows),
        global_rows=global_rows,
        layer_chunks=min(training.layer_chunks, rows),
    )
