"""The flow of ``fsdpq bench``: a worker for each benchmark, then tables, ``bench.json``, pictures.

The record is written anew after every benchmark: one that fails or is stopped takes nothing away
from those before it.
"""

from __future__ import annotations

import json
import platform
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any

import fsdpq
from fsdpq.errors import EnvironmentProblemError, MissingDependencyError, UsageError
from fsdpq.fetch.tokenizer import fetch_tokenizer
from fsdpq.launch.machine.devices import count_cores, list_gpus
from fsdpq.launch.machine.hardware import describe_hardware
from fsdpq.launch.ranks.single_worker import WorkerFiles, run_single_worker
from fsdpq.launch.runs.lock_file import hash_code
from fsdpq.registry import is_installed
from fsdpq.run_files.bench_record import FORMAT, BenchResult
from fsdpq.run_files.benchmarks import (
    BENCHMARKS,
    BenchJob,
    Benchmark,
    Setting,
    change_setting,
    find_benchmark,
)
from fsdpq.run_files.writing import write_whole

WORKER = ("-m", "fsdpq.worker", "bench")
TOKENIZER = "pypi:smollm2-135m-instruct"
RECORD_NAME = "bench.json"
RUNS = Path("runs")
PACKAGES = (
    "torch", "transformers", "peft", "bitsandbytes", "hqq", "trl", "datasets", "tokenizers",
    "accelerate", "safetensors", "numpy", "triton",
)  # fmt: skip

Report = Callable[[str], None]


@dataclass(frozen=True)
class BenchOptions:
    """What the user asks for.

    Attributes:
        names: of benchmarks; none are all.
        device: ``cpu`` or ``cuda``; None is ``cuda`` where there is a GPU.
        compare: run the reference beside.
        quick: smaller sizes, fewer repeats.
        changes: of settings, ``step.rounds=3``.
        out: directory of the record; None makes one in ``runs/``.
    """

    names: Sequence[str] = ()
    device: str | None = None
    compare: bool = False
    quick: bool = False
    changes: Sequence[str] = ()
    out: Path | None = None

    def as_command(self) -> str:
        """Returns the command line that asks for the same."""
        words = ["fsdpq", "bench", *self.names]
        words += ["--compare", "transformers"] if self.compare else []
        words += ["--device", self.device] if self.device else []
        words += ["--quick"] if self.quick else []
        words += [f"--set '{change}'" for change in self.changes]
        return " ".join(words)


@dataclass(frozen=True)
class Chosen:
    """A benchmark that will run.

    Attributes:
        benchmark: its row.
        settings: as they are for this device and these options.
    """

    benchmark: Benchmark
    settings: Mapping[str, Setting]


def run_benchmarks(
    options: BenchOptions,
    *,
    report: Report,
    on_result: Callable[[str, BenchResult], None],
    worker: Sequence[str] = WORKER,
) -> tuple[Path, dict[str, Any]]:
    """Runs the benchmarks and returns the directory of the record, and the record.

    Args:
        options: what the user asks for.
        report: told one short line per thing done.
        on_result: told the result of each as it comes.
        worker: arguments of Python that name the worker.

    Raises:
        UsageError: there is no such benchmark or setting, or the directory has a record already.
        MissingDependencyError: the reference needs packages that are not installed.
        FsdpqError: a worker failed; the record holds what was done before.
    """
    gpus = list_gpus()
    device = choose_device(options.device, gpus)
    chosen = choose_benchmarks(options, device)
    tokenizer = _fetch_tokenizer(chosen, report)
    out = make_directory(options.out)
    record = describe_machine(options, device, gpus)
    for entry in chosen:
        name, minutes = entry.benchmark.name, entry.benchmark.minutes[options.quick]
        report(f"{name}: {entry.benchmark.summary} (about {minutes:g} min on two cores)")
        started = time.monotonic()
        with tempfile.TemporaryDirectory(prefix="made-up-", dir=out) as made_up:
            job = BenchJob(
                device, options.compare, count_cores(), Path(made_up), entry.settings,
                tokenizer if entry.benchmark.tokenizer else "",
            )  # fmt: skip
            content = _run_worker(name, job, out, report, worker)
        seconds = round(time.monotonic() - started, 1)
        record["benchmarks"][name] = {
            "settings": dict(entry.settings), "seconds": seconds, **content,
        }  # fmt: skip
        write_whole(out / RECORD_NAME, (json.dumps(record, indent=1) + "\n").encode())
        on_result(name, BenchResult.from_json(content))
    return out, record


def choose_device(device: str | None, gpus: Sequence[str]) -> str:
    """Returns what is measured.

    Raises:
        EnvironmentProblemError: GPUs are asked for and there is none.
    """
    if device == "cuda" and not gpus:
        message = "`--device cuda`: this machine shows no GPU"
        raise EnvironmentProblemError(message, hint="`nvidia-smi -L` must list it")
    return device or ("cuda" if gpus else "cpu")


def choose_benchmarks(options: BenchOptions, device: str) -> list[Chosen]:
    """Returns the benchmarks in the order of the table, with their settings.

    Raises:
        UsageError: there is no such benchmark or setting.
        MissingDependencyError: the reference needs packages that are not installed.
    """
    names = {find_benchmark(name).name for name in options.names}
    rows = [row for row in BENCHMARKS if row.name in names or not names]
    settings = {row.name: row.settings_for(device, quick=options.quick) for row in rows}
    for change in options.changes:
        path, equals, text = change.partition("=")
        name, dot, key = path.partition(".")
        if not equals or not dot:
            raise UsageError(f"`--set {change}`", hint="give NAME.KEY=VALUE: `step.rounds=3`")
        if find_benchmark(name).name not in settings:
            raise UsageError(f"`--set {change}`: `{name}` is not measured", hint="name it too")
        change_setting(settings[name], name, key, text)
    if options.compare:
        check_reference(rows)
    return [Chosen(row, settings[row.name]) for row in rows]


def check_reference(rows: Sequence[Benchmark]) -> None:
    """Checks that what is compared with is installed.

    Raises:
        MissingDependencyError: names all that is missing, and for which benchmark.
    """
    missing = {
        package: row.name for row in rows for package in row.requires if not is_installed(package)
    }
    if missing:
        needs = ", ".join(f"`{name}` needs `{package}`" for package, name in missing.items())
        hint = f"pip install {' '.join(missing)}; or name other benchmarks"
        raise MissingDependencyError(f"`--compare`: packages are not installed: {needs}", hint)


def make_directory(out: Path | None) -> Path:
    """Returns the directory of the record, made where it is not there.

    Raises:
        UsageError: it holds a record already.
        EnvironmentProblemError: it cannot be made.
    """
    if out is None:
        stem = f"bench-{datetime.now():%Y%m%d-%H%M%S}"  # the user's own time
        out = next(
            p for n in range(1000) if not (p := RUNS / f"{stem}{f'-{n}' * (n > 0)}").exists()
        )
    elif (out / RECORD_NAME).exists():
        raise UsageError(f"`{out}` holds a record already", hint="give another `--out`")
    try:
        (out / "logs").mkdir(parents=True, exist_ok=True)
    except OSError as error:
        message = f"`{out}` cannot be made: {error.strerror}"
        raise EnvironmentProblemError(message, hint="give another `--out`") from None
    return out


def describe_machine(options: BenchOptions, device: str, gpus: Sequence[str]) -> dict[str, Any]:
    """Returns the record without any benchmark."""
    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        if is_installed(package):
            versions[package] = metadata.version(package)
    return {
        "format": FORMAT,
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": options.as_command(),
        "device": device,
        "quick": options.quick,
        "compare": "transformers" if options.compare else None,
        "fsdpq": fsdpq.__version__,
        "fsdpq_sha256": hash_code(),
        "versions": versions,
        "platform": platform.platform(),
        "hardware": describe_hardware(gpus),
        "benchmarks": {},
    }


def _run_worker(
    name: str, job: BenchJob, out: Path, report: Report, worker: Sequence[str]
) -> dict[str, Any]:
    job_file, result = job.directory / "job.json", job.directory / "result.json"
    job.write(job_file)
    logs = out / "logs"
    files = WorkerFiles(job.directory / "out", logs / f"{name}.log", job.directory / "error.json")
    arguments = [*worker, name, str(job_file), f"--out={result}", f"--error={files.error}"]
    run_single_worker(arguments, files, on_line=_Progress(report).take)
    return json.loads(result.read_text(encoding="utf-8"))


class _Progress:
    """Says what a worker does, once."""

    def __init__(self, report: Report) -> None:
        self._report = report
        self._last = ""

    def take(self, line: str) -> None:
        """Takes a line of JSON with ``text``."""
        if line != self._last:
            self._last = line
            self._report(f"  {json.loads(line)['text']}")


def _fetch_tokenizer(chosen: Sequence[Chosen], report: Report) -> str:
    if not any(entry.benchmark.tokenizer for entry in chosen):
        return ""
    found = fetch_tokenizer(TOKENIZER, revision=None, base_dir=Path(), report=report)
    return str(found.absolute())
