"""A rank that runs out of device memory in every phase of a step: what it says.

The device is the host here, and its statistics are made up; what the run holds is real.
"""

from __future__ import annotations

import dataclasses
import itertools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from support.ranks import RankPool
from support.sharded import CPU, assemble
from support.tiny import random_rows, save_tiny_llama, tiny_recipe
from torch.distributed.tensor import DTensor

from fsdpq.data.dealing.collate import build_step
from fsdpq.dist import rank, world_size
from fsdpq.errors import PlanError
from fsdpq.metrics.sinks import NoSink
from fsdpq.run_files.amounts import format_bytes
from fsdpq.run_files.paths import RunFiles
from fsdpq.worker.keeping.heartbeat import Heartbeat
from fsdpq.worker.keeping.post_mortem import DeviceMemory, PostMortem
from fsdpq.worker.setup import Data, build_trainer

MEMORY = DeviceMemory("a made-up GPU", 24 * 2**30, 2**28, 20 * 2**30, 23 * 2**30)
TEXT = "CUDA out of memory. Tried to allocate 1.50 GiB. GPU 0 has a total capacity of 24 GiB"
FSDP = {"strategy": "shard_grad_op", "activation_checkpointing": "none"}


@dataclass(frozen=True)
class Told:
    """What a rank said, and what it held."""

    message: str
    hint: str
    lines: dict[str, str]
    exit_code: int
    held: dict[str, int]


def fail_in(directory: Path, part: str) -> Told:
    """Trains until memory runs out in ``part`` of step 2; returns the error and what was held."""
    sections: dict[str, Any] = {"fsdp": FSDP}
    recipe, assembled = tiny_recipe(**sections), assemble(directory, **sections)
    heart, files, sink = Heartbeat(directory / f"beat-{rank()}"), RunFiles(directory), NoSink()
    rows = random_rows(8)
    trainer = build_trainer(
        recipe, assembled, Data([], rows[:4]), sink, sink, files=files, device=CPU
    )
    trainer = dataclasses.replace(trainer, on_part=heart.beat)
    post_mortem = PostMortem(files, heart, read=lambda _: MEMORY)
    post_mortem.learn(recipe, assembled, trainer, directory)
    frozen = [p for p in assembled.model.parameters() if not p.requires_grad]
    held = {
        "frozen": sum(map(_local_bytes, frozen)),
        "trained": sum(map(_local_bytes, trainer.parameters)),
    }
    heart.enter("eval" if part == "evaluate" else "train")

    def fail(*_: Any) -> None:
        if heart.part == part and (heart.step == 2 or part == "evaluate"):
            raise torch.OutOfMemoryError(TEXT)

    if part == "backward":
        assembled.model.decoder_layers[1].register_full_backward_pre_hook(fail)
    elif part == "optimizer":
        trainer.optimizer.register_step_pre_hook(fail)
    else:
        assembled.model.decoder_layers[1].self_attn.register_forward_pre_hook(fail)
    own = build_step(rows, micro_batch_size=2, rank=rank(), world_size=world_size())

    def run() -> None:
        if part == "evaluate":
            trainer.log_evaluation(0)
        trainer.run(itertools.repeat(own))

    with pytest.raises(PlanError) as caught, post_mortem.explained():
        run()
    error, states = caught.value, trainer.optimizer.state.values()
    held["optimizer"] = sum(_local_bytes(each) for state in states for each in state.values())
    table = [line.rsplit("  ", 1) for line in error.details.splitlines() if line.startswith("  ")]
    lines = {name.strip(): value for name, value in table}
    return Told(error.message, error.hint, lines, error.exit_code, held)


def fail_in_each(directory: Path, parts: list[str]) -> dict[str, Told]:
    return {part: fail_in(directory, part) for part in parts}


def _local_bytes(tensor: torch.Tensor) -> int:
    return (tensor.to_local() if isinstance(tensor, DTensor) else tensor).nbytes


PLACES = {
    "forward": "in the forward pass of step 2, layer 1",
    "backward": "in the backward pass of step 2",
    "optimizer": "in the optimizer's step of step 2",
    "evaluate": "in the evaluation, layer 1",
}


@pytest.fixture(scope="module")
def told(ranks: RankPool, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Told]]:
    # Of three layers two are gathered under either strategy: the one in use, and the next one.
    directory = save_tiny_llama(tmp_path_factory.mktemp("model"), num_hidden_layers=6)
    return ranks.run(2, fail_in_each, directory, list(PLACES))


@pytest.mark.parametrize("part", PLACES)
def test_a_post_mortem_says_where_what_and_what_helps(
    told: list[dict[str, Told]], part: str
) -> None:
    for number, each in enumerate(told):
        said = each[part]
        assert said.message == (
            f"rank {number} ran out of GPU memory {PLACES[part]}: it asked for 1.50 GiB more"
        )
        assert said.exit_code == 3
        # 3 GiB are reserved and unused, more than was asked for: that is tried first.
        assert "expandable_segments:True`: about 3.00 GiB less" in said.hint
        for name, kind in (
            ("frozen base", "frozen"), ("trained weights", "trained"), ("optimizer", "optimizer"),
        ):  # fmt: skip
            assert said.lines[name] == format_bytes(said.held[kind])
        assert said.lines["free"] == "256.00 MiB"
        assert said.lines["other processes, and CUDA itself"] == "768.00 MiB"
        is_in_layers = part in ("forward", "evaluate")
        gathered = said.lines["gathered weights of the layers in use"]
        assert (gathered != "0 B") == (is_in_layers or part == "backward")
        helps = set(said.lines) & set(EDITS)
        assert helps == {edit for edit, parts in EDITS.items() if part in parts}


EDITS = {
    "fsdp.activation_checkpointing=full": ("forward", "backward"),
    "training.micro_batch_size=1": ("forward", "backward", "evaluate"),
    "fsdp.offload=cpu": tuple(PLACES),
    "fsdp.strategy=full_shard": ("forward", "backward", "evaluate"),
}


def test_what_is_no_want_of_memory_passes(tmp_path: Path) -> None:
    post_mortem = PostMortem(RunFiles(tmp_path), Heartbeat(tmp_path / "beat"))
    with pytest.raises(RuntimeError, match="another"), post_mortem.explained():
        raise RuntimeError("another error")


def test_memory_of_the_host_and_of_a_load_is_explained(tmp_path: Path) -> None:
    heart = Heartbeat(tmp_path / "beat")
    heart.enter("load")
    post_mortem = PostMortem(RunFiles(tmp_path), heart)
    words = "ran out of host memory while it loaded the base"
    with pytest.raises(PlanError, match=words), post_mortem.explained():
        torch.empty(2**60, dtype=torch.uint8)
