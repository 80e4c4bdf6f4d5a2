"""``python -m fsdpq.worker VERB ...``: what a rank does; `fsdpq.worker.verbs` has the verbs.

Starts the guard before anything heavy is imported, so that every error of a rank, a missing
package included, ends in its log and its error file.
"""

from __future__ import annotations

import argparse
import os

from fsdpq.errors import ExitCode
from fsdpq.worker.guard import end_process, end_with_launcher
from fsdpq.worker.keeping.signals import note_signals
from fsdpq.worker.verbs.bench import add_bench_verbs
from fsdpq.worker.verbs.finished import add_finished_verbs
from fsdpq.worker.verbs.inputs import add_input_verbs
from fsdpq.worker.verbs.plans import add_plan_verbs
from fsdpq.worker.verbs.ranks import add_rank_verbs


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """Returns the parsed command line; ``run`` is the verb's function."""
    parser = argparse.ArgumentParser(prog="python -m fsdpq.worker")
    verbs = parser.add_subparsers(dest="verb", required=True)
    add_rank_verbs(verbs)
    add_finished_verbs(verbs)
    add_input_verbs(verbs)
    add_plan_verbs(verbs)
    add_bench_verbs(verbs)
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    """Runs one verb on this rank."""
    parsed = parse_arguments(arguments)
    if "RANK" in os.environ:
        note_signals()
    end_with_launcher()
    parsed.run(parsed, int(os.environ.get("RANK", "0")))
    end_process(ExitCode.OK)


if __name__ == "__main__":
    main()
