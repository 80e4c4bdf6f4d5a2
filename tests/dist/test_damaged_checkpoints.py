"""Damaged checkpoints are named and not used; saves that fail end nothing; old ones are deleted."""

from __future__ import annotations

import errno
import functools
import shutil
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from support.ranks import RankPool
from support.saved_runs import Bench, Sections, Told, build, train_on
from support.tiny import random_rows, save_tiny_llama

from fsdpq.checkpoint import storage
from fsdpq.dist import rank
from fsdpq.errors import CheckpointError, TrainingError
from fsdpq.tensor_files.checkpoint_manifest import list_checkpoints, list_drafts, read_checkpoint
from fsdpq.training.loop import LoopState, Trainer
from fsdpq.worker.keeping import checkpoints

RECIPE: Sections = {
    "training": {"steps": 6, "global_batch_size": 4, "micro_batch_size": 2, "seed": 11},
    "metrics": {"log_interval": 1},
    "checkpoint": {"interval": 2, "keep_last": 2},
    "quantization": {"kind": "none"},
}  # fmt: skip


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_llama(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def run(ranks: RankPool, tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Told]:
    """A folder with the checkpoints of steps 4 and 6 of two ranks, and the run that left them."""
    folder = tmp_path_factory.mktemp("run")
    return folder, ranks.run(2, train_on, tiny, folder, RECIPE)[0]


def flip(path: Path) -> None:
    """Flips one bit in the middle."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)


def truncate(path: Path) -> None:
    """Takes the last byte away."""
    path.write_bytes(path.read_bytes()[:-1])


def grow(path: Path) -> None:
    """Puts a byte behind the last."""
    path.write_bytes(path.read_bytes() + b" ")


DAMAGES: dict[str, Callable[[Path], None]] = {
    "flip": flip, "truncate": truncate, "remove": Path.unlink, "grow": grow,
}  # fmt: skip


def look_at(model: Path, folders: list[Path]) -> list[tuple[str, list[str]]]:
    """Returns which checkpoint each folder's run would go on from, and the notices."""
    found: list[tuple[str, list[str]]] = []
    for folder in folders:
        bench = build(model, folder, RECIPE, random_rows(4), [])
        newest = bench.checkpoints.newest_whole()
        bench.loader.close()
        found.append((newest.name if newest else "", bench.told.notices()))
    return found


def test_every_damage_of_every_file_is_found_and_named(
    ranks: RankPool, tiny: Path, run: tuple[Path, Told], tmp_path: Path
) -> None:
    names = sorted(path.name for path in (run[0] / "step-00000006").iterdir())
    assert names == [
        "index.json", "manifest.json", "rank-00000.safetensors", "rank-00001.safetensors",
        "state.json",
    ]  # fmt: skip
    cases = [(name, damage) for name in names for damage in DAMAGES]
    folders: list[Path] = []
    for name, damage in cases:
        folders.append(tmp_path / f"{name}-{damage}")
        shutil.copytree(run[0], folders[-1])
        DAMAGES[damage](folders[-1] / "step-00000006" / name)
    answers = ranks.run(2, look_at, tiny, folders)
    for (name, damage), (newest, notices), other in zip(cases, answers[0], answers[1], strict=True):
        assert newest == other[0] == "step-00000004", (name, damage)
        assert name in notices[0]
        assert "step-00000006 is damaged" in notices[0]
        assert "goes on from step-00000004" in notices[0]


def test_a_run_goes_on_from_the_one_before_a_damaged_one(
    ranks: RankPool, tiny: Path, run: tuple[Path, Told], tmp_path: Path
) -> None:
    folder, whole = tmp_path / "run", run[1]
    shutil.copytree(run[0], folder)
    flip(folder / "step-00000006" / "rank-00001.safetensors")
    draft = folder / ".step-00000005.partial"
    draft.mkdir()
    told = ranks.run(2, functools.partial(train_on, resume=True), tiny, folder, RECIPE)[0]
    assert told.steps() == whole.steps(after=4)
    for name, value in whole.weights.items():
        assert torch.equal(told.weights[name], value), name
    assert not draft.exists()
    # The damaged one was made again.
    newest = list_checkpoints(folder)
    assert [path.name for path in newest] == ["step-00000006", "step-00000004"]
    assert ranks.run(1, look_at, tiny, [folder])[0] == [("step-00000006", [])]


def refuse(model: Path, folder: Path) -> tuple[str, str]:
    """Returns what a run says whose checkpoints are all damaged."""
    bench = build(model, folder, RECIPE, random_rows(4), [])
    with pytest.raises(CheckpointError) as caught, bench.loader:
        bench.checkpoints.restore()
    return caught.value.message, caught.value.hint


def test_nothing_starts_anew_where_all_are_damaged(
    ranks: RankPool, tiny: Path, run: tuple[Path, Told], tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    shutil.copytree(run[0], folder)
    for directory in list_checkpoints(folder):
        truncate(directory / "state.json")
    for message, hint in ranks.run(2, refuse, tiny, folder):
        assert message.count("state.json has") == 2
        assert f"delete {folder} to start from the first step" in hint


OTHER_MODEL: Sections = {"adapter": {"kind": "lora", "rank": 2, "alpha": 4.0}}
FEWER: Sections = {
    "adapter": {"kind": "lora", "rank": 4, "alpha": 8.0, "target_modules": ["q_proj"]}
}
MORE: Sections = {"adapter": {"kind": "dora", "rank": 4, "alpha": 8.0}}


def misfit(model: Path, folder: Path, sections: Sections) -> str:
    """Returns what a run says that the checkpoint does not fit."""
    rows = random_rows(7, seed=5, longest=16)
    bench = build(model, folder, RECIPE | sections, rows, [])
    with pytest.raises(CheckpointError) as caught, bench.loader:
        bench.checkpoints.restore()
    return caught.value.message


@pytest.mark.parametrize(
    ("sections", "said"),
    [(OTHER_MODEL, "of shape [4, "), (FEWER, "does not train"), (MORE, "magnitude")],
)
def test_a_checkpoint_of_other_weights_is_refused_on_all_ranks(
    ranks: RankPool, tiny: Path, run: tuple[Path, Told], sections: Sections, said: str
) -> None:
    for message in ranks.run(2, misfit, tiny, run[0], sections):
        assert said in message


def fail_once(bench: Bench, *, failing_rank: int) -> Trainer:
    """Makes the first save fail on one rank, as a full disk does."""
    real, calls = storage.write_tensors, []

    def write(path: Path, tensors: Any) -> Any:
        calls.append(path)
        if len(calls) == 1 and rank() == failing_rank:
            path.write_bytes(b"half")
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        return real(path, tensors)

    storage.write_tensors = write
    return bench.trainer


def train_with_failure(model: Path, folder: Path, failing_rank: int) -> Told:
    """Trains; one rank cannot write the first checkpoint."""
    real = storage.write_tensors
    try:
        return train_on(
            model, folder, RECIPE, change=functools.partial(fail_once, failing_rank=failing_rank)
        )
    finally:
        storage.write_tensors = real


@pytest.mark.parametrize("failing_rank", [0, 1])
def test_a_save_that_fails_is_told_and_training_goes_on(
    ranks: RankPool, tiny: Path, run: tuple[Path, Told], tmp_path: Path, failing_rank: int
) -> None:
    told, other = ranks.run(2, train_with_failure, tiny, tmp_path, failing_rank)
    assert told.steps() == run[1].steps()
    [notice] = told.notices()
    assert f"step-00000002 could not be saved: rank {failing_rank}: No space left" in notice
    assert "make room on the disk" in notice
    assert len(other.notices()) == 1
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step-00000006", "step-00000004"]
    assert not list_drafts(tmp_path)


def train_beside_a_slow_disk(model: Path, folder: Path) -> list[str]:
    """Returns what happened in which order where the disk waits for the step after a save."""
    real, order, go = checkpoints.save_pieces, [], threading.Event()

    def save(writer: Any, pieces: Any, group: Any) -> None:
        assert go.wait(60)
        real(writer, pieces, group)
        order.append("saved")

    def note(bench: Bench) -> Trainer:
        inner = bench.trainer.metrics

        class Noting:
            def write(self, row: Any) -> None:
                order.append(f"step {row['step']}")
                if row["step"] == 3:
                    go.set()
                inner.write(row)

        return replace(bench.trainer, metrics=Noting())

    checkpoints.save_pieces = save
    try:
        train_on(model, folder, RECIPE, change=note)
    finally:
        checkpoints.save_pieces = real
    return order


def test_training_goes_on_while_a_checkpoint_is_written(
    ranks: RankPool, tiny: Path, run: tuple[Path, Told], tmp_path: Path
) -> None:
    order = ranks.run(2, train_beside_a_slow_disk, tiny, tmp_path)[0]
    # Step 3 was computed before the state of step 2 was on disk, and did not change what was saved.
    assert order.index("step 2") < order.index("step 3") < order.index("saved")
    recipe = RECIPE | {"checkpoint": {"interval": None}}
    for directory in list_checkpoints(tmp_path)[:-1]:
        shutil.rmtree(directory)
    told = ranks.run(2, functools.partial(train_on, resume=True), tiny, tmp_path, recipe)[0]
    assert told.steps() == run[1].steps(after=read_checkpoint(list_checkpoints(tmp_path)[-1]).step)


def test_the_best_and_the_newest_are_kept(ranks: RankPool, tiny: Path, tmp_path: Path) -> None:
    # A learning rate at which the held-out loss falls first and rises then.
    recipe = RECIPE | {
        "training": RECIPE["training"] | {"steps": 8, "eval_interval": 1},
        "checkpoint": {"interval": 4, "keep_last": 1, "keep_best": True},
        "optimizer": {"kind": "adamw", "lr": 0.05},
    }
    told = ranks.run(2, functools.partial(train_on, held_out=4), tiny, tmp_path, recipe)[0]
    losses = dict(told.evaluations())
    best = min(losses, key=lambda step: losses[step])
    assert best not in (4, 8)  # saved for its loss alone
    kept = [read_checkpoint(path) for path in list_checkpoints(tmp_path)]
    assert [saved.step for saved in kept] == [8, best]
    assert kept[1].eval_loss == losses[best]


def save_by_the_clock(model: Path, folder: Path) -> list[int]:
    """Returns the steps of the checkpoints; rank 1's clock stands still."""
    now = [0.0]

    def monotonic() -> float:
        return now[0] if rank() == 0 else 0.0

    def slow(bench: Bench) -> Trainer:
        inner = bench.trainer.metrics

        class Ticking:
            def write(self, row: Any) -> None:
                now[0] += 25.0  # seconds a step
                inner.write(row)

        return replace(bench.trainer, metrics=Ticking())

    real, checkpoints.time = checkpoints.time, _Clock(monotonic)  # pyright: ignore
    try:
        sections = RECIPE | {"checkpoint": {"interval_minutes": 1.0, "keep_last": 9}}
        told = train_on(model, folder, sections, change=slow)
    finally:
        checkpoints.time = real
    return [row["step"] for row in told.events if row["event"] == "checkpoint"]


class _Clock:
    """Stands in for the module ``time``."""

    def __init__(self, monotonic: Callable[[], float]) -> None:
        self.monotonic = monotonic

    @staticmethod
    def time() -> float:
        """Returns a moment."""
        return 1.0


def test_minutes_are_those_of_rank_0_and_the_last_step_is_saved_too(
    ranks: RankPool, tiny: Path, tmp_path: Path
) -> None:
    answers = ranks.run(2, save_by_the_clock, tiny, tmp_path)
    assert answers[0] == [3, 6]
    assert sorted(read_checkpoint(path).step for path in list_checkpoints(tmp_path)) == [3, 6]


def save_a_spoiled_state(model: Path, folder: Path) -> str:
    """Returns what a save says whose last loss, in no log line yet, is not finite."""
    recipe = RECIPE | {"metrics": {"log_interval": 6}, "checkpoint": {"interval": None}}
    rows = random_rows(7, seed=5, longest=16)
    bench = build(model, folder, recipe, rows, [])
    state = LoopState()

    def spoil(state: LoopState) -> bool:
        state.window.results[-1].loss.fill_(float("nan"))
        bench.checkpoints.save(state)
        return True

    with pytest.raises(TrainingError) as caught, bench.loader:
        replace(bench.trainer, after_step=spoil).run(bench.loader, state)
    return caught.value.message


def test_a_state_after_a_loss_that_is_not_finite_is_not_saved(
    ranks: RankPool, tiny: Path, tmp_path: Path
) -> None:
    for message in ranks.run(2, save_a_spoiled_state, tiny, tmp_path):
        assert "the loss of step 1 is not finite on rank 0, 1" in message
    assert not list_checkpoints(tmp_path)
