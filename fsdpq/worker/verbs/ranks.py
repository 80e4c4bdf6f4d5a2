"""Verbs that run as ranks under torchrun: train, write a quantized base, test the machine."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from fsdpq.run_files.paths import RunFiles
from fsdpq.worker.guard import recorded_errors, redirect_output
from fsdpq.worker.keeping.presence import show_presence
from fsdpq.worker.keeping.signals import tell_stack_on_request


def add_rank_verbs(verbs: Any) -> None:
    """Adds ``train``, ``quantize``, ``evaluate`` and ``self-test``."""
    train = verbs.add_parser("train")
    train.add_argument("run_dir", type=Path)
    train.add_argument("--trust-remote-code", action="store_true")
    train.add_argument("--resume", action="store_true")
    train.add_argument("--inputs", type=Path)
    train.set_defaults(run=_train)
    quantize = verbs.add_parser("quantize")
    quantize.add_argument("run_dir", type=Path)
    quantize.add_argument("--out", type=Path, required=True)
    quantize.add_argument("--format", choices=("fsdpq", "bnb"), default="fsdpq")
    quantize.add_argument("--trust-remote-code", action="store_true")
    quantize.set_defaults(run=_quantize)
    evaluate = verbs.add_parser("evaluate")
    evaluate.add_argument("run_dir", type=Path)
    evaluate.add_argument("--trust-remote-code", action="store_true")
    evaluate.set_defaults(run=_evaluate)
    self_test = verbs.add_parser("self-test")
    self_test.add_argument("run_dir", type=Path)
    self_test.add_argument("--device", choices=("cuda", "cpu"), required=True)
    self_test.add_argument("--quick", action="store_true")
    self_test.set_defaults(run=_self_test)


def _train(parsed: argparse.Namespace, rank: int) -> None:
    files = RunFiles(parsed.run_dir)
    with recorded_errors(files.rank_error(rank), rank):
        show_presence(files)
        redirect_output(files.rank_log(rank))
        tell_stack_on_request(files.rank_stack(rank))
        from fsdpq.worker.train import run_rank

        run_rank(
            files,
            trust_remote_code=parsed.trust_remote_code,
            resume=parsed.resume,
            inputs=parsed.inputs,
        )


def _quantize(parsed: argparse.Namespace, rank: int) -> None:
    files = RunFiles(parsed.run_dir)
    with recorded_errors(files.rank_error(rank), rank):
        redirect_output(files.rank_log(rank))
        trust = parsed.trust_remote_code
        if parsed.format == "bnb":
            from fsdpq.worker.export.bnb import export_bnb

            export_bnb(files, parsed.out, trust_remote_code=trust)
        else:
            from fsdpq.worker.quantize import quantize

            quantize(files, parsed.out, trust_remote_code=trust)


def _evaluate(parsed: argparse.Namespace, rank: int) -> None:
    files = RunFiles(parsed.run_dir)
    with recorded_errors(files.rank_error(rank), rank):
        redirect_output(files.rank_log(rank))
        from fsdpq.worker.evaluate.run import evaluate

        evaluate(files, trust_remote_code=parsed.trust_remote_code)


def _self_test(parsed: argparse.Namespace, rank: int) -> None:
    files = RunFiles(parsed.run_dir)
    with recorded_errors(files.rank_error(rank), rank):
        redirect_output(files.rank_log(rank))
        from fsdpq.worker.self_test.run import CHECKS, QUICK_CHECKS, run_self_test

        checks = QUICK_CHECKS if parsed.quick else CHECKS
        run_self_test(files.events, parsed.device, checks)
