"""The table at the end of a run, from the files of its directory: finished or not, now or later."""

from __future__ import annotations

import math
import shlex
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from fsdpq.cli.render import render_table
from fsdpq.cli.run_texts import format_seconds, one_line, program_name
from fsdpq.reports.run_record import Row, RunRecord, read_record
from fsdpq.run_files.amounts import format_bytes
from fsdpq.run_files.paths import RunFiles
from fsdpq.sweep.results.measures import LAST_STEPS, measures_of
from fsdpq.tensor_files.checkpoint_manifest import list_checkpoints, step_of

NO_PROMPT = "What is the capital of France?"


def summary_lines(files: RunFiles) -> list[str]:
    """Returns what a run achieved, what it left and what to do next.

    A run that ended before its first step has nothing to sum up: no lines.
    """
    record = read_record(files)
    if not record.summary and not record.steps:
        return []
    places = _results(record) + (_left(files, record) if record.summary else _to_go_on(files))
    return [
        "",
        _headline(record),
        "",
        *_held_out(record),
        *_answers(record),
        *render_table(places, indent="  "),
        "",
    ]


def _headline(record: RunRecord) -> str:
    """``24 steps in 0:44: 8,123 tokens, 5,200 of them with loss, 227 tokens/s``."""
    summary, measures = record.summary, measures_of(record)
    if summary:
        line = f"{summary['steps']} steps in {format_seconds(summary['train_s'])}"
        tokens, trained = summary["tokens"], summary["trained_tokens"]
    else:
        last = record.steps[-1]
        line = f"{last['step']} of {last['total_steps']} steps"
        tokens, trained = (
            sum(row.get(name) or 0 for row in record.steps) for name in ("tokens", "trained_tokens")
        )
    line += f": {tokens:,} tokens, {trained:,} of them with loss"
    speed = measures.get("tokens_per_s")
    return f"{line}, {speed:.0f} tokens/s" if speed is not None else line


def _held_out(record: RunRecord) -> Iterator[str]:
    """Yields the held-out losses at the beginning and the end, and the best where that is other."""
    losses: dict[int, float] = {
        row["step"]: row["loss"] for row in record.evals if row.get("loss") is not None
    }
    ends = {"eval_loss_before": 0, "eval_loss_after": record.summary.get("steps", 0)}
    for name, step in ends.items():
        if (loss := record.summary.get(name)) is not None:
            losses.setdefault(step, loss)
    if not losses or max(losses) == 0:
        return
    after = max(losses)
    best = min(losses, key=lambda step: (losses[step], -step))
    steps = [*([0] if 0 in losses else []), *([best] if best not in (0, after) else []), after]
    names = {0: "before", best: f"best, step {best}", after: f"step {after}"}
    if record.summary:
        names[after] = "after"
    table = [
        ("", *(names[step] if step else "before" for step in steps)),
        ("held-out loss", *(f"{losses[step]:.4f}" for step in steps)),
        ("perplexity", *(_perplexity(losses[step]) for step in steps)),
    ]
    yield from render_table(table, indent="  ")
    yield ""


def _answers(record: RunRecord) -> Iterator[str]:
    for sample in record.samples:
        yield f"  {one_line(sample['prompt'])}"
        given = [when for when in ("before", "after") if sample[when] is not None]
        table = [(when, one_line(sample[when])) for when in given]
        yield from render_table(table, indent="    ")
        yield ""


def _results(record: RunRecord) -> list[tuple[str, str]]:
    rows: list[tuple[str, str]] = []
    losses = [row for row in record.steps if row.get("loss") is not None]
    if losses:
        first, last = losses[0], measures_of(record)["train_loss"]
        text = f"{first['loss']:.4f} at step {first['step']}"
        num = min(LAST_STEPS, len(losses))
        if num < len(losses):
            text += f", {last:.4f} over the last {num} logged"
        elif len(losses) > 1:
            text += f", {losses[-1]['loss']:.4f} at step {losses[-1]['step']}"
        rows.append(("training loss", text))
    peaks: list[int] = record.summary.get("peak_memory_bytes") or []
    if peaks:
        text = f"{', '.join(format_bytes(peak) for peak in peaks)} (one number per rank)"
        planned = _planned(record.plan)
        rows.append(("peak memory", f"{text}; {planned}" if planned else text))
    return rows


def _planned(plan: Mapping[str, Any]) -> str:
    """Returns the plan's number for what was measured; on a CPU that is all of the machine."""
    device: Row = plan.get("device") or {}
    if device.get("type") == "cuda":
        return f"planned {format_bytes(device['peak_bytes'])}"
    host: Row = plan.get("host") or {}
    peak = host.get("peak_bytes")
    return f"planned {format_bytes(peak)} for all, launcher included" if peak else ""


def _left(files: RunFiles, record: RunRecord) -> list[tuple[str, str]]:
    exported = Path(record.summary["adapter"])
    prompt = record.samples[0]["prompt"] if record.samples else NO_PROMPT
    generate = f"generate {_shell_word(files.root)} --prompt {_shell_word(prompt)}"
    return [
        (exported.name, str(exported)),
        *([("merged", str(files.merged))] if files.merged.exists() else []),
        ("metrics", str(files.metrics)),
        *([("report", str(files.report_html))] if files.report_html.exists() else []),
        ("try", f"{program_name()} {generate}"),
    ]


def _to_go_on(files: RunFiles) -> list[tuple[str, str]]:
    saved = list_checkpoints(files.checkpoints)
    rows = [("metrics", str(files.metrics)), ("logs", str(files.logs))]
    if saved:
        rows.append(("saved", f"step {step_of(saved[0])}, {saved[0]}"))
        rows.append(("go on", f"{program_name()} resume {_shell_word(files.root)}"))
    return rows


def _perplexity(loss: float) -> str:
    return f"{math.exp(loss):.2f}" if loss < 50 else "inf"


def _shell_word(value: str | Path) -> str:
    return shlex.quote(str(value))
