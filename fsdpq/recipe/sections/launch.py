"""``launch``: processes, devices, machines."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from fsdpq.recipe.options import Options

_NAME = r"^[A-Za-z0-9_][A-Za-z0-9_.+-]*$"


class SlurmOptions(Options):
    """What a job asks Slurm for; needs ``launch.scheduler: slurm``."""

    partition: str | None = Field(
        default=None, pattern=r"^[A-Za-z0-9_][A-Za-z0-9_.+,-]*$", examples=["gpu"]
    )
    """Queue, or several with commas between them; null is the cluster's default."""

    account: str | None = Field(default=None, pattern=_NAME)
    """Who pays; null is your default."""

    qos: str | None = Field(default=None, pattern=_NAME)
    """Quality of service; null is your default."""

    constraint: str | None = Field(
        default=None, pattern=r"^[A-Za-z0-9_\[(][A-Za-z0-9_.:+&|*()\[\]-]*$", examples=["a100&ib"]
    )
    """Features that a machine must have, in Slurm's grammar."""

    gpus_per_node: int | None = Field(default=None, ge=1)
    """GPUs on each machine; null is ``launch.nproc_per_node``, and none with ``device: cpu``."""

    cpus_per_node: int | None = Field(default=None, ge=1)
    """CPU cores on each machine; null is one for every rank."""

    memory_gib_per_node: int | None = Field(default=None, ge=1)
    """Host memory of each machine in GiB; null is what the partition gives."""

    time_minutes: int | None = Field(default=None, ge=1)
    """Time limit; null is the partition's."""

    signal_lead_s: int = Field(default=120, ge=10, le=65535)
    """Seconds before the time limit at which the ranks are told to save; Slurm may tell them up to
    a minute earlier."""

    requeue: bool = False
    """Queue the job again after a preemption, the time limit or a lost machine, to go on from its
    last checkpoint. A run that fails is not queued again."""


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
    """Start the ranks here, or submit a job to Slurm, which starts them on machines of its own."""

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
