"""Rules about ``launch``."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from fsdpq.errors import Problem
from fsdpq.recipe.checks.facts import has_no_effect
from fsdpq.recipe.root import Recipe

KEY = "launch.rdzv_endpoint"
THIS_MACHINE = ("localhost", "127.0.0.1", "0.0.0.0")  # noqa: S104  names, nothing is bound


def check_port_exists(recipe: Recipe, _base_dir: Path) -> Iterator[Problem]:
    """A port of ``launch.rdzv_endpoint`` that is out of range."""
    endpoint = recipe.launch.rdzv_endpoint
    if endpoint is not None and not 0 < int(endpoint.rpartition(":")[2]) < 2**16:
        message = f"`{KEY}`: `{endpoint}` has no port from 1 to 65535"
        yield Problem(message, KEY, hint="delete it: a free port is found by itself")


def check_machines_meet(recipe: Recipe, _base_dir: Path) -> Iterator[Problem]:
    """Several machines without an address where they meet, or with one of this machine only."""
    launch = recipe.launch
    if launch.max_nodes == 1 or launch.scheduler != "local":
        return
    hint = "give the first machine's address, `rdzv_endpoint: 10.0.0.1:29500`, on all of them"
    if launch.rdzv_endpoint is None:
        message = f"`launch.nnodes: {launch.nnodes}` needs `launch.rdzv_endpoint`"
        yield Problem(message, "launch.nnodes", hint=hint)
    elif launch.rdzv_endpoint.rpartition(":")[0] in THIS_MACHINE:
        message = f"`{KEY}: {launch.rdzv_endpoint}` is another machine on each of {launch.nnodes}"
        yield Problem(message, KEY, hint=hint)


def check_range_of_machines(recipe: Recipe, _base_dir: Path) -> Iterator[Problem]:
    """A range of ``nnodes`` whose least is more than its most."""
    launch = recipe.launch
    if launch.min_nodes > launch.max_nodes:
        message = f"`launch.nnodes: {launch.nnodes}` starts with {launch.min_nodes} machines at "
        hint = f"write `nnodes: {launch.max_nodes}:{launch.min_nodes}`"
        yield Problem(f"{message}least and {launch.max_nodes} at most", "launch.nnodes", hint=hint)


def check_waiting_used(recipe: Recipe, _base_dir: Path) -> Iterator[Problem]:
    """How long machines wait for each other, where there is one."""
    if recipe.launch.max_nodes == 1:
        for field in ("join_timeout_s", "node_timeout_s"):
            yield from has_no_effect(recipe, "launch", field, "with one machine")


def check_slurm_chooses_the_endpoint(recipe: Recipe, _base_dir: Path) -> Iterator[Problem]:
    """``rdzv_endpoint`` under Slurm, which gives the job its machines."""
    if recipe.launch.scheduler == "slurm":
        reason = "with `scheduler: slurm`: ranks meet on the first machine of the job"
        yield from has_no_effect(recipe, "launch", "rdzv_endpoint", reason)


def check_slurm_settings_used(recipe: Recipe, _base_dir: Path) -> Iterator[Problem]:
    """Settings of ``launch.slurm`` where the ranks start on this machine."""
    launch = recipe.launch
    if launch.scheduler == "slurm":
        return
    for field, info in type(launch.slurm).model_fields.items():
        if getattr(launch.slurm, field) != info.default:
            key = f"launch.slurm.{field}"
            message = f"`{key}` has no effect with `launch.scheduler: {launch.scheduler}`"
            yield Problem(message, key, hint="delete it, or write `scheduler: slurm`")


def check_slurm_gives_gpus(recipe: Recipe, _base_dir: Path) -> Iterator[Problem]:
    """A job for Slurm that does not say how many GPUs it needs, or asks for too few."""
    launch = recipe.launch
    if launch.scheduler != "slurm":
        return
    asked, ranks = launch.slurm.gpus_per_node, launch.nproc_per_node
    key = "launch.slurm.gpus_per_node"
    if launch.device == "cpu":
        if asked is not None:
            yield Problem(f"`{key}` has no effect with `device: cpu`", key, hint="delete it")
    elif asked is None and ranks == "auto":
        hint = f"give `{key}`, or `launch.device: cpu` for a job without GPUs"
        yield Problem("nothing says how many GPUs the Slurm job needs", key, hint=hint)
    elif asked is not None and ranks != "auto" and ranks > asked:
        message = f"`launch.nproc_per_node: {ranks}` is more than `{key}: {asked}`"
        yield Problem(message, key, hint="ask for one GPU for every rank")


def check_slurm_time_for_saving(recipe: Recipe, _base_dir: Path) -> Iterator[Problem]:
    """A time limit of a Slurm job that is not longer than what it leaves for saving."""
    slurm = recipe.launch.slurm
    if recipe.launch.scheduler != "slurm" or slurm.time_minutes is None:
        return
    if slurm.time_minutes * 60 <= slurm.signal_lead_s:
        key = "launch.slurm.signal_lead_s"
        message = f"`{key}: {slurm.signal_lead_s}` is no less than `time_minutes: "
        hint = "raise `launch.slurm.time_minutes`: the run would be told to end as it starts"
        yield Problem(f"{message}{slurm.time_minutes}`", key, hint=hint)


def check_plan_check_used(recipe: Recipe, _base_dir: Path) -> Iterator[Problem]:
    """``plan_check`` on a CPU, where no plan refuses a run."""
    if recipe.launch.device == "cpu":
        reason = "with `device: cpu`: a plan refuses nothing there"
        yield from has_no_effect(recipe, "launch", "plan_check", reason)


CHECKS = (
    check_port_exists,
    check_machines_meet,
    check_range_of_machines,
    check_waiting_used,
    check_slurm_chooses_the_endpoint,
    check_slurm_settings_used,
    check_slurm_gives_gpus,
    check_slurm_time_for_saving,
    check_plan_check_used,
)
