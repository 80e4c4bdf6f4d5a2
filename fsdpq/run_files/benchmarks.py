"""The benchmarks of ``fsdpq bench``, one row each, and what a worker is to measure.

The launcher writes a `BenchJob`, a worker runs the row's function and writes a result
(`fsdpq.run_files.bench_record`). Functions are named by a string, so that reading the table imports
nothing heavy.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeAlias

from fsdpq.errors import UsageError
from fsdpq.run_files.writing import write_whole

Setting: TypeAlias = int | str
Settings: TypeAlias = Mapping[str, Setting]


@dataclass(frozen=True)
class Benchmark:
    """One benchmark.

    Attributes:
        name: on the command line and in the record.
        summary: what it measures.
        function: ``package.module:name`` of what the worker calls with the job.
        minutes: how long it takes about on two cores, and how long with ``--quick``.
        settings: sizes and counts; lists are texts, separated by blanks.
        on_gpu: those that differ on a GPU.
        quick: those that differ with ``--quick``.
        reference: what ``--compare transformers`` runs beside it; empty where there is nothing.
        requires: importable packages that the reference needs beyond those of fsdpq.
        tokenizer: whether the worker needs a tokenizer from the network, once.
    """

    name: str
    summary: str
    function: str
    minutes: tuple[float, float]
    settings: Settings
    on_gpu: Settings = field(default_factory=dict[str, Setting])
    quick: Settings = field(default_factory=dict[str, Setting])
    reference: str = ""
    requires: tuple[str, ...] = ()
    tokenizer: bool = False

    def settings_for(self, device: str, *, quick: bool) -> dict[str, Setting]:
        """Returns the settings on ``device``, ``cpu`` or ``cuda``."""
        found = dict(self.settings)
        if device == "cuda":
            found.update(self.on_gpu)
        if quick:
            found.update(self.quick)
        return found


BENCHMARKS: tuple[Benchmark, ...] = (
    Benchmark(
        "load", "a bf16 checkpoint of 1.1 billion weights becomes NF4: time, memory, bytes read",
        "fsdpq.worker.bench.load:measure_load", (4, 1),
        {"shape": "1b", "layers": 0, "ranks": "1 2 4", "repeats": 1},
        on_gpu={"ranks": "1", "repeats": 3},
        quick={"layers": 3, "ranks": "1 2"},
        reference="transformers + bitsandbytes", requires=("bitsandbytes",),
    ),
    Benchmark(
        "step", "a training step over NF4 with LoRA: tokens a second, share of the matmul rate",
        "fsdpq.worker.bench.step:measure_step", (7, 1),
        {
            "shape": "200m", "layers": 0, "batches": "1x512 2x2048", "rounds": 5,
            "dtypes": "bf16 fp32", "lora_rank": 16,
        },
        on_gpu={"shape": "7b", "batches": "1x2048 4x2048", "dtypes": "bf16", "lora_rank": 64},
        quick={"layers": 2, "batches": "1x256", "rounds": 3},
        reference="transformers + PEFT + bitsandbytes", requires=("peft", "bitsandbytes"),
    ),
    Benchmark(
        "memory", "the memory of a step by phase, length, method and strategy",
        "fsdpq.worker.bench.memory:measure_memory", (6, 1),
        {"shape": "56m", "lengths": "512 1024 2048 4096", "setups": "all"},
        on_gpu={"shape": "1b", "setups": "all of one rank"},
        quick={"lengths": "256 512 768 1024", "setups": "lora; dora"},
        reference="transformers + PEFT + bitsandbytes", requires=("peft", "bitsandbytes"),
    ),
    Benchmark(
        "data", "preparing rows: checked, tokenized, packed, written; rows a second, memory",
        "fsdpq.worker.bench.data:measure_data", (3, 1),
        {"rows": 20_000, "repeats": 3, "kinds": "alpaca chat"},
        quick={"rows": 2_000, "repeats": 2},
        reference="datasets + TRL", requires=("trl",), tokenizer=True,
    ),
    Benchmark(
        "cli", "how long commands take that load no model, beside an empty Python",
        "fsdpq.worker.bench.cli_start:measure_cli", (1, 0.3),
        {"runs": 15}, quick={"runs": 5},
        reference="`import transformers`", requires=("transformers",),
    ),
)  # fmt: skip


def find_benchmark(name: str) -> Benchmark:
    """Returns the benchmark of that name.

    Raises:
        UsageError: there is none.
    """
    for benchmark in BENCHMARKS:
        if benchmark.name == name:
            return benchmark
    names = ", ".join(f"`{benchmark.name}`" for benchmark in BENCHMARKS)
    raise UsageError(f"there is no benchmark `{name}`", hint=f"there are {names}")


def change_setting(settings: dict[str, Setting], name: str, key: str, text: str) -> None:
    """Sets one setting of the benchmark ``name``, in place.

    Raises:
        UsageError: there is no such setting, or ``text`` is no whole number where one is needed.
    """
    if key not in settings:
        names = ", ".join(f"`{known}`" for known in settings)
        raise UsageError(f"`{name}` has no setting `{key}`", hint=f"it has {names}")
    if isinstance(settings[key], str):
        settings[key] = text
    elif text.isdecimal():
        settings[key] = int(text)
    else:
        hint = f"for example `{name}.{key}={settings[key]}`"
        raise UsageError(f"`{name}.{key}={text}` is no whole number", hint=hint)


@dataclass(frozen=True)
class BenchJob:
    """What one worker measures.

    Attributes:
        device: ``cpu`` or ``cuda``.
        compare: run the reference beside.
        threads: of torch, all processes that compute at one moment together.
        directory: empty, for files that it makes up; removed by the launcher.
        settings: of the benchmark.
        tokenizer: directory of one, empty where none is needed.
    """

    device: str
    compare: bool
    threads: int
    directory: Path
    settings: Settings
    tokenizer: str = ""

    def number(self, key: str) -> int:
        """Returns a setting that is a whole number."""
        return int(self.settings[key])

    def text(self, key: str) -> str:
        """Returns a setting that is a text."""
        return str(self.settings[key])

    def words(self, key: str) -> list[str]:
        """Returns a setting that is a list of texts."""
        return str(self.settings[key]).split()

    def write(self, path: Path) -> None:
        """Writes it for the worker."""
        write_whole(path, json.dumps(dataclasses.asdict(self), default=str).encode())

    @classmethod
    def read(cls, path: Path) -> BenchJob:
        """Returns what `write` wrote."""
        fields = json.loads(path.read_text(encoding="utf-8"))
        fields["directory"] = Path(fields["directory"])
        return cls(**fields)
