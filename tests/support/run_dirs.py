"""Run directories as the ranks leave them, made up: for reports and their pages."""

from __future__ import annotations

import json
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

from fsdpq.rows.report import DataReport, SourceCounts
from fsdpq.run_files.paths import RunFiles
from fsdpq.run_files.writing import append_json_line

HOSTILE = "</div><script>alert('x')</script><img src=http://evil.example/x.png>"


def write_run(
    root: Path,
    *,
    num_steps: int = 4,
    num_evals: int = 2,
    done: bool = True,
    text: str = "plain",
    settings: dict[str, Any] | None = None,
    lock: dict[str, Any] | None = None,
    loss: float = 3.25,
) -> RunFiles:
    """Writes a run of 4 steps on 2 ranks.

    Args:
        root: its directory.
        num_steps: that it came to.
        num_evals: held-out losses that it measured.
        done: whether it finished.
        text: stands wherever a run holds text of its user.
        settings: more of the recipe.
        lock: more of the lock.
        loss: of the first step; step n has the n-th part.
    """
    files = RunFiles(root)
    root.mkdir(parents=True, exist_ok=True)
    recipe = {"name": "demo", "description": text, "model": {"name_or_path": text}}
    files.resolved.write_text(json.dumps(recipe | (settings or {})))
    files.lock.write_text(
        json.dumps({"packages": {"torch": "2.13.0"}, "note": text} | (lock or {}))
    )
    files.metrics.touch()
    for step in range(1, num_steps + 1):
        row = {"event": "step", "step": step, "total_steps": 4, "loss": loss / step, "lr": 1e-4}
        row |= {"grad_norm": 1.5, "tokens": 100 * step, "tokens_per_s": 300.0 + step, "time": 1.0}
        append_json_line(files.metrics, row)
    for index in range(num_evals):
        row = {"event": "eval", "step": 4 * index, "loss": 2.5 - index, "time": 1.0}
        append_json_line(files.metrics, row)
    setup = {"event": "setup", "model": text, "num_parameters": 134_515_008, "time": 1.0}
    setup |= {"num_trainable": 4_884_480, "world_size": 2, "device": text, "dtype": "fp32"}
    setup |= {"base_bytes_per_rank": [80 * 2**20, 79 * 2**20], "total_steps": 4}
    setup |= {"adapter_bytes_per_rank": [9 * 2**20, 9 * 2**20]}
    append_json_line(files.events, setup)
    append_json_line(files.events, {"event": "notice", "message": text})
    for when in ("before", "after"):
        sample = {"event": "sample", "when": when, "prompt": text, "answer": f"{when} {text}"}
        append_json_line(files.events, sample)
    if done:
        exported = {"event": "export", "directory": f"runs/{text}", "num_bytes": 3 * 2**20}
        append_json_line(files.events, exported | {"verified": True, "max_difference": 3.3e-07})
        summary = {"event": "done", "steps": 4, "train_s": 125.0, "tokens": 25_000}
        summary |= {"trained_tokens": 12_345, "eval_loss_before": 2.5, "eval_loss_after": 1.5}
        summary |= {"peak_memory_bytes": [3 * 2**30, 2 * 2**30], "adapter": "adapter"}
        append_json_line(files.events, summary)
    return files


def write_full_run(root: Path, **options: Any) -> RunFiles:
    """Writes a run that has everything: phases, a plan, rows, evaluations, resumes, provenance."""
    settings = {"adapter": {"kind": "lora", "rank": 8}, "training": {"steps": 4, "seed": 1}}
    rows = SourceCounts("rows.jsonl", num_rows=10, num_tokens=900, num_trained=400, num_used=9)
    report = DataReport(
        seq_len=64, sources=(rows,), eval=None, num_train_rows=9, num_sequences=9, num_held_out=1,
        num_held_out_sequences=1, num_tokens=900, num_trained=400, fill=None, lengths={"0": 5},
    ).as_json()  # fmt: skip
    lock: dict[str, Any] = {
        "fsdpq": "0.1.0", "python": "3.11.7", "hardware": {"cpu": "A CPU", "gpus": []},
        "git": {"commit": "0123456789abcdef"}, "inputs": {"prepared": {"report": report}},
        "provenance": {"adapter.rank": "command line: adapter.rank=8", "name": "demo.yaml:1:7"},
    }  # fmt: skip
    options = {"settings": settings, "lock": lock} | options
    files = write_run(root, **options)
    mib = 2**20
    for phase, size in (("start", 100), ("load", 160), ("forward", 280), ("backward", 190)):
        row = {"event": "memory", "phase": phase, "bytes": size * mib, "peak_bytes": 300 * mib}
        append_json_line(files.metrics, row)
    moments = [{"phase": "forward", "name": "f", "allocated_bytes": 250 * mib, "bytes": 260 * mib}]
    plan: dict[str, Any] = {"device": {"type": "cuda", "moments": moments}}
    plan["device"]["moments"][0]["parts"] = {"context": 10 * mib}
    plan |= {"host": {"peak_bytes": 2**30}, "workload": {"rows": 1, "seq_len": 64}}
    files.plan.write_text(json.dumps(plan))
    append_json_line(files.metrics, {"event": "held", "device": {}, "tokens": 64})
    resume = {"event": "resume", "step": 2, "world_size": 2, "time": 0.5}
    append_json_line(files.events, resume)
    result = {"loss": 2.5, "perplexity": 12.2, "tasks": {"piqa": {"acc,none": 0.5}}}
    record = {"name": "held-out", "created": "2026-11-27", "step": 4, "data": [{"name": "rows"}]}
    record |= {"world_size": 2, "device": "cpu", "dtype": "bf16", "models": {"base": result}}
    files.evals.mkdir()
    (files.evals / "one.json").write_text(json.dumps(record))
    return files


def fail_run(files: RunFiles, *, rank: int = 1) -> None:
    """Ends a run that has not finished by an error of a rank."""
    files.logs.mkdir()
    error = {"rank": rank, "kind": "TrainingError", "message": "the loss is NaN" * 20, "time": 8.0}
    files.rank_error(rank).write_text(json.dumps({**error, "hint": "lower the lr"}))


class Tags(HTMLParser):
    """Collects tags, attributes and text of a page, and checks that tags close."""

    def __init__(self, html: str):
        super().__init__()
        self.found: list[tuple[str, dict]] = []
        self.text = ""
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.text += data
