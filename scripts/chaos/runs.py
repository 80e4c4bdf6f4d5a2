"""One run under blows: struck, gone on with, struck again, until it comes to its end."""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

from chaos.blows import SAVING, Blow, Struck, draw, ranks_of, strike
from chaos.project import Configuration, write_recipe
from fsdpq.errors import CheckpointError, ExitCode
from fsdpq.run_files.paths import RunFiles
from fsdpq.tensor_files.checkpoint_manifest import check_checkpoint, list_checkpoints, step_of

COMMAND_S = 400.0
"""A command that takes longer hangs."""

ORPHANS_S = 30.0
"""Ranks whose launcher is gone must have ended after so long."""


@dataclass
class Disturbed:
    """A run under blows.

    Attributes:
        configuration: what was run.
        files: its directory.
        struck: the blows that fell, in order.
        commands: commands that it took.
        findings: what should not have happened, in words.
    """

    configuration: Configuration
    files: RunFiles
    struck: list[Struck] = field(default_factory=list)
    commands: int = 0
    findings: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Ground:
    """Where runs are made.

    Attributes:
        project: with model, rows and recipes.
        runs: directory of the run directories.
    """

    project: Path
    runs: Path

    def start(self, log: Path, *arguments: str) -> subprocess.Popen[bytes]:
        """Starts a command of fsdpq in the project; its output goes to the end of ``log``."""
        environment = os.environ | {
            "FSDPQ_CACHE": str(self.project / "cache"), "NO_COLOR": "1", "OMP_NUM_THREADS": "1",
        }  # fmt: skip
        with log.open("ab") as output:
            output.write(f"$ fsdpq {' '.join(arguments)}\n".encode())
            output.flush()
            return subprocess.Popen(
                [sys.executable, "-m", "fsdpq", *arguments], cwd=self.project, env=environment,
                stdin=subprocess.DEVNULL, stdout=output, stderr=output, start_new_session=True,
            )  # fmt: skip


def run_undisturbed(ground: Ground, configuration: Configuration) -> RunFiles:
    """Runs a configuration from start to end, without checkpoints; returns its directory.

    A run that is there from an earlier campaign, and came to its end, is taken.
    """
    recipe = write_recipe(ground.project, configuration)
    files = RunFiles(ground.runs / f"{configuration.name}-undisturbed")
    if files.report_html.exists():
        return files
    shutil.rmtree(files.root, ignore_errors=True)
    log = ground.runs / f"{configuration.name}-undisturbed.log"
    quiet = ("checkpoint.interval=null", "checkpoint.resume=never")
    command = ("train", recipe.name, *quiet, "--run-dir", str(files.root))
    code = ground.start(log, *command).wait(timeout=COMMAND_S)
    if code != 0:
        raise RuntimeError(f"the undisturbed run failed with {code}: see {log}")
    return files


def run_disturbed(
    ground: Ground,
    configuration: Configuration,
    blows: list[Blow],
    *,
    name: str,
    seed: int = 0,
) -> Disturbed:
    """Runs a configuration under blows, one a command at most, to its end.

    Args:
        ground: where.
        configuration: what.
        blows: in order; a command after the last one is left in peace.
        name: of the run directory.
        seed: of small choices: how to go on, and when.
    """
    rng = random.Random(seed)
    recipe = write_recipe(ground.project, configuration)
    run = Disturbed(configuration, RunFiles(ground.runs / name))
    shutil.rmtree(run.files.root, ignore_errors=True)  # of a campaign that was stopped
    log = ground.runs / f"{name}.log"
    log.unlink(missing_ok=True)
    waiting = list(blows)
    while True:
        command = _command(run, recipe, rng)
        newest = _newest(run.files)
        launcher = ground.start(log, *command)
        run.commands += 1
        struck = strike(launcher, run.files, waiting.pop(0)) if waiting else None
        try:
            code = launcher.wait(timeout=COMMAND_S)
        except subprocess.TimeoutExpired:
            run.findings.append(f"`fsdpq {command[0]}` did not end within {COMMAND_S:.0f} s")
            os.killpg(launcher.pid, signal.SIGKILL)
            return run
        if struck is not None and struck.fell:
            run.struck.append(struck)
        _judge(run, code, struck, log)
        if code == 0 or run.findings:
            return run
        _look_after(run, struck, newest, rng)


def draw_blows(rng: random.Random, count: int) -> list[Blow]:
    """Draws the blows of one run."""
    return [draw(rng) for _ in range(count)]


def _command(run: Disturbed, recipe: Path, rng: random.Random) -> tuple[str, ...]:
    """Returns how the run goes on: by ``resume`` or ``train``; ``resume`` needs a checkpoint."""
    worlds = run.configuration.worlds
    ranks = worlds[run.commands % len(worlds)]
    more = () if len(worlds) == 1 else (f"launch.nproc_per_node={ranks}",)
    if list_checkpoints(run.files.checkpoints) and rng.random() < 0.7:
        return ("resume", str(run.files.root), *more)
    return ("train", recipe.name, *more, "--run-dir", str(run.files.root))


def _judge(run: Disturbed, code: int, struck: Struck | None, log: Path) -> None:
    """Notes an end that the blow does not explain."""
    expected = {0}
    if struck is not None and struck.fell:
        if struck.blow.number in SAVING:
            expected |= {ExitCode.SAVED, ExitCode.INTERRUPTED}
        elif "launcher" in struck.blow.victim or struck.blow.victim == "everything":
            expected |= {-signal.SIGKILL}
        else:
            expected |= {ExitCode.RUN_FAILED}
    if code not in expected:
        why = f"after {struck.blow.kind}" if struck is not None and struck.fell else "unprovoked"
        run.findings.append(f"exit code {code} {why} (command {run.commands}): see {log}")
    if b"this is a bug in fsdpq" in log.read_bytes():
        run.findings.append(f"a bug in fsdpq: see {log}")


def _look_after(run: Disturbed, struck: Struck | None, newest: int, rng: random.Random) -> None:
    """Checks what a blow left: whole checkpoints only, none fewer, no ranks that live on."""
    if rng.random() < 0.5 and struck is not None and "launcher" in struck.blow.victim:
        time.sleep(rng.uniform(0, 1.0))  # go on at once, beside ranks that are just ending
        return
    deadline = time.monotonic() + ORPHANS_S
    while (left := ranks_of(run.files)) and time.monotonic() < deadline:
        time.sleep(0.05)
    if left:
        run.findings.append(f"{len(left)} processes live {ORPHANS_S:.0f} s after their launcher")
        for process in left:
            process.kill()
    for directory in list_checkpoints(run.files.checkpoints):
        try:
            check_checkpoint(directory)
        except CheckpointError as error:
            run.findings.append(f"a blow left half a checkpoint: {error.message}")
    if _newest(run.files) < newest:
        run.findings.append(f"the checkpoint of step {newest} is gone")


def _newest(files: RunFiles) -> int:
    return max(map(step_of, list_checkpoints(files.checkpoints)), default=-1)
