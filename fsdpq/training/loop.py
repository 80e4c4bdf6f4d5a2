"""The training loop: steps, metrics, evaluations, and the guard against losses that are not finite.

Losses of the steps between two log lines stay on the device; a log line gathers them over the
ranks at once. A loss that is not finite is therefore found at the next log line at the latest, and
the step and the rank it came from are exact.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from fsdpq.data.dealing.collate import Step
from fsdpq.dist import all_gather_rows, world_size
from fsdpq.errors import TrainingError
from fsdpq.metrics.held import StepHeld
from fsdpq.metrics.memory import MemoryLog, current_bytes
from fsdpq.metrics.profile import StepProfiler
from fsdpq.protocols import MetricSink
from fsdpq.recipe.sections.training import TrainingOptions
from fsdpq.training.scaler import LossScaler
from fsdpq.training.step import StepMode, StepResult, train_step

NOT_FINITE_HINT = (
    "lower optimizer.lr, raise lr_scheduler.warmup_steps, or set model.dtype=fp32; "
    "the steps before are in metrics.jsonl"
)


@dataclass
class Progress:
    """Totals over the steps done so far, those before a resume included."""

    steps: int = 0
    tokens: int = 0
    trained_tokens: int = 0


@dataclass
class LogWindow:
    """The steps since the last log line, not yet read from the device."""

    results: list[StepResult] = field(default_factory=list)
    num_trained: list[int] = field(default_factory=list)
    tokens: int = 0
    started: float = field(default_factory=time.monotonic)
    data_wait_s: float = 0.0

    def take(self, steps: Iterator[Step]) -> Step:
        """Returns the next step, and counts how long it was not there."""
        before = time.monotonic()
        step = next(steps)
        self.data_wait_s += time.monotonic() - before
        return step

    def add(self, result: StepResult, step: Step) -> None:
        """Takes one step."""
        self.results.append(result)
        self.num_trained.append(step.num_trained)
        self.tokens += step.num_tokens


@dataclass
class LoopState:
    """Where the loop is between two steps: with weights, optimizer and rows, all that it knows.

    Attributes:
        progress: totals.
        window: steps that no log line has yet.
        eval_losses: held-out losses by the step after which they were computed.
    """

    progress: Progress = field(default_factory=Progress)
    window: LogWindow = field(default_factory=LogWindow)
    eval_losses: dict[int, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Trainer:
    """All that the loop needs, built by the worker.

    Attributes:
        model: sharded and loaded.
        parameters: the trainable ones.
        optimizer: over ``parameters``.
        schedule: factor on the peak learning rate by step.
        options: the recipe's ``training`` section.
        total_steps: optimizer steps to do.
        log_interval: steps between two log lines.
        metrics: takes the rows of ``metrics.jsonl``.
        evaluate: returns the held-out loss, or None where it was broken off; None where nothing is
            held out.
        device: this rank's device.
        scaler: scales the loss for fp16, None elsewhere.
        no_sync: reduce gradients once a step rather than once a micro-batch.
        profiler: traces some steps, None traces none.
        memory: writes the memory at every phase of the first steps, None does not.
        router_aux_loss_coef: factor on the load-balancing loss of a mixture, 0 without it.
        check_base: raises where the base that is trained over has changed; called before every log
            line.
        after_step: called after every step, its log line and its evaluation, on all ranks; ends the
            loop where it returns True, on all of them.
        on_part: told what begins (``data``, ``forward``, ``backward``, ``optimizer``, ``log``,
            ``evaluate``, ``agree``) and the step that it belongs to, counted from 1.
    """

    model: nn.Module
    parameters: Sequence[nn.Parameter]
    optimizer: torch.optim.Optimizer
    schedule: Callable[[int], float]
    options: TrainingOptions
    total_steps: int
    log_interval: int
    metrics: MetricSink
    evaluate: Callable[[], float | None] | None
    device: torch.device
    scaler: LossScaler | None = None
    no_sync: bool = False
    profiler: StepProfiler | None = None
    memory: MemoryLog | None = None
    router_aux_loss_coef: float = 0.0
    check_base: Callable[[], None] = lambda: None
    after_step: Callable[[LoopState], bool] = lambda _state: False
    on_part: Callable[[str, int], Any] = lambda _part, _step: None

    def run(self, steps: Iterator[Step], state: LoopState | None = None) -> Progress:
        """Trains; returns the totals.

        Ranks: all (collective).

        Args:
            steps: from the first one that is to be done.
            state: where to go on; it is changed in place. None starts at the first step.

        Raises:
            TrainingError: a loss is not finite.
        """
        self.model.train()
        peak = [group["lr"] for group in self.optimizer.param_groups]
        state = state or LoopState()
        progress = state.progress
        before = time.monotonic()
        self._evaluate_if_due(state)  # it was broken off where the run was stopped
        state.window.started += time.monotonic() - before
        for index in range(progress.steps, self.total_steps):
            self.on_part("data", index + 1)
            step = state.window.take(steps)
            for group, lr in zip(self.optimizer.param_groups, peak, strict=True):
                group["lr"] = lr * self.schedule(index)
            with self.profiler.tracing(index + 1) if self.profiler else nullcontext():
                result = self._step(step, index + 1)
            state.window.add(result, step)
            progress.steps += 1
            progress.tokens += step.num_tokens
            progress.trained_tokens += step.num_trained
            last = progress.steps == self.total_steps
            if last or progress.steps % self.log_interval == 0:
                self._log(state.window, progress)
                state.window = LogWindow()
            before = time.monotonic()
            self._evaluate_if_due(state)
            self.on_part("agree", progress.steps)
            ends = self.after_step(state)
            state.window.started += time.monotonic() - before
            if ends:
                break
        if self.profiler:
            self.profiler.finish()
        return progress

    def _evaluate_if_due(self, state: LoopState) -> None:
        """Evaluates where the interval says so and it was not done; the end is not the loop's."""
        steps, interval = state.progress.steps, self.options.eval_interval
        if not interval or not steps or steps % interval or steps == self.total_steps:
            return
        if steps not in state.eval_losses:
            loss = self.log_evaluation(steps)
            if loss is not None:
                state.eval_losses[steps] = loss

    def _step(self, step: Step, number: int) -> StepResult:
        """Does one optimizer step."""
        measured = self.memory is not None and self.memory.begin_step(number)
        held = StepHeld(self.model, self.optimizer, self.device) if measured else None
        micro_batches_left = len(step.micro_batches)

        def on_phase(ended: str) -> None:
            nonlocal micro_batches_left
            micro_batches_left -= ended == "backward"
            after_backward = "forward" if micro_batches_left else "optimizer"
            begins = {"forward": "backward", "backward": after_backward, "optimizer": "log"}
            self.on_part(begins[ended], number)
            if self.memory is not None and held is not None:
                self.memory(ended)
                held.end_phase(ended)

        self.on_part("forward", number)
        result = train_step(
            self.model,
            step,
            optimizer=self.optimizer,
            parameters=self.parameters,
            max_grad_norm=self.options.max_grad_norm,
            device=self.device,
            mode=StepMode(self.scaler, self.no_sync, on_phase, self.router_aux_loss_coef),
        )
        if self.memory is not None and held is not None:
            tokens = max(batch.input_ids.numel() for batch in step.micro_batches)
            self.memory.end_step(held.all(), tokens=tokens)
        return result

    def log_evaluation(self, step: int) -> float | None:
        """Computes and logs the held-out loss; None where nothing is held out, or at a stop.

        Ranks: all (collective).

        Raises:
            TrainingError: it is not finite.
        """
        if self.evaluate is None:
            return None
        self.on_part("evaluate", step)
        loss = self.evaluate()
        if loss is None:
            return None
        if not math.isfinite(loss):
            message = f"the held-out loss after step {step} is not finite ({loss})"
            raise TrainingError(message, hint=NOT_FINITE_HINT)
        perplexity = math.exp(min(loss, 700.0))
        self.metrics.write({"event": "eval", "step": step, "loss": loss, "perplexity": perplexity})
        return loss

    def _log(self, window: LogWindow, progress: Progress) -> None:
        """Reads the window's losses from the device, checks them, writes one row."""
        self.check_base()  # first: weights that changed may have spoiled the losses
        losses, norms, skipped = read_window(window, last_step=progress.steps)
        weights = torch.tensor(window.num_trained, dtype=torch.float64)
        loss = float((losses.sum(dim=1) * weights).sum() / weights.sum())
        seconds = time.monotonic() - window.started
        row = {
            "event": "step",
            "step": progress.steps,
            "total_steps": self.total_steps,
            "loss": loss,
            "lr": self.optimizer.param_groups[0]["lr"],
            "grad_norm": None if skipped[-1] else float(norms[-1]),
            "tokens": window.tokens,
            "trained_tokens": sum(window.num_trained),
            "tokens_per_s": window.tokens / seconds,
            "data_wait_s": window.data_wait_s,
            "memory_bytes": current_bytes(self.device),
        }
        if self.scaler is not None:
            row |= {"loss_scale": self.scaler.scale, "skipped_steps": self.scaler.num_skipped}
        shares = [result.aux_loss for result in window.results if result.aux_loss is not None]
        if shares:
            row["aux_loss"] = float(gather_losses(shares).sum(dim=1).mean())
        self.metrics.write(row)


def read_window(window: LogWindow, *, last_step: int) -> tuple[Tensor, Tensor, Tensor]:
    """Returns losses ``(steps, ranks)``, gradient norms and which steps were skipped, on the host.

    Ranks: all (collective).

    Args:
        window: with one step at least.
        last_step: its last.

    Raises:
        TrainingError: one is not finite.
    """
    losses = gather_losses([result.loss for result in window.results])
    norms = torch.stack([result.grad_norm for result in window.results]).cpu()
    skipped = torch.tensor([result.skipped for result in window.results])
    # A skipped step's gradients overflowed; its scale is lower now, and nothing is wrong.
    first_step = last_step - len(window.results) + 1
    check_finite(losses, norms.masked_fill(skipped, 0.0), first_step=first_step)
    return losses, norms, skipped


def gather_losses(shares: Sequence[Tensor]) -> Tensor:
    """Returns every rank's share of every step's loss, fp64 on the host, ``(steps, ranks)``.

    Ranks: all (collective).

    Args:
        shares: this rank's, scalars.
    """
    mine = torch.stack(list(shares)).double()
    return all_gather_rows(mine.unsqueeze(0), world_size()).T.cpu()


def check_finite(losses: Tensor, grad_norms: Tensor, *, first_step: int) -> None:
    """Checks the losses ``(steps, ranks)`` and gradient norms ``(steps,)`` of a log window.

    Raises:
        TrainingError: names the first step and what is not finite in it: the losses of which
            ranks, or the gradient norm.
    """
    bad_losses, bad_norms = ~torch.isfinite(losses), ~torch.isfinite(grad_norms)
    bad_steps = (bad_losses.any(dim=1) | bad_norms).nonzero()
    if not len(bad_steps):
        return
    index = int(bad_steps[0])
    ranks = bad_losses[index].nonzero().flatten().tolist()
    if ranks:
        what, value = f"on rank {', '.join(map(str, ranks))}", losses[index, ranks[0]]
        message = f"the loss of step {first_step + index} is not finite {what} ({value})"
    else:
        message = f"the gradient norm of step {first_step + index} is not finite"
        message += f" ({grad_norms[index]})"
    raise TrainingError(message, hint=NOT_FINITE_HINT)
