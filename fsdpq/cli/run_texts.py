"""The texts of a run on the screen: its set-up, its steps; sizes and times for people."""

from __future__ import annotations

import os
import shlex
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

from fsdpq.cli.render import render_table
from fsdpq.launch.ranks.torchrun import Row
from fsdpq.run_files.amounts import format_bytes, format_count

MAX_ANSWER = 400


@dataclass(frozen=True)
class _Words:
    """What a kind of adapter calls its parts."""

    weights: str
    frozen: str
    trained: str
    exported: str


_ADAPTER = _Words("adapter weights", "base", "adapter", "adapter")
_WORDS = {
    "llama_pro": _Words("weights of new layers", "frozen", "trained", "model"),
    "none": _Words("weights, all of the model", "frozen", "trained", "model"),
}


def words_of(setup: Row) -> _Words:
    """The words for what the row of the set-up trains."""
    return _WORDS.get(setup.get("adapter_kind", ""), _ADAPTER)


def setup_lines(row: Row) -> list[str]:
    """Returns the block that says what is being run."""
    share = 100 * row["num_trainable"] / max(1, row["num_parameters"])
    quantized = 100 * row["num_quantized"] / max(1, row["num_parameters"])
    ranks = f"{row['world_size']} x {row['device']}, {row['dtype']}"
    frozen, trained = max(row["base_bytes_per_rank"]), max(row["adapter_bytes_per_rank"])
    words = words_of(row)
    per_rank = f"{words.frozen} {format_bytes(frozen)}, {words.trained} {format_bytes(trained)}"
    rows = [
        ("model", f"{row['model']}, {format_count(row['num_parameters'])} parameters"),
        ("quantized", f"{format_count(row['num_quantized'])} of them ({quantized:.1f} %)"),
        ("trained", f"{format_count(row['num_trainable'])} {words.weights} ({share:.2f} %)"),
        ("ranks", f"{ranks}, {row['num_groups']} FSDP groups"),
        ("per rank", per_rank),
        ("rows", f"{row['num_train_rows']} to train on, {row['num_eval_rows']} held out"),
        ("steps", f"{row['total_steps']}"),
    ]
    return list(render_table(rows, indent="  "))


def step_text(row: Row) -> str:
    """Returns loss, learning rate, speed and memory of one step."""
    return "  ".join(step_parts(row))


def step_parts(row: Row) -> tuple[str, str, str, str]:
    """Returns the same as four texts."""
    return (
        f"loss {row['loss']:.4f}",
        f"lr {row['lr']:.2e}",
        f"{row['tokens_per_s']:.0f} tokens/s",
        format_bytes(row["memory_bytes"]),
    )


def resume_text(row: Row) -> str:
    """Returns from where the ranks go on; without a checkpoint they start again."""
    if row.get("directory") is None:
        return "there is no checkpoint yet: starting at the first step"
    saved_by = row.get("world_size")
    who = f", saved by {saved_by} rank{'' if saved_by == 1 else 's'}" if saved_by else ""
    return f"going on from step {row['step']} ({Path(str(row['directory'])).name}{who})"


def checkpoint_text(row: Row) -> str:
    """Returns what one checkpoint took."""
    name, size = Path(str(row["directory"])).name, format_bytes(row["num_bytes"])
    return f"checkpoint {name}: {size} in {row['seconds']:.1f} s"


def export_text(row: Row) -> str:
    """Returns what was written, and whether stock libraries compute the same with it."""
    wrote = f"wrote {format_bytes(row['num_bytes'])} in {format_seconds(row['seconds'])}"
    if not row["verified"]:
        return f"{wrote}, not checked (`export.verify: false`)"
    difference = f"{row['max_difference']:.1e} of the largest"
    return f"{wrote}, checked with stock libraries: logits differ by {difference}"


def stopped_text(row: Row) -> str:
    """Returns where the ranks ended because they were asked to."""
    if row.get("directory") is None:
        return f"ended after step {row['step']}: nothing could be saved"
    return f"ended after step {row['step']}, saved in {Path(str(row['directory'])).name}"


def format_seconds(seconds: float) -> str:
    """Returns a duration as ``1:23`` or ``1:02:03``."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def one_line(text: str) -> str:
    """Returns ``text`` on one line, shortened."""
    text = " ".join(text.split())
    return text if len(text) <= MAX_ANSWER else text[: MAX_ANSWER - 3] + "..."


def program_name() -> str:
    """Returns what starts fsdpq in this shell: ``fsdpq`` where it is on the path, or as started."""
    started = Path(sys.argv[0])
    if started.name != "fsdpq" or shutil.which("fsdpq") == str(started.absolute()):
        return "fsdpq"
    return _shell_word(os.path.relpath(started))


def _shell_word(value: str | Path) -> str:
    return shlex.quote(str(value))
