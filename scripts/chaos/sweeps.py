"""A sweep that is killed: ``PYTHONPATH=scripts python -m chaos.sweeps --kills 6 --out DIR``.

A sweep over a tiny model runs in peace, then the same one again and again under blows, each time
by the same command, until it is done. Both tables must be equal in all that says what was trained,
and every adapter must have the same bytes.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import yaml

from chaos.project import RECIPE, write_project
from fsdpq.errors import ExitCode
from fsdpq.run_files.sweep_paths import SweepFiles
from fsdpq.sweep.outcome import read_outcome
from fsdpq.sweep.results.measures import is_deterministic

VALUES = ("adapter.rank=2,4,8", "optimizer.lr=1e-3,5e-3", "training.seed=0,1")
"""Twelve trials."""

VICTIMS = ("runner", "everything", "runner saves")
"""Who is hit: the runner by SIGKILL, it and all it started by SIGKILL, the runner by SIGTERM."""

LONGEST_S = 30.0
"""A blow falls so late at most after its command's start."""


@dataclass
class Campaign:
    """What is swept, and where.

    Attributes:
        folder: with the recipe, the model and the rows.
        values: of the sweep, in words of the command line.
        parallel: trials at once.
        kills: blows.
        seed: of all choices.
        told: what happened, a line each.
    """

    folder: Path
    values: tuple[str, ...] = VALUES
    parallel: int = 2
    kills: int = 6
    seed: int = 0
    told: list[str] = field(default_factory=list[str])

    def run_in_peace(self) -> SweepFiles:
        """Runs the sweep once."""
        process = self._start("peaceful")
        process.wait()
        assert process.returncode == ExitCode.OK, "the undisturbed sweep failed"
        return SweepFiles(self.folder / "peaceful")

    def run_disturbed(self) -> SweepFiles:
        """Runs the sweep under blows to its end."""
        chance = random.Random(self.seed)
        for number in range(self.kills):
            victim = VICTIMS[number % len(VICTIMS)]
            process, delay_s = self._start("killed"), chance.uniform(2, LONGEST_S)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(delay_s)
            code = process.poll()
            if code is not None:
                self.told.append(f"over before blow {number + 1}, with exit code {code}")
                break
            _strike(process, victim)
            self.told.append(f"{victim} after {delay_s:.1f} s: exit code {process.wait()}")
        process = self._start("killed")
        process.wait()
        self.told.append(f"the last command: exit code {process.returncode}")
        return SweepFiles(self.folder / "killed")

    def _start(self, out: str) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", "fsdpq", "sweep", "recipe.yaml", *self.values]
        command += ["--out", out, "--parallel", str(self.parallel)]
        environment = os.environ | {"FSDPQ_CACHE": str(self.folder / "cache"), "NO_COLOR": "1"}
        with (self.folder / f"{out}.log").open("ab") as log:
            return subprocess.Popen(
                command, cwd=self.folder, env=environment, stdout=log, stderr=log
            )


def write_sweep_project(folder: Path) -> Path:
    """Writes model, rows and a recipe of six steps on one rank, with a checkpoint after each."""
    write_project(folder)
    training = {"steps": 6, "global_batch_size": 8, "micro_batch_size": 4, "eval_interval": 2}
    recipe: dict[str, Any] = {
        **RECIPE, "name": "swept", "training": training, "lr_scheduler": {"kind": "constant"},
        "checkpoint": {"interval": 1}, "export": {"verify": False},
        "launch": {"nproc_per_node": 1, "device": "cpu"},
    }  # fmt: skip
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe, sort_keys=False), encoding="utf-8")
    return folder


def find_differences(
    peaceful: SweepFiles, killed: SweepFiles, *, only: str | None = None
) -> Iterator[str]:
    """Yields what two sweeps do not have in common and should.

    Args:
        peaceful: the undisturbed one.
        killed: the other.
        only: id of the one trial that is compared; None compares all.
    """
    tables = [_table_of(files, only) for files in (peaceful, killed)]
    if tables[0] != tables[1]:
        rows = zip(tables[0], tables[1], strict=False)
        yield from (f"{then} is now {now}" for then, now in rows if then != now)
        if len(tables[0]) != len(tables[1]):
            yield f"{len(tables[0])} trials are now {len(tables[1])}"
    for row in tables[0]:
        trial_id = str(row["id"])
        adapters = [
            files.run(trial_id).adapter / "adapter_model.safetensors"
            for files in (peaceful, killed)
        ]
        if adapters[0].read_bytes() != adapters[1].read_bytes():
            yield f"the adapter of {trial_id} has other bytes"


def _table_of(files: SweepFiles, only: str | None) -> list[dict[str, Any]]:
    """Returns the rows without times; the rank of a single one says nothing."""
    content = json.loads(files.results_json.read_text(encoding="utf-8"))
    rows = content["trials"] if only is None else _rows_of(content["trials"], only)
    return [
        {**row, "measures": {n: v for n, v in row["measures"].items() if is_deterministic(n)}}
        for row in rows
    ]


def _rows_of(rows: list[dict[str, Any]], only: str) -> list[dict[str, Any]]:
    return [{**row, "rank": None} for row in rows if row["id"] == only]


def _strike(process: subprocess.Popen[bytes], victim: str) -> None:
    if victim == "runner saves":
        process.send_signal(signal.SIGTERM)
        return
    hit = [psutil.Process(process.pid)]
    hit += hit[0].children(recursive=True) if victim == "everything" else []
    for each in hit:
        with contextlib.suppress(psutil.NoSuchProcess):
            each.kill()


def main() -> int:
    """Runs a campaign and prints what came of it."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--kills", type=int, default=6)
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--parallel", type=int, default=2)
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()
    folder = write_sweep_project(given.out)
    campaign = Campaign(folder, parallel=given.parallel, kills=given.kills, seed=given.seed)
    started = time.monotonic()
    peaceful = campaign.run_in_peace()
    print(f"undisturbed: {time.monotonic() - started:.0f} s", flush=True)
    killed = campaign.run_disturbed()
    differences = list(find_differences(peaceful, killed))
    trials = [path.stem for path in sorted(killed.root.glob("outcomes/*.json"))]
    starts = sum(read_outcome(killed, trial_id).attempts for trial_id in trials)
    for line in [*campaign.told, *differences]:
        print(line)
    print(f"{len(trials)} trials, {starts} starts: {'; '.join(differences) or 'as undisturbed'}")
    return 1 if differences else 0


if __name__ == "__main__":
    sys.exit(main())
