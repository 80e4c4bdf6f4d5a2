"""Verbs over a finished run, each one process: ask it, measure it, merge it."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from fsdpq.run_files import RunFiles
from fsdpq.worker.guard import recorded_errors


def add_finished_verbs(verbs: Any) -> None:
    """Adds ``generate`` and ``merge``."""
    generate = verbs.add_parser("generate")
    generate.add_argument("run_dir", type=Path)
    generate.add_argument("--prompt", required=True)
    generate.add_argument("--max-new-tokens", type=int, required=True)
    generate.add_argument("--temperature", type=float, default=0.0)
    generate.add_argument("--device", choices=("cuda", "cpu"), required=True)
    generate.add_argument("--base", action="store_true")
    generate.add_argument("--trust-remote-code", action="store_true")
    generate.set_defaults(run=_generate)
    merge = verbs.add_parser("merge")
    merge.add_argument("run_dir", type=Path)
    merge.add_argument("--out", type=Path, required=True)
    merge.add_argument("--onto", choices=("dequantized", "original"), required=True)
    merge.add_argument("--requantize", choices=("nf4", "hqq"))
    merge.add_argument("--dtype", choices=("bf16", "fp16", "fp32"))
    merge.add_argument("--compare-tokens", type=int, required=True)
    merge.add_argument("--device", choices=("cuda", "cpu"), required=True)
    merge.add_argument("--trust-remote-code", action="store_true")
    merge.set_defaults(run=_merge)


def _generate(parsed: argparse.Namespace, rank: int) -> None:
    files = RunFiles(parsed.run_dir)
    with recorded_errors(files.generate_error, rank):
        from fsdpq.worker.generate import generate

        generate(
            files,
            prompt=parsed.prompt,
            max_new_tokens=parsed.max_new_tokens,
            temperature=parsed.temperature,
            device_type=parsed.device,
            use_adapter=not parsed.base,
            trust_remote_code=parsed.trust_remote_code,
        )


def _merge(parsed: argparse.Namespace, rank: int) -> None:
    files = RunFiles(parsed.run_dir)
    with recorded_errors(files.merge_error, rank):
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
