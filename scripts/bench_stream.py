"""Measures streaming: memory that does not grow with the rows, time to the first step, cost.

    make bench-stream                     # 20,000 and 200,000 rows
    make bench-stream BENCH="--rows 20000 --step-ms 0"

The rows and their tokenizer are those of ``fsdpq bench data``, kind ``alpaca``. One rank
reads one epoch through the loader that training uses, in a process of its own, and takes a step of
16 sequences of 2048 tokens every ``--step-ms``, so that the stream is ahead as far as it may be.
Memory is the process's anonymous memory less what it was before the stream was opened.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

from fsdpq.fetch.tokenizer import fetch_tokenizer
from fsdpq.launch.bench import TOKENIZER
from fsdpq.worker.bench.made_up_rows import make_model, make_rows

SEQ_LEN = 2048
WINDOW = 10_000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("--rows", type=int, nargs="+", default=[20_000, 200_000])
    parser.add_argument("--step-ms", type=float, default=300.0, help="a step takes so long")
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    parsed = parser.parse_args()
    if parsed.child:
        stream_epoch(parsed.child, parsed.rows[0], parsed.step_ms / 1000)
        return
    with tempfile.TemporaryDirectory(prefix="bench-stream-") as folder:
        directory = Path(folder)
        source = fetch_tokenizer(TOKENIZER, revision=None, base_dir=Path(), report=print)
        make_model(directory / "model", source, chat=False)
        for count in parsed.rows:
            make_rows(directory / "rows.jsonl", "alpaca", count, directory / "model/tokenizer.json")
            command = [sys.executable, __file__, "--child", folder, "--rows", str(count)]
            subprocess.run([*command, "--step-ms", str(parsed.step_ms)], check=True)


def stream_epoch(folder: Path, num_rows: int, step_s: float) -> None:
    """Prints what one epoch costs."""
    from transformers import AutoTokenizer

    from fsdpq.data.dealing.loader import Deal, Loader
    from fsdpq.data.dealing.stream import RowStream
    from fsdpq.recipe.sections.data import DataOptions
    from fsdpq.rows.source import RowSource, SourceFile

    document = {
        "path": "rows.jsonl", "format": "prompt_completion", "seq_len": SEQ_LEN,
        "packing": "best_fit", "streaming": True, "stream_window": WINDOW,
    }  # fmt: skip
    options = DataOptions.model_validate(document)
    files = (SourceFile(folder / "rows.jsonl", "measured"),)
    source = RowSource("rows", files, "prompt_completion", num_rows)
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    before, peak = anonymous_bytes(), Peak()
    started, cpu = time.monotonic(), time.process_time()
    stream = RowStream([source], options, tokenizer, seed=0)
    waited = 0.0
    with peak, Loader(stream, Deal(16, 4, 0, 1)) as loader:
        loader.start()
        first_s = time.monotonic() - started
        while loader.state_dict()["position"]["epoch"] == 1:
            asked = time.monotonic()
            next(loader)
            waited += time.monotonic() - asked
            time.sleep(step_s)
        steps = loader.state_dict()["steps"]
        cpu_s, wall_s = time.process_time() - cpu, time.monotonic() - started
    counts = stream.counts
    print(
        f"{num_rows:,} rows, {steps} steps: {(peak.num_bytes - before) / 2**20:.0f} MiB more at "
        f"most (whole process {peak.num_bytes / 2**20:.0f}), first step after {first_s:.1f} s, "
        f"waited {waited:.1f} s of {wall_s:.0f}, {1000 * cpu_s / counts.rows:.2f} s of a core for "
        f"1,000 rows ({counts.tokens / cpu_s:,.0f} tokens a second of a core), "
        f"{counts.tokens / counts.sequences / SEQ_LEN:.2%} filled",
        flush=True,
    )


class Peak:
    """Keeps the highest anonymous memory of this process while it is entered."""

    def __init__(self) -> None:
        self.num_bytes = 0
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch)

    def __enter__(self) -> None:
        self._thread.start()

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._done.wait(0.02):
            self.num_bytes = max(self.num_bytes, anonymous_bytes())


def anonymous_bytes() -> int:
    """Returns this process's anonymous memory."""
    match = re.search(r"^RssAnon:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    return int(match[1]) * 1024 if match else 0


if __name__ == "__main__":
    main()
