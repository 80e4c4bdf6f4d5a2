"""The lines that the ranks write for the screen and the report, and the error that ends a rank.

Rank 0 appends JSON lines to ``metrics.jsonl`` (steps and evaluations) and ``events.jsonl`` (phases,
set-up, samples, notices, the end); the launcher follows both files and draws the screen. The two
tables below are the contract.

metrics.jsonl, field ``event`` is one of:
    ``step``  step, total_steps, loss, lr, grad_norm, tokens, trained_tokens, tokens_per_s,
              data_wait_s (in which rank 0 waited for rows), memory_bytes (of rank 0), time
              with fp16 also loss_scale, skipped_steps; grad_norm is null in a skipped step
    ``eval``  step, loss, perplexity, trained_tokens, time
    ``memory``  phase, bytes (at its end), peak_bytes (within it), on a GPU reserved_bytes, on a CPU
                anonymous_bytes, within a step its step, time: of rank 0, up to the second step,
                with `metrics.log_memory` of every step
    ``held``  step, device, host (each: bytes that rank 0's tensors hold between two steps, by
              category of a plan), tokens (of the largest micro-batch, padding included), time: of
              the same steps

events.jsonl, field ``event`` is one of:
    ``phase``   name (see `PHASES`), time
    ``load``    done_bytes, total_bytes, time
    ``setup``   the fields of `SetupSummary`, time
    ``sample``  when (``before`` or ``after``), prompt, answer, time
    ``notice``  message, time
    ``tracking``    message, url (where there is one), time: what became of sending the run to
                Weights & Biases; written by the launcher
    ``stream``  epoch, window, rows, bad_rows, cut, too_long, untrained, documents, sequences,
                tokens, trained_tokens, fill where rows are packed, time (`data.streaming`)
    ``resume``  step, directory (of the checkpoint), world_size (that saved it), time: the ranks go
                on from there; rows of later steps that stand before it are void
    ``checkpoint``  step, directory, num_bytes, seconds, eval_loss, time: it is whole and on disk
    ``stop``    signal, time: the ranks were asked to save and end, and will after this step
    ``stopped``  step, directory (null where nothing could be saved), time: they have
    ``requests``  done, time: questions of lm-evaluation-harness that are answered
    ``export``  format, directory, num_bytes, verified (whether stock libraries loaded it and
                computed the same), max_difference (of their logits, as a share of the largest; null
                where nobody looked), seconds, time
    ``done``    the fields of `RunSummary`, time

The worker's ``quantize RUN_DIR --out DIR`` reads the same recipe and lock (``inputs.data`` may be
missing), writes a quantized base into the empty directory DIR, and ``phase``, ``load``, ``notice``
and at the end one row of its own to events.jsonl:
    ``base``    directory, num_bytes, num_parameters, num_quantized, time

run.lock.json, ``inputs.base``, where the ranks are to load from such a base:
    directory   of the base
    key         of its manifest (`fsdpq.tensor_files.base_manifest`): another base is not used
    digest      hash of its checksums, the same for the same content

events.jsonl of ``fsdpq doctor --self-test`` has two of its own:
    ``checks``  names (pairs of group and name, in order), time
    ``check``   the fields of `CheckResult`, time
"""

from __future__ import annotations

import dataclasses
import time
from dataclasses import dataclass
from typing import Any

PHASES = ("data", "load", "eval", "train", "export", "tasks", "report")
"""The phases of a training run, in order; ``eval`` comes again after ``train``. A run that writes a
quantized base has one phase, ``quantize``."""


@dataclass(frozen=True)
class RankError:
    """The error that ended one rank, written by the rank itself before it exits.

    Attributes:
        rank: which rank.
        kind: name of the exception's class.
        message: its text; for an `fsdpq.errors.FsdpqError` the text for the user.
        hint: one action that the user can take, may be empty.
        traceback: the formatted traceback, empty for an `FsdpqError`.
        exit_code: what the run should exit with.
        time: seconds since the epoch; the smallest of all ranks is the root cause.
        problems: those of a `fsdpq.errors.RecipeError`, as plain data, else none.
        details: more lines for the user, of an `FsdpqError`.
    """

    rank: int
    kind: str
    message: str
    hint: str
    traceback: str
    exit_code: int
    time: float
    problems: list[dict[str, Any]] = dataclasses.field(default_factory=list[dict[str, Any]])
    details: str = ""


@dataclass(frozen=True)
class SetupSummary:
    """What is about to be trained, once the model is built, sharded and loaded.

    Attributes:
        model: ``model.name_or_path``.
        adapter_kind: ``adapter.kind``, what is trained.
        num_parameters: weights of the base model, tied ones counted once, new layers included.
        num_trainable: trained weights, over all ranks.
        num_quantized: base weights that are stored quantized.
        num_groups: FSDP groups (what is gathered at once).
        world_size: number of ranks.
        device: name of rank 0's device.
        dtype: what forward runs in: ``bf16``, or ``fp32 under autocast to fp16``.
        base_bytes_per_rank: resident bytes of the frozen weights, one number per rank.
        adapter_bytes_per_rank: resident bytes of the trained weights, one number per rank.
        num_train_rows: rows trained on.
        num_eval_rows: rows held out.
        total_steps: optimizer steps.
    """

    model: str
    adapter_kind: str
    num_parameters: int
    num_trainable: int
    num_quantized: int
    num_groups: int
    world_size: int
    device: str
    dtype: str
    base_bytes_per_rank: list[int]
    adapter_bytes_per_rank: list[int]
    num_train_rows: int
    num_eval_rows: int
    total_steps: int


@dataclass(frozen=True)
class RunSummary:
    """What a finished run achieved.

    Attributes:
        steps: optimizer steps done.
        train_s: seconds from the first step to the last, evaluations included.
        tokens: tokens of all rows trained on, padding left out, all ranks.
        trained_tokens: those that carried loss.
        eval_loss_before: held-out loss of the base in nats a token, None without held-out rows.
        eval_loss_after: the same after training.
        peak_memory_bytes: peak memory of each rank: device memory on a GPU, else resident memory.
        peak_host_bytes: the most resident memory of each rank's process.
        adapter: path of what was exported: an adapter, or a whole model.
    """

    steps: int
    train_s: float
    tokens: int
    trained_tokens: int
    eval_loss_before: float | None
    eval_loss_after: float | None
    peak_memory_bytes: list[int]
    peak_host_bytes: list[int]
    adapter: str


@dataclass(frozen=True)
class CheckResult:
    """How one check of the self-test ended.

    Attributes:
        group: heading that it stands under.
        name: unique within the group.
        status: ``passed``, ``failed`` or ``skipped``.
        detail: what was compared, what differs, or why it was skipped.
        remedy: one action that the user can take; empty unless it failed.
        seconds: how long it took.
    """

    group: str
    name: str
    status: str
    detail: str
    remedy: str
    seconds: float

    def with_detail(self, detail: str) -> CheckResult:
        """Returns the same result in other words."""
        return dataclasses.replace(self, detail=detail)

    def row(self) -> dict[str, Any]:
        """Returns it as a row of events.jsonl."""
        return {"event": "check", **dataclasses.asdict(self), "time": time.time()}
