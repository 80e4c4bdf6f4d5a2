"""``fsdpq plan``: will it fit, how long will it take, and what would make it fit."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import click

from fsdpq.cli.answers import echo_json, json_option
from fsdpq.cli.options import recipe_arguments
from fsdpq.cli.render import wants_color
from fsdpq.errors import ExitCode

_HARDWARE = (
    click.option("--gpus", metavar="GPUS", help="GPUs of a machine: 2x24GiB, 1xRTX4090."),
    click.option("--ram", metavar="SIZE", help="Host memory of a machine: 64GiB."),
    click.option("--disk", metavar="RATE", help="What its disk reads: 5GB/s."),
    click.option("--network", metavar="RATE", help="What goes between two machines: 12.5GB/s."),
    click.option(
        "--price", type=click.FloatRange(min=0), metavar="NUMBER",
        help="Of an hour of all machines, in any currency.",
    ),
)  # fmt: skip


def hardware_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """Adds the options that describe a machine; ``function`` gets them as one ``hardware``."""

    @functools.wraps(function)
    def with_hardware(**given: Any) -> Any:
        from fsdpq.launch.plan import Hardware

        names = ("gpus", "ram", "disk", "network", "price")
        return function(hardware=Hardware(**{name: given.pop(name) for name in names}), **given)

    for option in reversed(_HARDWARE):
        with_hardware = option(with_hardware)
    return with_hardware


@click.command("plan")
@recipe_arguments
@hardware_options
@click.option("--max", "limits", is_flag=True, help="The longest rows, largest batch and rank.")
@click.option("--table", "variants", is_flag=True, help="Compare strategies and offload.")
@click.option(
    "--trace",
    is_flag=True,
    help="Run the worker's own step under fake tensors, and compare. Minutes for a large model.",
)
@click.option(
    "--measure",
    is_flag=True,
    help="Run rank 0 for real on the first GPU of this machine, and compare.",
)
@json_option
def plan_command(
    recipe: Path,
    *,
    overrides: tuple[str, ...],
    hardware: Any,
    as_json: bool,
    trace: bool,
    measure: bool,
    **answers: bool,
) -> None:
    """Say what RECIPE takes: memory, disk, time; whether it fits, and what would make it fit.

    It is planned for the machine that --gpus and --ram describe; without --gpus, for this one. No
    weights are downloaded, and no GPU is needed. The exit code is 3 where it does not fit.
    """
    from fsdpq.cli.plan_text import render_plan
    from fsdpq.launch.plan import prepare_plan
    from fsdpq.plan.as_json import plan_json
    from fsdpq.plan.build import Wanted

    case = prepare_plan(recipe, overrides, hardware)
    plan = case.build(Wanted(**answers))
    fields = plan_json(plan)
    if not as_json:
        _echo(render_plan(plan))
    for wanted, run in ((trace, case.trace), (measure, case.measure)):
        if wanted:
            found = run()
            fields[found.how] = found.as_json()
            if not as_json:
                _compare(plan, found)
    if as_json:
        echo_json(fields)
    if plan.fits is False:
        sys.exit(ExitCode.DOES_NOT_FIT)


def _compare(plan: Any, found: Any) -> None:
    from fsdpq.cli.plan_compared import render_comparison

    _echo(render_comparison(plan, found))


def _echo(lines: Iterable[str]) -> None:
    for line in lines:
        click.echo(line, color=wants_color(sys.stdout))
