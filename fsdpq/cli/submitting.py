"""Giving a run to Slurm from the command line, where its recipe asks for it."""

from __future__ import annotations

import functools
import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, cast

import click

from fsdpq.cli.answers import echo_json, error_fields
from fsdpq.errors import ExitCode, UsageError

if TYPE_CHECKING:  # a verb's help needs none of this
    from fsdpq.launch.screen import Screen
    from fsdpq.recipe.load import LoadedRecipe

Function = TypeVar("Function", bound=Callable[..., Any])


@dataclass(frozen=True)
class SlurmChoice:
    """What the command line says about a job.

    Attributes:
        prints: show the batch script instead of submitting it.
        setup: file of shell lines that come first; None is the user's own, where there is one.
        trust_remote_code: let the ranks run the model's code.
        as_json: print one JSON document instead of a run directory, or of the script.
    """

    prints: bool = False
    setup: Path | None = None
    trust_remote_code: bool = False
    as_json: bool = False

    def submit(
        self,
        loaded: LoadedRecipe,
        *,
        run_dir: Path | None,
        screen: Screen,
        smoke: bool = False,
    ) -> bool:
        """Gives a run to Slurm where its recipe says so; returns whether it does.

        The directory of the run is printed on stdout, or else the script.

        Args:
            loaded: the recipe.
            run_dir: as given.
            screen: shows what happens.
            smoke: a smoke run starts here, whatever the recipe says.

        Raises:
            UsageError: something was asked of Slurm, and the recipe starts its ranks here.
            FsdpqError: the job could not be submitted.
        """
        if loaded.recipe.launch.scheduler != "slurm" or smoke:
            self.check_used()
            return False
        from fsdpq.launch.slurm import training_job as jobs

        submission = jobs.Submission(self.setup, self.trust_remote_code)
        if self.prints:
            _echo_script(
                jobs.show_training_job(loaded, submission, run_dir=run_dir), as_json=self.as_json
            )
            return True
        files, number = jobs.submit_training(loaded, submission, screen=screen, run_dir=run_dir)
        _echo_job(files.root, number, screen, as_json=self.as_json)
        return True

    def submit_resume(
        self,
        run: Path,
        overrides: Sequence[str],
        *,
        force: bool,
        screen: Screen,
    ) -> bool:
        """Lets Slurm go on with a run where an override says so; returns whether it does.

        Args:
            run: its directory.
            overrides: ``launch.scheduler=slurm`` among them asks for it.
            force: go on although it becomes another run.
            screen: shows what happens.

        Raises:
            UsageError: something was asked of Slurm, and the run goes on here.
            FsdpqError: the job could not be submitted.
        """
        if "launch.scheduler=slurm" not in overrides:
            self.check_used()
            return False
        from fsdpq.launch.slurm import training_job as jobs

        submission = jobs.Submission(self.setup, self.trust_remote_code)
        if self.prints:
            script = jobs.show_resume_job(run, overrides, submission, force=force)
            _echo_script(script, as_json=self.as_json)
            return True
        number = jobs.submit_resume(run, overrides, submission, force=force)
        _echo_job(run, number, screen, as_json=self.as_json)
        return True

    def check_used(self) -> None:
        """Checks that nothing was asked of Slurm.

        Raises:
            UsageError: something was.
        """
        given = "--print" if self.prints else "--slurm-setup" if self.setup is not None else ""
        if given:
            message = f"`{given}` has no effect: the run starts its ranks on this machine"
            raise UsageError(message, hint="give `launch.scheduler=slurm`, or leave it out")


def slurm_options(function: Function) -> Function:
    """Adds ``--print`` and ``--slurm-setup`` to a verb, as one argument ``slurm``.

    What `trust_option` and `screen_options` give is in it too, where the verb has them.
    """

    @click.option(
        "--print", "prints", is_flag=True,
        help="Print the script that would be submitted to Slurm, and do nothing.",
    )  # fmt: skip
    @click.option(
        "--slurm-setup", "setup", type=click.Path(path_type=Path), metavar="FILE",
        help="Shell lines that a Slurm job starts with; default: "
        "~/.config/fsdpq/slurm-setup.sh, where it exists.",
    )  # fmt: skip
    @functools.wraps(function)
    def with_choice(*arguments: Any, prints: bool, setup: Path | None, **others: Any) -> Any:
        choice = SlurmChoice(
            prints, setup, bool(others.get("trust_remote_code")), bool(others.get("as_json"))
        )
        return function(*arguments, slurm=choice, **others)

    return cast("Function", with_choice)


def _echo_script(script: str, *, as_json: bool) -> None:
    if as_json:
        echo_json(error_fields(None) | {"exit_code": int(ExitCode.OK), "script": script})
    else:
        click.echo(script, nl=False)


def _echo_job(run_dir: Path, number: int, screen: Screen, *, as_json: bool) -> None:
    """Says which job a run became, and how to look at it; the run directory goes to stdout."""
    run = shlex.quote(str(run_dir))
    screen.report(f"submitted job {number}: `fsdpq status {run}` says how it stands,")
    screen.report(f"`fsdpq logs {run} --follow` shows what it prints, `fsdpq cancel {run}` ends it")
    if as_json:
        job = {"exit_code": int(ExitCode.OK), "run_dir": str(run_dir), "job": number}
        echo_json(error_fields(None) | job)
    else:
        click.echo(run_dir)
