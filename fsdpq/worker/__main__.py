"""``python -m fsdpq.worker train RUN_DIR`` and ``python -m fsdpq.worker generate RUN_DIR ...``.

Starts the guard before anything heavy is imported, so that every error of a rank, a missing
package included, ends in its log and its error file.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from fsdpq.errors import ExitCode
from fsdpq.run_files import RunFiles
from fsdpq.worker.guard import end_process, end_with_launcher, recorded_errors, redirect_output


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """Returns the parsed command line."""
    parser = argparse.ArgumentParser(prog="python -m fsdpq.worker")
    verbs = parser.add_subparsers(dest="verb", required=True)
    train = verbs.add_parser("train")
    train.add_argument("run_dir", type=Path)
    train.add_argument("--trust-remote-code", action="store_true")
    generate = verbs.add_parser("generate")
    generate.add_argument("run_dir", type=Path)
    generate.add_argument("--prompt", required=True)
    generate.add_argument("--max-new-tokens", type=int, required=True)
    generate.add_argument("--temperature", type=float, default=0.0)
    generate.add_argument("--device", choices=("cuda", "cpu"), required=True)
    generate.add_argument("--base", action="store_true")
    generate.add_argument("--trust-remote-code", action="store_true")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    """Runs one verb on this rank."""
    parsed = parse_arguments(arguments)
    files = RunFiles(parsed.run_dir)
    rank = int(os.environ.get("RANK", "0"))
    end_with_launcher()
    training = parsed.verb == "train"
    with recorded_errors(files.rank_error(rank) if training else files.generate_error, rank):
        if training:
            redirect_output(files.rank_log(rank))
            from fsdpq.worker.train import train

            train(files, trust_remote_code=parsed.trust_remote_code)
        else:
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
    end_process(ExitCode.OK)


if __name__ == "__main__":
    main()
