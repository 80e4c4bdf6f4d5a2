"""One question: this model on this machine. Its answer for any recipe, and whether that fits."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from fsdpq.plan.device import plan_device_memory
from fsdpq.plan.hardware.machine import Machine
from fsdpq.plan.host import plan_host_memory
from fsdpq.plan.result import HostMemory, RankMemory, StepTime
from fsdpq.plan.shape import ModelShape
from fsdpq.plan.time import plan_time
from fsdpq.plan.weights import Weights, plan_weights
from fsdpq.recipe.root import Recipe
from fsdpq.run_files.amounts import format_bytes


@dataclass(frozen=True)
class Memory:
    """What a recipe takes.

    Attributes:
        weights: what it stores.
        device: of rank 0.
        host: of one machine.
    """

    weights: Weights
    device: RankMemory
    host: HostMemory

    @property
    def peak_bytes(self) -> int:
        """Of rank 0 on its device."""
        return self.device.peak.total

    @property
    def host_bytes(self) -> int:
        """Of one machine at any time."""
        return self.host.peak


@dataclass(frozen=True)
class Case:
    """What is asked: a model and a machine.

    Attributes:
        shape: of the model.
        machine: that it is for; what is not known of it cannot be short.
        num_rows: training rows, None where they are not known.
        base_dir: directory that the recipe's relative paths start from.
    """

    shape: ModelShape
    machine: Machine = field(default_factory=Machine)
    num_rows: int | None = None
    base_dir: Path = field(default_factory=Path)

    def memory(self, recipe: Recipe) -> Memory:
        """Returns what a resolved recipe takes."""
        weights = plan_weights(recipe, self.shape)
        return Memory(
            weights,
            plan_device_memory(recipe, self.shape, weights),
            plan_host_memory(recipe, self.shape, weights),
        )

    def time(self, recipe: Recipe, memory: Memory) -> StepTime:
        """Returns how long a step of a resolved recipe takes."""
        ram = self.machine.ram_bytes
        return plan_time(
            recipe,
            self.shape,
            memory.weights,
            self.machine,
            self.num_rows,
            free_ram_bytes=None if ram is None else ram - memory.host.total,
        )

    def fits(self, recipe: Recipe, memory: Memory) -> bool | None:
        """Whether it fits; None where neither GPUs nor host memory are known."""
        on_cpu = recipe.launch.device == "cpu"
        device_known = on_cpu or self.machine.gpu_bytes is not None
        if self.shortages(recipe, memory):
            return False
        return True if device_known and (not on_cpu or self.machine.ram_bytes) else None

    def shortages(self, recipe: Recipe, memory: Memory) -> tuple[str, ...]:
        """Returns what does not fit, one sentence each."""
        found: list[str] = []
        machine, on_cpu = self.machine, recipe.launch.device == "cpu"
        if machine.gpus and not on_cpu:
            ranks, gpus = int(recipe.launch.nproc_per_node), len(machine.gpus)
            if ranks > gpus:
                there = "there is 1 GPU" if gpus == 1 else f"there are {gpus} GPUs"
                found.append(f"`launch.nproc_per_node` asks for {ranks} ranks and {there}")
            if memory.peak_bytes > (has := machine.gpu_bytes or 0):
                found.append(_needs("a GPU", memory.peak_bytes, has))
        if machine.ram_bytes is not None and memory.host_bytes > machine.ram_bytes:
            found.append(_needs("the host", memory.host_bytes, machine.ram_bytes))
        return tuple(found)


def _needs(what: str, needed: int, has: int) -> str:
    return f"{what} needs {format_bytes(needed)} and has {format_bytes(has)}"
