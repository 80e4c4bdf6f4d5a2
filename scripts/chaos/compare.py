"""What came out of a disturbed run beside what came out of the same run in peace."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

from fsdpq.run_files.paths import RunFiles
from fsdpq.run_files.writing import read_json_lines

TOLERANCE = 1e-5
"""Of losses, where a run went on with another number of ranks: sums have another order then."""

SUMS = ("tokens", "trained_tokens")


def losses_of(files: RunFiles) -> dict[tuple[str, int], tuple[float, ...]]:
    """Returns every logged loss, its gradient norm and learning rate; the last row of a step."""
    found: dict[tuple[str, int], tuple[float, ...]] = {}
    for row in read_json_lines(files.metrics):
        if row["event"] == "step":
            numbers = (row["loss"], row["lr"], row["grad_norm"] or 0.0, float(row["tokens"]))
            found["step", row["step"]] = numbers
        elif row["event"] == "eval":
            found["eval", row["step"]] = (row["loss"],)
    return found


def compare(
    peaceful: RunFiles, disturbed: RunFiles, *, same_world: bool
) -> tuple[float, list[str]]:
    """Returns the largest difference of two runs' losses, and what is not as it must be.

    Args:
        peaceful: the undisturbed run.
        disturbed: the other one.
        same_world: it always had the same number of ranks: every bit must be the same.
    """
    then, now = losses_of(peaceful), losses_of(disturbed)
    problems = [f"no loss of {key[0]} {key[1]}" for key in then if key not in now]
    problems += [f"a loss of {key[0]} {key[1]} too many" for key in now if key not in then]
    both = [key for key in then if key in now]
    largest = max((abs(then[key][0] - now[key][0]) for key in both), default=float("nan"))
    if same_world:
        problems += [f"other numbers in {key[0]} {key[1]}" for key in both if then[key] != now[key]]
        problems += list(_other_bytes(peaceful, disturbed))
    elif largest > TOLERANCE:
        problems.append(f"losses differ by {largest:.1e}")
    done = [_done(files) for files in (peaceful, disturbed)]
    problems += [
        f"`{name}` is {done[1].get(name)} instead of {done[0].get(name)}"
        for name in SUMS
        if done[0].get(name) != done[1].get(name)
    ]
    return largest, problems


def _other_bytes(peaceful: RunFiles, disturbed: RunFiles) -> Iterator[str]:
    """Yields the exported files that are not the same, byte for byte."""
    for name in ("adapter", "model", "delta"):
        then, now = peaceful.root / name, disturbed.root / name
        files = {path.relative_to(then) for path in _weights(then)}
        others = {path.relative_to(now) for path in _weights(now)}
        yield from (f"{name}/{path} is not in both" for path in sorted(files ^ others))
        for path in sorted(files & others):
            if (then / path).read_bytes() != (now / path).read_bytes():
                yield f"{name}/{path} has other bytes"


def _weights(directory: Path) -> Iterator[Path]:
    for ending in ("*.safetensors", "*.json"):
        yield from directory.rglob(ending)


def _done(files: RunFiles) -> dict[str, object]:
    rows = [row for row in read_json_lines(files.events) if row["event"] == "done"]
    return json.loads(json.dumps(rows[-1])) if rows else {}
