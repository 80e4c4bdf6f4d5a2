"""Recomputation, chunks of a micro-batch: memory of one chunk, not of all."""

from __future__ import annotations

from pathlib import Path

from fsdpq.worker.bench.allocations import Allocations

from fsdpq.data.dealing.collate import build_step
from support.ranks import RankPool
from support.sharded import assemble
from support.tiny import random_rows, save_tiny_llama


def peak_of_a_pass(directory: Path, checkpointing: str, layer_chunks: int) -> int:
    """Returns the largest sum of bytes that torch's host allocator hands out in a pass."""
    assembled = assemble(
        directory,
        fsdp={"activation_checkpointing": checkpointing},
        training={"layer_chunks": layer_chunks},
    )
    rows = random_rows(8, shortest=96, longest=96)
    [batch] = build_step(rows, micro_batch_size=8, rank=0, world_size=1).micro_batches
    with Allocations() as allocations:
        loss = assembled.model(batch.input_ids, batch.loss_positions, batch.targets)
        loss.backward()
    return allocations.peak_bytes


def test_peak_falls_with_recomputation_and_with_chunks(ranks: RankPool, tmp_path: Path) -> None:
    # A wide layer, so that its activations outweigh hidden states and logits.
    directory = save_tiny_llama(tmp_path / "wide", num_hidden_layers=6, intermediate_size=1280)
    settings = [("none", 1), ("selective", 1), ("full", 1), ("full", 8)]
    peaks = [ranks.run(1, peak_of_a_pass, directory, *setting)[0] for setting in settings]
    keep_all, keep_half, keep_inputs, one_chunk = peaks
    # Half of the layers keep everything, and one more is computed again.
    assert keep_half < 0.75 * keep_all
    assert keep_inputs < 0.5 * keep_all
    # What does not shrink with chunks: inputs of all layers, logits, and weights of one layer.
    assert one_chunk < 0.6 * keep_inputs
