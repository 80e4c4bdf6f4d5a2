"""``fsdpq plan --trace``: a worker without GPU and weights says what the plan says."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.tiny import save_tiny_llama, tiny_recipe

from fsdpq.launch.plan_runs import trace_recipe
from fsdpq.plan.device import plan_device_memory
from fsdpq.plan.shapes.from_directory import shape_from_directory
from fsdpq.plan.weights import plan_weights


def test_worker_traces_a_shape_without_files_for_ranks_that_are_not_there(tmp_path: Path) -> None:
    directory = save_tiny_llama(tmp_path / "model", num_hidden_layers=2, vocab_size=2048)
    shape = shape_from_directory(directory)
    recipe = tiny_recipe(
        model={"dtype": "bf16"},
        launch={"device": "cuda", "nproc_per_node": 64},
        training={"micro_batch_size": 2, "global_batch_size": 128},
        data={"seq_len": 256},
    )
    traced = trace_recipe(recipe, shape)
    plan = plan_device_memory(recipe, shape, plan_weights(recipe, shape))
    for phase in ("forward", "backward", "optimizer"):
        moment, ours = traced.device.phase_peak(phase), plan.phase_peak(phase)
        assert moment is not None
        assert ours is not None
        own = ours.allocated - ours.parts.get("workspace", 0)
        # 256 KiB: hundreds of small tensors, each rounded to 512 bytes.
        assert own == pytest.approx(moment.total, rel=0.05, abs=1 << 18), phase
