"""The guard against losses that are not finite, and what a log line says."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import pytest
import torch
from support.tiny import VOCAB_SIZE, random_rows
from torch import nn

from fsdpq.data.dealing.collate import Step, build_step
from fsdpq.errors import DamagedBaseError, TrainingError
from fsdpq.protocols import Losses
from fsdpq.recipe.sections.training import TrainingOptions
from fsdpq.training.loop import LoopState, Trainer, check_finite


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_the_first_bad_step_and_its_ranks_are_named(value: float) -> None:
    losses = torch.tensor([[1.0, 1.0, 1.0], [1.0, value, value], [value, value, value]])
    with pytest.raises(TrainingError) as caught:
        check_finite(losses.double(), torch.ones(3), first_step=11)
    assert "the loss of step 12 is not finite on rank 1, 2" in caught.value.message
    assert "optimizer.lr" in caught.value.hint


def test_finite_losses_pass() -> None:
    check_finite(torch.ones(4, 2), torch.ones(4), first_step=1)


def test_a_gradient_norm_that_is_not_finite_stops_the_run_too() -> None:
    norms = torch.tensor([1.0, math.inf])
    with pytest.raises(TrainingError, match="gradient norm of step 6 is not finite"):
        check_finite(torch.ones(2, 1), norms, first_step=5)


def test_a_held_out_loss_that_is_not_finite_stops_the_run() -> None:
    with pytest.raises(TrainingError, match="held-out loss after step 2 is not finite"):
        _train(Bigram(), log_interval=1, steps=_steps(3), evaluate=lambda: math.nan, interval=2)


def test_evaluations_do_not_count_as_training_time() -> None:
    steps = [build_step(random_rows(4), micro_batch_size=4, rank=0, world_size=1)] * 8

    def slow() -> float:
        time.sleep(0.5)
        return 1.0

    row = _train(Bigram(), log_interval=8, steps=steps, evaluate=slow, interval=4).rows[-1]
    # Eight steps of a tiny table take milliseconds each, the evaluation takes half a second.
    assert row["event"] == "step"
    plain = _train(Bigram(), log_interval=8, steps=steps).rows[-1]
    assert 0.2 < row["tokens_per_s"] / plain["tokens_per_s"] < 5


def test_waiting_for_rows_is_counted() -> None:
    step = build_step(random_rows(4), micro_batch_size=4, rank=0, world_size=1)

    def slow() -> Iterator[Step]:
        for _ in range(4):
            time.sleep(0.05)
            yield step

    rows = _train(Bigram(), log_interval=2, steps=[step] * 4, source=slow()).rows
    assert [row["data_wait_s"] >= 0.1 for row in rows] == [True, True]
    plain = _train(Bigram(), log_interval=2, steps=[step] * 4).rows
    assert all(row["data_wait_s"] < 0.1 for row in plain)


class ListSink:
    """Keeps rows."""

    def __init__(self) -> None:
        self.rows: list[Mapping[str, Any]] = []

    def write(self, row: Mapping[str, Any]) -> None:
        self.rows.append(row)


class Bigram(nn.Module):
    """The smallest language model with our forward; ``fail_at`` makes one loss NaN."""

    def __init__(self, fail_at: int = 0) -> None:
        super().__init__()
        self.table = nn.Embedding(VOCAB_SIZE, VOCAB_SIZE)
        self.calls = 0
        self.fail_at = fail_at

    def forward(
        self,
        input_ids: torch.Tensor,
        positions: torch.Tensor,
        targets: torch.Tensor,
        position_ids: torch.Tensor | None = None,
    ) -> torch.Tensor:
        assert position_ids is None
        self.calls += 1
        logits = self.table(input_ids).flatten(0, 1)[positions]
        loss = nn.functional.cross_entropy(logits, targets, reduction="sum")
        return loss * math.nan if self.calls == self.fail_at else loss


class RoutedBigram(Bigram):
    """Has a load-balancing loss too: how far its table is from zero."""

    def losses(self, *inputs: Any) -> Losses:
        *of_tokens, is_token = inputs
        assert is_token.shape == of_tokens[0].shape
        return Losses(self(*of_tokens), self.table.weight.square().mean())


def _train(
    model: Bigram,
    *,
    log_interval: int,
    steps: list[Step],
    evaluate: Callable[[], float | None] | None = None,
    interval: int | None = None,
    coefficient: float = 0.0,
    check_base: Callable[[], None] = lambda: None,
    source: Iterator[Step] | None = None,
    state: LoopState | None = None,
    **hooks: Any,
) -> ListSink:
    sink = ListSink()
    parameters = list(model.parameters())
    trainer = Trainer(
        model=model,
        parameters=parameters,
        optimizer=torch.optim.SGD(parameters, lr=0.5),
        schedule=lambda step: 1.0 / (step + 1),
        options=TrainingOptions(steps=len(steps), eval_interval=interval),
        total_steps=len(steps),
        log_interval=log_interval,
        metrics=sink,
        evaluate=evaluate,
        device=torch.device("cpu"),
        router_aux_loss_coef=coefficient,
        check_base=check_base,
        **hooks,
    )
    trainer.run(iter(steps) if source is None else source, state)
    return sink


def _steps(count: int) -> list[Step]:
    return [
        build_step(random_rows(3 + index, seed=index), micro_batch_size=2, rank=0, world_size=1)
        for index in range(count)
    ]


def test_a_log_line_is_the_token_mean_of_its_steps() -> None:
    torch.manual_seed(0)
    steps = _steps(5)
    each = _train(Bigram(), log_interval=1, steps=steps).rows
    torch.manual_seed(0)
    some = _train(Bigram(), log_interval=2, steps=steps).rows
    assert [row["step"] for row in some] == [2, 4, 5]
    weights = [step.num_trained for step in steps[:2]]
    mean = sum(w * r["loss"] for w, r in zip(weights, each[:2], strict=True)) / sum(weights)
    assert some[0]["loss"] == pytest.approx(mean, rel=1e-6)
    assert some[0]["trained_tokens"] == sum(weights)
    assert [row["lr"] for row in each] == pytest.approx([0.5 / (i + 1) for i in range(5)])


def test_a_nan_between_two_log_lines_is_still_named_by_its_step() -> None:
    steps = [build_step(random_rows(2), micro_batch_size=2, rank=0, world_size=1)] * 8
    with pytest.raises(TrainingError, match="loss of step 6 is not finite on rank 0"):
        _train(Bigram(fail_at=6), log_interval=4, steps=steps)


def test_a_load_balancing_loss_has_its_own_number_in_a_log_line() -> None:
    torch.manual_seed(0)
    steps = _steps(2)
    plain = _train(Bigram(), log_interval=1, steps=steps).rows
    rows = []
    for interval in (1, 2):
        torch.manual_seed(0)
        model = RoutedBigram()
        start = model.table.weight.square().mean().item()
        rows.append(_train(model, log_interval=interval, steps=steps, coefficient=9.0).rows)
    (first, second), (both,) = rows
    assert "aux_loss" not in plain[0]
    # Micro-batches of one step have the same one, so their mean has it too.
    assert first["aux_loss"] == pytest.approx(start, rel=1e-6)
    assert second["aux_loss"] < first["aux_loss"]
    assert both["aux_loss"] == pytest.approx((first["aux_loss"] + second["aux_loss"]) / 2)
    # It is trained, and is no part of the loss.
    assert first["loss"] == pytest.approx(plain[0]["loss"], rel=1e-6)
    assert second["loss"] != pytest.approx(plain[1]["loss"], rel=1e-6)


def test_a_base_that_changed_is_named_before_the_losses_that_it_spoiled() -> None:
    def changed() -> None:
        raise DamagedBaseError("the base is damaged")

    steps = [build_step(random_rows(2), micro_batch_size=2, rank=0, world_size=1)] * 2
    with pytest.raises(DamagedBaseError):
        _train(Bigram(fail_at=1), log_interval=2, steps=steps, check_base=changed)


def test_an_evaluation_that_a_stop_broke_off_is_done_where_the_run_goes_on() -> None:
    steps, state = _steps(5), LoopState()
    losses: list[float | None] = [None, 0.5, 0.25]  # the first one is broken off
    settings: Any = {"log_interval": 1, "steps": steps, "interval": 2, "state": state}
    settings["evaluate"] = lambda: losses.pop(0)
    model = Bigram()
    rows = _train(model, **settings, after_step=lambda now: now.progress.steps == 2).rows
    assert [row["event"] for row in rows] == ["step", "step"]
    assert not state.eval_losses
    rows = _train(model, **settings, source=iter(steps[2:])).rows
    assert [(row["event"], row["step"]) for row in rows] == [
        ("eval", 2), ("step", 3), ("step", 4), ("eval", 4), ("step", 5),
    ]  # fmt: skip
    assert state.eval_losses == {2: 0.5, 4: 0.25}


def test_every_part_of_a_step_is_told_as_it_begins() -> None:
    parts: list[tuple[str, int]] = []
    step = build_step(random_rows(4), micro_batch_size=2, rank=0, world_size=1)
    _train(Bigram(), log_interval=1, steps=[step], on_part=lambda *part: parts.append(part))
    names = [name for name, number in parts if number == 1]
    assert names == [
        "data", "forward", "backward", "forward", "backward", "optimizer", "log", "agree",
    ]  # fmt: skip
