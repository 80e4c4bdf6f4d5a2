"""Reads back everything that one run left in its directory, finished or not.

Torch-free. What is missing or unreadable is listed in `RunRecord.missing` instead of raised: a
report of a failed run is worth having. Formats: `fsdpq.run_files`.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fsdpq.reports.run_shapes import EVALUATION, NUMBER, fit, fit_row
from fsdpq.run_files.paths import RunFiles
from fsdpq.run_files.rows import PHASES
from fsdpq.run_files.writing import read_json_lines

Row = dict[str, Any]


@dataclass
class RunRecord:
    """What a run directory says, as plain values; non-finite numbers are None.

    Attributes:
        steps: ``step`` rows, one per step, in order.
        evals: ``eval`` rows, one per step, in order.
        memory: ``memory`` rows of rank 0 since the last start, in order.
        held: ``held`` rows of the same.
        plan: content of ``plan.json``, empty where there is none.
        setup: fields of `fsdpq.run_files.rows.SetupSummary`, empty where missing.
        summary: fields of `fsdpq.run_files.rows.RunSummary`, empty where missing.
        samples: ``prompt``, ``before``, ``after``; an answer that is not there is None.
        evaluations: what was evaluated apart from training, oldest first
            (`fsdpq.run_files.evaluation_job.Record`).
        notices: messages of the ranks, and of what sends the run to a tracker.
        export: what was exported and how it was checked, the fields of the last ``export`` row.
        resumes: ``step``, ``world_size`` and ``time`` of every start but the first, in order.
        settings: the resolved recipe.
        environment: the lock file.
        wall_s: seconds that ranks were running, over all starts; None where nothing says.
        error: ``rank``, ``kind``, ``message``, ``hint`` of what ended the run, else None.
        missing: what could not be read, one sentence each.
    """

    steps: list[Row] = field(default_factory=list)
    evals: list[Row] = field(default_factory=list)
    memory: list[Row] = field(default_factory=list)
    held: list[Row] = field(default_factory=list)
    plan: Row = field(default_factory=dict)
    setup: Row = field(default_factory=dict)
    summary: Row = field(default_factory=dict)
    samples: list[Row] = field(default_factory=list)
    evaluations: list[Row] = field(default_factory=list)
    notices: list[str] = field(default_factory=list)
    export: Row = field(default_factory=dict)
    resumes: list[Row] = field(default_factory=list)
    settings: Row = field(default_factory=dict)
    environment: Row = field(default_factory=dict)
    wall_s: float | None = None
    error: Row | None = None
    missing: list[str] = field(default_factory=list)

    @property
    def status(self) -> str:
        """``finished``, ``failed`` or ``unfinished``."""
        if self.summary:
            return "finished"
        return "failed" if self.error else "unfinished"


def read_record(files: RunFiles) -> RunRecord:
    """Returns what the run directory ``files`` holds."""
    record = RunRecord()
    record.settings = _read_mapping(files.resolved, record)
    record.environment = _read_mapping(files.lock, record)
    _read_measured(files, record)
    if files.plan.exists():  # runs of earlier versions have none
        record.plan = _read_mapping(files.plan, record)
    return record


def read_measured(files: RunFiles) -> RunRecord:
    """Returns what the ranks wrote: no recipe, lock and plan, which take longer to read."""
    record = RunRecord()
    _read_measured(files, record)
    return record


def _read_measured(files: RunFiles, record: RunRecord) -> None:
    metrics = _read_rows(files.metrics, record)
    events = _read_rows(files.events, record)
    record.resumes = _list_resumes(events)
    record.wall_s = _time_of_starts(events)
    metrics = without_void(metrics, record.resumes)
    record.steps = _last_of_each_step(metrics, "step")
    record.evals = _last_of_each_step(metrics, "eval")
    since = _since_start(metrics)
    record.memory = [row for row in since if row["event"] == "memory" and _is_whole(row)]
    record.held = [row for row in since if row["event"] == "held"]
    record.setup = _last_event(events, "setup")
    record.summary = _last_event(events, "done")
    record.export = _last_event(events, "export")
    said = [row for row in events if row["event"] in ("notice", "tracking")]
    record.notices = [str(row.get("message", "")) for row in said]
    record.samples = _pair_samples(events)
    record.evaluations = _read_evaluations(files.evals, record)
    if not record.summary:  # a finished run may hold the errors of an earlier attempt
        record.error = _root_cause(files.logs)


def _is_whole(memory: Row) -> bool:
    known = [memory.get(name) is not None for name in ("phase", "bytes", "peak_bytes")]
    return all(known) and memory["bytes"] > 0


def _read_evaluations(folder: Path, record: RunRecord) -> list[Row]:
    """Reads the records of ``fsdpq eval``, oldest first."""
    found = [_read_mapping(path, record) for path in sorted(folder.glob("*.json"))]
    whole = [row for row in found if isinstance(row.get("models"), dict)]
    fitted = [fit(row, EVALUATION, complete=True) for row in whole]
    return sorted(fitted, key=lambda row: str(row["created"]))


def _read_mapping(path: Path, record: RunRecord) -> Row:
    """Reads a YAML or JSON document that should be a mapping."""
    import yaml

    try:
        text = path.read_text(encoding="utf-8")
        content: Any = json.loads(text) if path.suffix == ".json" else yaml.safe_load(text)
    except OSError:
        record.missing.append(f"{path.name} is not there")
        return {}
    except (ValueError, yaml.YAMLError):
        content = None
    if not isinstance(content, dict):
        record.missing.append(f"{path.name} cannot be read")
        return {}
    return _finite(content)


def _read_rows(path: Path, record: RunRecord) -> list[Row]:
    """Reads the rows up to the first line that is not one."""
    rows: list[Any] = []
    if not path.exists():
        record.missing.append(f"{path.name} is not there")
        return []
    try:
        for row in read_json_lines(path):
            rows.append(_finite(row))
    except ValueError:
        record.missing.append(f"{path.name} cannot be read after line {len(rows)}")
    fitted = [fit_row(row) for row in rows]
    if bad := fitted.count(None):
        record.missing.append(f"{path.name} has {bad} rows of nothing that is known")
    return [row for row in fitted if row is not None]


def _finite(value: Any) -> Any:
    """Returns ``value`` with NaN and infinities replaced by None, which JSON has."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_finite(item) for item in value]
    return value


def _list_resumes(events: list[Row]) -> list[Row]:
    found = [row for row in events if row["event"] == "resume" and row.get("step") is not None]
    return [{key: row.get(key) for key in ("step", "world_size", "time")} for row in found]


def _time_of_starts(events: list[Row]) -> float | None:
    """Returns the seconds from the first event of every start to its last, added up."""
    spans: list[tuple[float, float]] = []
    for row in events:
        time = row.get("time")
        if not isinstance(time, int | float):
            continue
        if not spans or (row["event"], row.get("name")) == ("phase", PHASES[0]):
            spans.append((time, time))
        spans[-1] = (spans[-1][0], max(time, spans[-1][1]))
    return math.fsum(end - start for start, end in spans) if spans else None


def without_void(rows: list[Row], resumes: list[Row]) -> list[Row]:
    """Returns the rows that count: not what came after a step that the run went back to later.

    Args:
        rows: of ``metrics.jsonl``, in order.
        resumes: ``step`` and ``time`` of every start that went on from a checkpoint.
    """
    return [row for row in rows if not is_void(row, resumes)]


def is_void(row: Row, resumes: list[Row]) -> bool:
    """Whether the run went back to an earlier step after it wrote a row; see `without_void`."""
    step, time = row.get("step"), row.get("time")
    if step is None or time is None:
        return False
    return any(step > back["step"] and time < (back["time"] or 0) for back in resumes)


def _last_of_each_step(rows: list[Row], event: str) -> list[Row]:
    """A resumed run repeats steps: the last row of a step counts."""
    by_step = {row["step"]: row for row in rows if row["event"] == event and "step" in row}
    return [
        {key: value for key, value in by_step[step].items() if key != "event"}
        for step in sorted(by_step)
    ]


def _since_start(rows: list[Row]) -> list[Row]:
    """A run that starts again measures again: returns what follows its last ``start``."""
    starts = [i for i, row in enumerate(rows) if row.get("phase") == "start"]
    return rows[starts[-1] if starts else 0 :]


def _last_event(events: list[Row], name: str) -> Row:
    found = [row for row in events if row["event"] == name]
    if not found:
        return {}
    return {key: value for key, value in found[-1].items() if key not in ("event", "time")}


def _pair_samples(events: list[Row]) -> list[Row]:
    pairs: dict[str, Row] = {}
    for row in events:
        if row["event"] != "sample" or row.get("when") not in ("before", "after"):
            continue
        prompt = str(row.get("prompt", ""))
        pair = pairs.setdefault(prompt, {"prompt": prompt, "before": None, "after": None})
        pair[row["when"]] = str(row.get("answer", ""))
    return list(pairs.values())


def _root_cause(logs: Path) -> Row | None:
    """The error of the rank that failed first."""
    errors: list[Row] = []
    for path in sorted(logs.glob("rank-*.error.json")):
        try:
            errors.append(dict(json.loads(path.read_text(encoding="utf-8"))))
        except (OSError, ValueError, TypeError):
            errors.append({"rank": path.name.split("-")[1].split(".")[0], "kind": "unreadable"})
    if not errors:
        return None
    first = min(errors, key=lambda error: fit(error.get("time"), NUMBER) or math.inf)
    texts = {key: str(first.get(key, "")) for key in ("kind", "message", "hint")}
    return {"rank": first.get("rank", "")} | texts
