"""Verbs over a finished run, each one process: ask it, measure it, merge it."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from fsdpq.run_files.paths import RunFiles
from fsdpq.worker.guard import recorded_errors, take_output


def add_finished_verbs(verbs: Any) -> None:
    """Adds ``answer`` and ``merge``."""
    answer = verbs.add_parser("answer")
    answer.add_argument("run_dir", type=Path)
    answer.add_argument("--error", type=Path, required=True)
    answer.add_argument("--device", choices=("cuda", "cpu"), required=True)
    answer.add_argument("--dequantize", choices=("auto", "always", "never"), required=True)
    answer.add_argument("--checkpoint", type=Path)
    answer.add_argument("--base", action="store_true")
    answer.add_argument("--compare", action="store_true")
    answer.add_argument("--turns", action="store_true")
    answer.add_argument("--trust-remote-code", action="store_true")
    answer.set_defaults(run=_answer)
    merge = verbs.add_parser("merge")
    merge.add_argument("run_dir", type=Path)
    merge.add_argument("--error", type=Path, required=True)
    merge.add_argument("--out", type=Path, required=True)
    merge.add_argument("--onto", choices=("dequantized", "original"), required=True)
    merge.add_argument("--requantize", choices=("nf4", "hqq"))
    merge.add_argument("--dtype", choices=("bf16", "fp16", "fp32"))
    merge.add_argument("--compare-tokens", type=int, required=True)
    merge.add_argument("--device", choices=("cuda", "cpu"), required=True)
    merge.add_argument("--trust-remote-code", action="store_true")
    merge.set_defaults(run=_merge)


def _answer(parsed: argparse.Namespace, rank: int) -> None:
    with recorded_errors(parsed.error, rank):
        output = take_output()  # before anything is imported that might print
        from fsdpq.worker.answering.answers import Wanted, serve_answers

        wanted = Wanted(
            device_type=parsed.device,
            trained=not parsed.base,
            checkpoint=parsed.checkpoint,
            needs_turns=parsed.turns,
            compares=parsed.compare,
            dequantize=parsed.dequantize,
            trust_remote_code=parsed.trust_remote_code,
        )
        serve_answers(RunFiles(parsed.run_dir), wanted, output)


def _merge(parsed: argparse.Namespace, rank: int) -> None:
    files = RunFiles(parsed.run_dir)
    with recorded_errors(parsed.error, rank):
        from fsdpq.worker.merge.run import MergeOptions, merge

        options = MergeOptions(
            out=parsed.out,
            onto=parsed.onto,
            requantize=parsed.requantize,
            dtype=parsed.dtype,
            compare_tokens=parsed.compare_tokens,
            device=parsed.device,
            trust_remote_code=parsed.trust_remote_code,
        )
        merge(files, options)
