"""``python -m fsdpq.worker VERB ...``: what a rank does; `parse_arguments` lists the verbs.

Starts the guard before anything heavy is imported, so that every error of a rank, a missing
package included, ends in its log and its error file.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

from fsdpq.errors import ExitCode
from fsdpq.run_files import RunFiles
from fsdpq.worker.guard import end_process, end_with_launcher, recorded_errors, redirect_output


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """Returns the parsed command line; ``run`` is the verb's function."""
    parser = argparse.ArgumentParser(prog="python -m fsdpq.worker")
    verbs = parser.add_subparsers(dest="verb", required=True)
    train = verbs.add_parser("train")
    train.add_argument("run_dir", type=Path)
    train.add_argument("--trust-remote-code", action="store_true")
    train.set_defaults(run=_train)
    quantize = verbs.add_parser("quantize")
    quantize.add_argument("run_dir", type=Path)
    quantize.add_argument("--out", type=Path, required=True)
    quantize.add_argument("--format", choices=("fsdpq", "bnb"), default="fsdpq")
    quantize.add_argument("--trust-remote-code", action="store_true")
    quantize.set_defaults(run=_quantize)
    generate = verbs.add_parser("generate")
    generate.add_argument("run_dir", type=Path)
    generate.add_argument("--prompt", required=True)
    generate.add_argument("--max-new-tokens", type=int, required=True)
    generate.add_argument("--temperature", type=float, default=0.0)
    generate.add_argument("--device", choices=("cuda", "cpu"), required=True)
    generate.add_argument("--base", action="store_true")
    generate.add_argument("--trust-remote-code", action="store_true")
    generate.set_defaults(run=_generate)
    _add_data_verbs(verbs)
    smoke_model = verbs.add_parser("smoke-model")
    smoke_model.add_argument("spec", type=Path)
    smoke_model.add_argument("directory", type=Path)
    smoke_model.add_argument("--error", type=Path, required=True)
    smoke_model.set_defaults(run=_smoke_model)
    self_test = verbs.add_parser("self-test")
    self_test.add_argument("run_dir", type=Path)
    self_test.add_argument("--device", choices=("cuda", "cpu"), required=True)
    self_test.set_defaults(run=_self_test)
    return parser.parse_args(arguments)


def _add_data_verbs(verbs: Any) -> None:
    inspect = verbs.add_parser("inspect")
    inspect.add_argument("run_dir", type=Path)
    inspect.add_argument("--samples", type=int, default=0)
    inspect.add_argument("--file", default="")
    inspect.add_argument("--row", type=int, default=0)
    inspect.add_argument("--out", type=Path, required=True)
    inspect.add_argument("--processes", type=int, required=True)
    inspect.add_argument("--trust-remote-code", action="store_true")
    inspect.set_defaults(run=_inspect)
    prepare = verbs.add_parser("prepare")
    prepare.add_argument("job", type=Path)
    prepare.add_argument("directory", type=Path)
    prepare.add_argument("--error", type=Path, required=True)
    prepare.add_argument("--processes", type=int, required=True)
    prepare.add_argument("--trust-remote-code", action="store_true")
    prepare.set_defaults(run=_prepare)


def main(arguments: list[str] | None = None) -> None:
    """Runs one verb on this rank."""
    parsed = parse_arguments(arguments)
    end_with_launcher()
    parsed.run(parsed, int(os.environ.get("RANK", "0")))
    end_process(ExitCode.OK)


def _train(parsed: argparse.Namespace, rank: int) -> None:
    files = RunFiles(parsed.run_dir)
    with recorded_errors(files.rank_error(rank), rank):
        redirect_output(files.rank_log(rank))
        from fsdpq.worker.train import train

        train(files, trust_remote_code=parsed.trust_remote_code)


def _quantize(parsed: argparse.Namespace, rank: int) -> None:
    files = RunFiles(parsed.run_dir)
    with recorded_errors(files.rank_error(rank), rank):
        redirect_output(files.rank_log(rank))
        trust = parsed.trust_remote_code
        if parsed.format == "bnb":
            from fsdpq.worker.bnb_export import export_bnb

            export_bnb(files, parsed.out, trust_remote_code=trust)
        else:
            from fsdpq.worker.quantize import quantize

            quantize(files, parsed.out, trust_remote_code=trust)


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


def _inspect(parsed: argparse.Namespace, rank: int) -> None:
    files = RunFiles(parsed.run_dir)
    with recorded_errors(files.rank_error(rank), rank):
        from fsdpq.worker.inspect import Wanted, inspect

        inspect(
            files,
            Wanted(parsed.samples, parsed.file, parsed.row),
            output=parsed.out,
            num_processes=parsed.processes,
            trust_remote_code=parsed.trust_remote_code,
        )


def _prepare(parsed: argparse.Namespace, rank: int) -> None:
    with recorded_errors(parsed.error, rank):
        from fsdpq.worker.prepare import prepare

        prepare(
            parsed.job,
            parsed.directory,
            num_processes=parsed.processes,
            trust_remote_code=parsed.trust_remote_code,
        )


def _smoke_model(parsed: argparse.Namespace, rank: int) -> None:
    with recorded_errors(parsed.error, rank):
        from fsdpq.worker.smoke_model import build_smoke_model

        build_smoke_model(parsed.spec, parsed.directory)


def _self_test(parsed: argparse.Namespace, rank: int) -> None:
    files = RunFiles(parsed.run_dir)
    with recorded_errors(files.rank_error(rank), rank):
        redirect_output(files.rank_log(rank))
        from fsdpq.worker.self_test.run import run_self_test

        run_self_test(files.events, parsed.device)


if __name__ == "__main__":
    main()
