"""Verbs that find out the memory of a recipe without training it, each one process."""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path
from typing import Any

from fsdpq.run_files.paths import RunFiles
from fsdpq.worker.guard import recorded_errors


def add_plan_verbs(verbs: Any) -> None:
    """Adds ``trace`` and ``measure``."""
    for name, run in (("trace", _trace), ("measure", _measure)):
        verb = verbs.add_parser(name)
        verb.add_argument("run_dir", type=Path)
        verb.add_argument("--config-dir", type=Path, required=True)
        verb.add_argument("--out", type=Path, required=True)
        verb.add_argument("--num-weights", type=int)
        verb.add_argument("--trust-remote-code", action="store_true")
        verb.set_defaults(run=run)


def _trace(parsed: argparse.Namespace, rank: int) -> None:
    files = RunFiles(parsed.run_dir)
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # nothing may depend on whether there is a GPU
    with recorded_errors(files.rank_error(rank), rank):
        from fsdpq.recipe.load import load_resolved
        from fsdpq.worker.plan_trace.run import trace_step

        found = trace_step(
            load_resolved(files.resolved),
            parsed.config_dir,
            num_weights=parsed.num_weights,
            trust_remote_code=parsed.trust_remote_code,
        )
        parsed.out.write_text(json.dumps(found.as_json()), encoding="utf-8")


def _measure(parsed: argparse.Namespace, rank: int) -> None:
    files = RunFiles(parsed.run_dir)
    with recorded_errors(files.rank_error(rank), rank):
        from fsdpq.recipe.load import load_resolved
        from fsdpq.worker.plan_trace.measured import measure_step

        found = measure_step(
            load_resolved(files.resolved),
            parsed.config_dir,
            trust_remote_code=parsed.trust_remote_code,
        )
        parsed.out.write_text(json.dumps(found.as_json()), encoding="utf-8")
