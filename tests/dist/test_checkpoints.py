"""A run that goes on from a checkpoint is the run that was never interrupted.

The undisturbed run saves on its way; the resumed one starts from that checkpoint. On as many ranks
everything after it is the same bit for bit: losses, norms, what a log line adds up over steps
before and after the checkpoint, weights. On other ranks sums have another order: 1e-5.
`test_resumed_rows` compares with plain torch.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
import torch
from support import bases
from support.ranks import RankPool
from support.saved_runs import Bench, Sections, Told, train_on
from support.tiny import save_tiny_llama, tiny_recipe

from fsdpq.plan.disk import checkpoint_bytes
from fsdpq.plan.shapes import shape_from_directory
from fsdpq.plan.weights import plan_weights
from fsdpq.tensor_files.checkpoint_manifest import list_checkpoints, read_checkpoint
from fsdpq.training.loop import Trainer

SAVED, STEPS = 4, 7
PLAIN: Sections = {
    "training": {
        "steps": STEPS, "global_batch_size": 4, "micro_batch_size": 1, "seed": 11,
    },
    # Step 4 is inside a log window of three.
    "metrics": {"log_interval": 3},
    "checkpoint": {"interval": SAVED, "keep_last": 9},
    "quantization": {"kind": "none"},
}  # fmt: skip
NF4 = {"quantization": {"kind": "bnb"}}
DROPOUT = {"adapter": {"kind": "lora", "rank": 4, "alpha": 8.0, "dropout": 0.2}}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_llama(tmp_path_factory.mktemp("tiny"))


def sections(*changes: Sections) -> Sections:
    """Returns the plain recipe with sections changed or filled."""
    whole = {name: dict(section) for name, section in PLAIN.items()}
    for change in changes:
        for name, section in change.items():
            switches = "kind" in section
            whole[name] = dict(section) if switches else whole.get(name, {}) | section
    return whole


def forget_later(folder: Path) -> None:
    """Deletes the checkpoints after the one in the middle of the run."""
    for directory in list_checkpoints(folder):
        if read_checkpoint(directory).step != SAVED:
            for path in directory.iterdir():
                path.unlink()
            directory.rmdir()


def interrupt(
    ranks: RankPool, world: int, tiny: Path, folder: Path, recipe: Sections, **options: Any
) -> Told:
    """Returns the undisturbed run; its checkpoint in the middle stays."""
    run = functools.partial(train_on, **options)
    told = ranks.run(world, run, tiny, folder, recipe)[0]
    forget_later(folder)
    return told


def go_on(
    ranks: RankPool, world: int, tiny: Path, folder: Path, recipe: Sections, **options: Any
) -> Told:
    """Returns the run that went on from the middle; its own checkpoints are removed."""
    run = functools.partial(train_on, resume=True, **options)
    told = ranks.run(world, run, tiny, folder, recipe)[0]
    forget_later(folder)
    [row] = [row for row in told.events if row["event"] == "resume"]
    assert row["step"] == SAVED
    return told


def assert_planned(folder: Path, directory: Path, recipe: Sections, world: int) -> None:
    """Compares the size of the checkpoint with the plan's: numbers in it have as many digits."""
    planned = tiny_recipe(**recipe, launch={"nproc_per_node": world})
    weights = plan_weights(planned, shape_from_directory(directory))
    [found] = list_checkpoints(folder)
    num_bytes = sum(path.stat().st_size for path in found.iterdir())
    assert checkpoint_bytes(planned, weights) == pytest.approx(num_bytes, rel=0.02)


def assert_same(resumed: Told, whole: Told) -> None:
    """Bit for bit."""
    assert resumed.steps() == whole.steps(after=SAVED)
    assert len(resumed.steps()) == 2
    assert resumed.loader == whole.loader
    for name, value in whole.weights.items():
        assert torch.equal(resumed.weights[name], value), name


def assert_close(resumed: Told, whole: Told, *, rel: float = 1e-5) -> None:
    """Up to the order of fp32 sums."""
    for row, expected in zip(resumed.steps(), whole.steps(after=SAVED), strict=True):
        assert row == pytest.approx(expected, rel=rel)


def test_dropout_accumulation_and_log_windows_go_on_exactly(
    ranks: RankPool, tiny: Path, tmp_path: Path
) -> None:
    recipe = sections(NF4, DROPOUT)
    whole = interrupt(ranks, 2, tiny, tmp_path, recipe)
    unsaved = sections(recipe, {"checkpoint": {"interval": None}})
    alone = ranks.run(2, train_on, tiny, tmp_path / "none", unsaved)[0]
    assert alone.steps() == whole.steps()  # saving changes nothing
    assert not (tmp_path / "none").exists()
    assert_same(go_on(ranks, 2, tiny, tmp_path, recipe), whole)


STRATEGIES: list[tuple[int, dict[str, Any]]] = [
    (1, {}),
    (4, {}),
    (2, {"strategy": "ddp"}),
    (2, {"strategy": "shard_grad_op", "offload": "cpu"}),
    (2, {"offload": "disk"}),
    (4, {"strategy": "hybrid_full_shard", "shard_size": 2}),
]


@pytest.mark.parametrize(
    "saver", [(2, {}), (4, {"strategy": "hybrid_full_shard", "shard_size": 2})]
)
def test_other_ranks_and_strategies_go_on(
    ranks: RankPool, tiny: Path, tmp_path: Path, saver: tuple[int, dict[str, Any]]
) -> None:
    world, fsdp = saver
    base = tmp_path / "base"
    ranks.run(2, bases.write, tiny, base, NF4)
    run = tmp_path / "run"
    whole = interrupt(ranks, world, tiny, run, sections(NF4, {"fsdp": fsdp}))
    for other_world, other in STRATEGIES:
        recipe = sections(NF4, {"fsdp": other})
        resumed = go_on(ranks, other_world, tiny, run, recipe, base=base)
        assert_close(resumed, whole)
        assert resumed.loader == whole.loader


def test_every_replica_is_written_once(ranks: RankPool, tiny: Path, tmp_path: Path) -> None:
    # fsdp: rows -> bytes of all tensors; ddp has every row on every rank.
    sizes: list[int] = []
    for strategy in ("full_shard", "ddp"):
        folder = tmp_path / strategy
        interrupt(ranks, 2, tiny, folder, sections({"fsdp": {"strategy": strategy}}))
        saved = read_checkpoint(list_checkpoints(folder)[0])
        tensors = {n: f.num_bytes for n, f in saved.files.items() if n.startswith("rank-")}
        assert len(tensors) == 2  # dealt out
        sizes.append(sum(tensors.values()))
    assert sizes[1] == pytest.approx(sizes[0], rel=0.1)


LORA = {"kind": "lora", "rank": 4, "alpha": 8.0}
METHODS: dict[str, Sections] = {
    "dora": {"adapter": {"kind": "dora", "rank": 4, "alpha": 8.0, "dropout": 0.1}, **NF4},
    "llama_pro": {"adapter": {"kind": "llama_pro", "num_new_layers": 1}},
    "full, bf16": {"adapter": {"kind": "none"}, "model": {"dtype": "bf16"}},
    "pissa": {"adapter": {**LORA, "init": "pissa"}},
    "modules_to_save": {"adapter": {**LORA, "modules_to_save": ["lm_head"]}},
}


@pytest.mark.parametrize("method", METHODS)
def test_methods_go_on(ranks: RankPool, tmp_path: Path, method: str) -> None:
    directory = save_tiny_llama(tmp_path / "model", tied=False)
    recipe = sections(METHODS[method])
    whole = interrupt(ranks, 2, directory, tmp_path / "run", recipe)
    assert_planned(tmp_path / "run", directory, recipe, 2)
    resumed = go_on(ranks, 2, directory, tmp_path / "run", recipe)
    assert_same(resumed, whole)
    for name, value in whole.residual.items():
        assert torch.equal(resumed.residual[name], value), name
        assert torch.equal(resumed.initial[name], whole.initial[name]), name
    assert bool(whole.residual) == (method == "pissa")


OPTIMIZERS: dict[str, dict[str, Any]] = {
    "sgd": {"kind": "sgd", "lr": 0.1, "momentum": 0.0},
    "adamw_8bit": {"kind": "adamw_8bit", "lr": 1e-3},
    "LoRA+": {"kind": "adamw", "lr": 1e-3, "lora_plus_ratio": 8.0},
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_optimizers_go_on(ranks: RankPool, tiny: Path, tmp_path: Path, name: str) -> None:
    # `test_saved_optimizers` has the others, beside their libraries' own.
    # The schedule moves: what is restored are peak learning rates.
    schedule = {"lr_scheduler": {"kind": "linear", "warmup_steps": 2}}
    large = {"adapter": {"kind": "lora", "rank": 32, "alpha": 8.0}}  # 8-bit means from 4096 on
    recipe = sections({"optimizer": OPTIMIZERS[name]}, schedule, large)
    whole = interrupt(ranks, 2, tiny, tmp_path, recipe)
    assert_planned(tmp_path, tiny, recipe, 2)
    assert_same(go_on(ranks, 2, tiny, tmp_path, recipe), whole)
    rel = 1e-3 if name == "adamw_8bit" else 1e-5  # its means are rounded in other blocks
    assert_close(go_on(ranks, 1, tiny, tmp_path, recipe), whole, rel=rel)


def start_high(bench: Bench) -> Trainer:
    """Starts with a loss scale at which gradients overflow."""
    scaler = bench.trainer.scaler
    assert scaler is not None
    scaler.scale, scaler.growth_interval = 2.0**21, 3
    return bench.trainer


def test_the_loss_scale_and_skipped_steps_go_on(
    ranks: RankPool, tiny: Path, tmp_path: Path
) -> None:
    recipe = sections({"fsdp": {"precision": "fp16_autocast"}, "metrics": {"log_interval": 1}})
    whole = interrupt(ranks, 2, tiny, tmp_path, recipe, change=start_high)
    assert 0 < whole.steps()[SAVED - 1]["skipped_steps"] < SAVED - 1
    resumed = go_on(ranks, 2, tiny, tmp_path, recipe, change=start_high)
    assert resumed.steps() == whole.steps(after=SAVED)
    assert len({row["loss_scale"] for row in whole.steps(after=SAVED - 1)}) > 1  # grows


def test_evaluations_happen_once_each(ranks: RankPool, tiny: Path, tmp_path: Path) -> None:
    evaluated = {"training": {"eval_interval": 2}, "data": {"eval_fraction": 0.2}}
    recipe = sections(evaluated)
    whole = interrupt(ranks, 2, tiny, tmp_path, recipe, held_out=3)
    assert [step for step, _ in whole.evaluations()] == [2, 4, 6]
    saved = read_checkpoint(list_checkpoints(tmp_path)[0])
    assert saved.eval_loss == dict(whole.evaluations())[SAVED]
    resumed = go_on(ranks, 2, tiny, tmp_path, recipe, held_out=3)
    assert resumed.evaluations() == whole.evaluations(after=SAVED)


def test_a_finished_run_has_nothing_left_to_do(ranks: RankPool, tiny: Path, tmp_path: Path) -> None:
    whole = ranks.run(2, train_on, tiny, tmp_path, sections())[0]
    assert [row["step"] for row in whole.events if row["event"] == "checkpoint"] == [SAVED, STEPS]
    again = ranks.run(1, functools.partial(train_on, resume=True), tiny, tmp_path, sections())[0]
    assert not again.rows
    for name, value in whole.weights.items():
        assert torch.equal(again.weights[name], value), name
