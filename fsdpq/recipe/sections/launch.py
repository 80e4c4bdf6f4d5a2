"""``launch``: processes, devices, machines."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from fsdpq.recipe.options import Options


class SlurmOptions(Options):
    """What a job asks Slurm for; needs ``launch.scheduler: slurm``."""

    partition: str | None = Field(default=None, min_length=1)
    """Queue; null is the cluster's default."""

    account: str | None = Field(default=None, min_length=1)
    """Who pays; null is your default."""

    gpus_per_node: int | None = Field(default=None, ge=1)
    """GPUs on each machine; null is ``launch.nproc_per_node``."""

    time_minutes: int | None = Field(default=None, ge=1)
    """Time limit; null is the partition's."""

    requeue: bool = False
    """Queue the job again after a preemption, to go on from its last checkpoint."""


class LaunchOptions(Options):
    """Processes and devices."""

    nproc_per_node: Literal["auto"] | Annotated[int, Field(ge=1)] = "auto"
    """Ranks on each machine; ``auto`` is one per GPU, or two where there is no GPU."""

    nnodes: Annotated[int, Field(ge=1)] | Annotated[str, Field(pattern=r"^[1-9]\d*:[1-9]\d*$")] = (
        Field(default=1, examples=["2:4"])
    )
    """Machines; each runs the same command. ``MIN:MAX`` waits for at most so many and starts with
    at least so few; a machine that is lost later leaves the others to go on, where
    ``launch.max_restarts`` lets them."""

    device: Literal["auto", "cuda", "cpu"] = "auto"
    """``auto`` is ``cuda`` where there is a GPU."""

    rdzv_endpoint: str | None = Field(
        default=None, pattern=r"^[^\s:]+:\d{1,5}$", examples=["127.0.0.1:29500"]
    )
    """``host:port`` where the ranks meet; null takes a free port of this machine. With several
    machines it is an address of the first of them, as all of them reach it."""

    join_timeout_s: float = Field(default=600.0, ge=1)
    """Seconds that machines wait for each other when ranks are to start."""

    node_timeout_s: float = Field(default=30.0, ge=1)
    """Seconds without a sign of another machine after which it counts as lost: it was switched off,
    or its network was. A process that was killed is noticed at once."""

    max_restarts: int = Field(default=0, ge=0)
    """How often the ranks are started again after a failure that may pass: a rank that was killed,
    that hangs, or that ends in an error nobody foresaw. They go on from the newest checkpoint. A
    mistake that would only come again ends the run at once."""

    hang_timeout_s: Literal["auto"] | Annotated[float, Field(ge=1)] | None = Field(
        default="auto", examples=[600.0]
    )
    """Seconds without progress on any rank after which the run is ended, with the stack of every
    rank. It counts while training, from the second step on; elsewhere it is half an hour at least.
    ``auto`` is ten times the longest pause so far, and a minute at least; null waits for ever."""

    plan_check: bool = True
    """Refuse a run that by plan (``fsdpq plan``) needs more memory than a GPU of this machine has,
    before anything is fetched where the model's shape is known. ``false`` goes on all the same."""

    scheduler: Literal["local", "slurm"] = "local"
    """Start the ranks here, or submit a job to Slurm."""

    slurm: SlurmOptions = SlurmOptions.model_construct()
    """Settings of the scheduler ``slurm``."""

    @property
    def min_nodes(self) -> int:
        """The fewest machines that the ranks start on."""
        return int(str(self.nnodes).partition(":")[0])

    @property
    def max_nodes(self) -> int:
        """The most machines that the ranks start on: what a plan counts with."""
        return int(str(self.nnodes).rpartition(":")[2])
