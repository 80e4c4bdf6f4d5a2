"""The long campaign: ``PYTHONPATH=scripts python -m chaos --kills 100 --seed 7 --out DIR``.

Every configuration is run once in peace. Then disturbed runs of all of them follow by turns until
enough processes were killed. After each run its losses and its export are compared with those of
the undisturbed one, and a line goes to ``outcomes.jsonl``; the tables stand in ``table.md``. A
campaign that was stopped goes on in its directory.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from itertools import count
from pathlib import Path
from threading import Lock

from chaos.compare import compare
from chaos.project import CONFIGURATIONS, Configuration, write_project
from chaos.runs import Ground, draw_blows, run_disturbed, run_undisturbed
from chaos.table import Outcome, render
from fsdpq.run_files.paths import RunFiles
from fsdpq.run_files.writing import append_json_line, read_json_lines

BLOWS_PER_RUN = (6, 10)


class Campaign:
    """Runs disturbed runs, in one or more threads, until enough was killed.

    Args:
        out: directory of everything.
        seed: of all choices.
        kills: so many SIGKILLs end it.
        wanted: names of configurations; none are all.
    """

    def __init__(self, out: Path, *, seed: int, kills: int, wanted: list[str]) -> None:
        self._out = out
        self._seed = seed
        self._kills = kills
        self._configurations = [c for c in CONFIGURATIONS if not wanted or c.name in wanted]
        self._ground = Ground(write_project(out / "project"), out / "runs")
        self._ground.runs.mkdir(exist_ok=True)
        self._peaceful: dict[str, RunFiles] = {}
        self._lock = Lock()
        self._locks = {c.name: Lock() for c in self._configurations}
        self.outcomes = [Outcome.of_json(row) for row in read_json_lines(out / "outcomes.jsonl")]
        self._numbers = count(len(self.outcomes))

    @property
    def killed(self) -> int:
        """SIGKILLs that fell so far."""
        blows = (struck for outcome in self.outcomes for struck in outcome.struck)
        return sum(struck.blow.kind.startswith("SIGKILL") for struck in blows)

    def work(self) -> None:
        """Does runs until the campaign is over; for each thread."""
        while self.killed < self._kills:
            with self._lock:
                number = next(self._numbers)
            configuration = self._configurations[number % len(self._configurations)]
            outcome = self._run(configuration, number)
            with self._lock:
                self.outcomes.append(outcome)
                append_json_line(self._out / "outcomes.jsonl", outcome.as_json())
                text = "\n".join(render(self.outcomes))
                (self._out / "table.md").write_text(text + "\n", encoding="utf-8")
            said = "; ".join(outcome.problems) or "as undisturbed"
            print(f"{self.killed:4} kills  {outcome.configuration}: {said}", flush=True)

    def _run(self, configuration: Configuration, number: int) -> Outcome:
        with self._locks[configuration.name]:
            if configuration.name not in self._peaceful:
                self._peaceful[configuration.name] = run_undisturbed(self._ground, configuration)
        rng = random.Random(f"{self._seed}-{number}")
        blows = draw_blows(rng, rng.randint(*BLOWS_PER_RUN))
        name = f"{configuration.name}-{number}"
        run = run_disturbed(
            self._ground, configuration, blows, name=name, seed=rng.randrange(2**32)
        )
        largest, problems = float("nan"), list(run.findings)
        if not problems:
            same_world = len(configuration.worlds) == 1
            peaceful = self._peaceful[configuration.name]
            largest, problems = compare(peaceful, run.files, same_world=same_world)
        if not problems:
            shutil.rmtree(run.files.root)
        return Outcome(
            configuration.name, tuple(run.struck), run.commands, largest, tuple(problems)
        )


def main() -> int:
    """Runs the campaign; returns 1 where any run did not come out as in peace."""
    parser = argparse.ArgumentParser(prog="chaos", description="Kills runs and compares them.")
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--jobs", type=int, default=1, help="runs at once")
    parser.add_argument("--only", nargs="+", default=[], help="names of configurations")
    parser.add_argument("--out", type=Path, required=True, help="directory of all of it")
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()
    campaign = Campaign(given.out.absolute(), seed=given.seed, kills=given.kills, wanted=given.only)
    with ThreadPoolExecutor(given.jobs) as pool:
        for work in [pool.submit(campaign.work) for _ in range(given.jobs)]:
            work.result()
    print("\n".join(render(campaign.outcomes)))
    bad = [outcome for outcome in campaign.outcomes if outcome.problems]
    print(f"\n{campaign.killed} kills in {(time.monotonic() - started) / 60:.0f} minutes; "
          f"{len(bad)} runs not as undisturbed")  # fmt: skip
    print(json.dumps([outcome.problems for outcome in bad], indent=1), file=sys.stderr)
    return min(1, len(bad))


if __name__ == "__main__":
    sys.exit(main())
