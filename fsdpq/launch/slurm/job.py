"""What Slurm is asked to run."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from fsdpq.launch.slurm.files import JobFiles
from fsdpq.recipe.sections.launch import SlurmOptions


@dataclass(frozen=True)
class Job:
    """One job, or one array of them.

    Attributes:
        name: as ``squeue`` shows it.
        command: what every node runs, as arguments; in an array, Slurm's environment
            (``SLURM_ARRAY_TASK_ID``) tells the tasks apart.
        options: partition, account, time and so on.
        num_nodes: machines, at most.
        ranks_per_node: processes that train on each of them; GPUs too, unless ``options`` says.
        device: ``cuda`` or ``cpu``.
        folder: where the script, the job's own output and its number are kept.
        work_dir: what the command's relative paths start from.
        num_tasks: jobs of an array; None is no array.
        most_at_once: tasks of an array that run at the same time; None is all.
        least_nodes: machines that will do; None is ``num_nodes``.
        setup: lines of shell that the user wants before the command, such as ``module load``.
    """

    name: str
    command: tuple[str, ...]
    options: SlurmOptions
    num_nodes: int
    ranks_per_node: int
    device: str
    folder: Path
    work_dir: Path
    num_tasks: int | None = None
    most_at_once: int | None = None
    least_nodes: int | None = None
    setup: str = ""

    @property
    def files(self) -> JobFiles:
        """The paths of its folder."""
        return JobFiles(self.folder)

    @property
    def nodes(self) -> str:
        """Machines, as Slurm is asked for them: ``2``, or ``2-4``."""
        least = self.least_nodes or self.num_nodes
        return str(least) if least == self.num_nodes else f"{least}-{self.num_nodes}"

    @property
    def gpus_per_node(self) -> int:
        """GPUs that it asks for on each machine."""
        return 0 if self.device == "cpu" else self.options.gpus_per_node or self.ranks_per_node

    @property
    def cpus_per_node(self) -> int:
        """CPU cores that it asks for on each machine."""
        return self.options.cpus_per_node or self.ranks_per_node
