"""What the files of a run should hold, and what is made of anything else in them.

A run directory may be damaged, of another version, or a stranger's: a number that is none counts as
missing, a list or mapping that is none as empty. Keys that no page reads are left as they are.
"""

from __future__ import annotations

from typing import Any

NUMBER, TEXT = "number", "text"

ANY_KEY = "*"
"""In a mapping: the shape of all its values, whatever their keys."""

LARGEST = 1e30
"""More than anything in a run: a larger number is none."""

Shape = Any
"""`NUMBER`, `TEXT`, a list of one shape, or a mapping of keys to shapes."""

STEP: Shape = dict.fromkeys(
    ("step", "total_steps", "loss", "lr", "grad_norm", "tokens", "trained_tokens", "tokens_per_s",
     "aux_loss", "loss_scale", "time"), NUMBER
)  # fmt: skip
EVAL: Shape = {"step": NUMBER, "loss": NUMBER, "time": NUMBER}
MEMORY: Shape = {
    "phase": TEXT, "bytes": NUMBER, "peak_bytes": NUMBER, "reserved_bytes": NUMBER,
    "anonymous_bytes": NUMBER, "step": NUMBER, "time": NUMBER,
}  # fmt: skip
HELD: Shape = {"tokens": NUMBER, "device": {ANY_KEY: NUMBER}, "host": {ANY_KEY: NUMBER}}
SETUP: Shape = {
    "num_parameters": NUMBER, "num_trainable": NUMBER, "world_size": NUMBER, "total_steps": NUMBER,
    "base_bytes_per_rank": [NUMBER], "adapter_bytes_per_rank": [NUMBER], "model": TEXT,
    "device": TEXT, "dtype": TEXT,
}  # fmt: skip
SUMMARY: Shape = {
    "steps": NUMBER, "train_s": NUMBER, "tokens": NUMBER, "trained_tokens": NUMBER,
    "eval_loss_before": NUMBER, "eval_loss_after": NUMBER, "peak_memory_bytes": [NUMBER],
    "peak_host_bytes": [NUMBER],
}  # fmt: skip
EXPORT: Shape = {"directory": TEXT, "num_bytes": NUMBER, "max_difference": NUMBER}
RESUME: Shape = {"step": NUMBER, "world_size": NUMBER, "time": NUMBER}
EVALUATION: Shape = {
    "name": TEXT, "created": TEXT, "step": NUMBER, "world_size": NUMBER, "device": TEXT,
    "dtype": TEXT, "data": [{"name": TEXT}],
    "models": {
        ANY_KEY: {"loss": NUMBER, "perplexity": NUMBER, "tasks": {ANY_KEY: {ANY_KEY: NUMBER}}}
    },
}  # fmt: skip
DATA: Shape = {
    "seq_len": NUMBER, "num_sequences": NUMBER, "num_tokens": NUMBER, "num_trained": NUMBER,
    "fill": NUMBER, "lengths": {ANY_KEY: NUMBER},
}  # fmt: skip
ROWS: dict[str, Shape] = {
    "step": STEP, "eval": EVAL, "memory": MEMORY, "held": HELD, "setup": SETUP, "done": SUMMARY,
    "export": EXPORT, "resume": RESUME,
}  # fmt: skip
"""Rows of ``metrics.jsonl`` and ``events.jsonl``, by their event; others have a time at most."""

SOURCE_COUNTS = (
    "num_rows", "num_bad", "num_cut", "num_too_long", "num_untrained", "num_tokens", "num_trained",
    "num_held_out", "num_used",
)  # fmt: skip


def fit(value: Any, shape: Shape, *, complete: bool = False) -> Any:
    """Returns ``value`` with everything that is not of ``shape`` replaced, see above.

    Args:
        value: JSON data.
        shape: what it should be.
        complete: keys of the shape that are not there are added.
    """
    if shape == NUMBER:
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        return value if is_number and abs(value) < LARGEST else None
    if shape == TEXT:
        return value if isinstance(value, str) else None
    if isinstance(shape, list):
        items = value if isinstance(value, list) else []
        fitted = [fit(item, shape[0], complete=complete) for item in items]
        return [] if shape[0] == NUMBER and None in fitted else fitted
    found: dict[str, Any] = dict(value) if isinstance(value, dict) else {}
    keys = dict.fromkeys(found, shape[ANY_KEY]) if ANY_KEY in shape else shape
    wanted = {key: inner for key, inner in keys.items() if complete or key in found}
    return found | {
        key: fit(found.get(key), inner, complete=complete) for key, inner in wanted.items()
    }


def fit_row(row: Any) -> dict[str, Any] | None:
    """Returns a row of ``metrics.jsonl`` or ``events.jsonl``, None where it is none."""
    event = row.get("event") if isinstance(row, dict) else None
    if not isinstance(event, str):
        return None
    fitted = fit(row, ROWS.get(event, {"time": NUMBER}))
    if event in ("step", "eval") and fitted.get("step") is None:
        return None
    return fitted


def fit_data(report: dict[str, Any]) -> dict[str, Any] | None:
    """Returns the counts of `fsdpq.rows.report.DataReport`, None where they cannot be shown."""
    fitted = fit(report, DATA, complete=True)
    sources = [*fitted["sources"], *([fitted["eval"]] if fitted["eval"] else [])]
    counts = [fit(source.get(name), NUMBER) for source in sources for name in SOURCE_COUNTS]
    return None if None in counts else fitted
