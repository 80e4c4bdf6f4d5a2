"""The flow of ``fsdpq plan``: a recipe, the shape of its model and a machine, and what they mean.

Nothing is downloaded but, for a model that is neither here nor among the shipped cards, its
``config.json`` and the headers of its weights. Rows are never fetched.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from fsdpq.errors import CheckpointError, FsdpqError, UsageError
from fsdpq.fetch.cache_entries import parse_size
from fsdpq.fetch.hub import REPOSITORY_PATTERN
from fsdpq.fetch.hub_shape import shape_from_hub
from fsdpq.launch.machine.cpu_rates import kept_cpu_dtype
from fsdpq.launch.machine.resolve import resolve_launch
from fsdpq.launch.machine.this_machine import describe_this_machine
from fsdpq.plan.build import Wanted, build_plan
from fsdpq.plan.case import Case
from fsdpq.plan.hardware.gpus import parse_gpus
from fsdpq.plan.hardware.machine import Machine
from fsdpq.plan.result import Edit, Plan
from fsdpq.plan.shape import ModelShape
from fsdpq.plan.shapes.find import find_shape
from fsdpq.plan.traced import Traced
from fsdpq.recipe.checks.facts import model_directory
from fsdpq.recipe.load import LoadedRecipe, load_recipe
from fsdpq.recipe.precision import compute_dtype
from fsdpq.recipe.root import Recipe

MIN_RATE = 1e6
"""Bytes/s that a disk or network does at least; less is a unit that was left out."""


@dataclass(frozen=True)
class Hardware:
    """The options of the command line that describe a machine, as they were given.

    Attributes:
        gpus: ``2x24GiB``.
        ram: ``64GiB``.
        disk: bytes a second, ``5GB/s``.
        network: bytes a second between machines, ``12.5GB/s``.
        price: of an hour, in any currency.
    """

    gpus: str | None = None
    ram: str | None = None
    disk: str | None = None
    network: str | None = None
    price: float | None = None


@dataclass(frozen=True)
class Planned:
    """A recipe that can be planned.

    Attributes:
        loaded: as given.
        recipe: resolved for the machine.
        shape: of its model.
        machine: that the plan is for.
        notes: what was decided on the way.
    """

    loaded: LoadedRecipe
    recipe: Recipe
    shape: ModelShape
    machine: Machine
    notes: tuple[str, ...]

    def build(self, wanted: Wanted | None = None) -> Plan:
        """Returns the plan; every edit in it was loaded and planned as it would be given."""
        plan = build_plan(
            self.recipe,
            self.shape,
            self.machine,
            num_rows=count_rows(self.recipe),
            base_dir=self.loaded.base_dir,
            accumulation=self.loaded.recipe.training.gradient_accumulation_steps,
            notes=self.notes,
            wanted=wanted,
        )
        return replace(plan, edits=tuple(edit for edit in plan.edits if self.works(edit)))

    def trace(self) -> Traced:
        """Returns what the worker's own step takes under fake tensors; minutes for a large model.

        Raises:
            FsdpqError: it cannot be traced; says why.
        """
        from fsdpq.launch.plan_runs import trace_recipe

        return trace_recipe(self.recipe, self.shape, config_dir=self._directory)

    def measure(self) -> Traced:
        """Returns what rank 0 takes for real, on the first GPU of this machine.

        Raises:
            FsdpqError: it cannot be measured; says why.
        """
        from fsdpq.launch.plan_runs import measure_recipe

        return measure_recipe(self.recipe, self.shape, config_dir=self._directory)

    @property
    def _directory(self) -> Path | None:
        """The model's directory, None where its name is no directory of this machine."""
        return model_directory(self.recipe, self.loaded.base_dir)

    def works(self, edit: Edit) -> bool:
        """Whether the recipe loads with the edit as an override, and then takes what it says."""
        overrides = (*self.loaded.overrides, *edit.settings)
        try:
            loaded = load_recipe(self.loaded.path, overrides)
        except FsdpqError:
            return False
        recipe, _ = resolve_for(loaded.recipe, self.machine)
        case = Case(self.shape, self.machine)
        memory = case.memory(recipe)
        return case.fits(recipe, memory) is True and memory.peak_bytes == edit.peak_bytes


def prepare_plan(path: Path, overrides: Sequence[str], hardware: Hardware) -> Planned:
    """Returns all that the plan of the recipe at ``path`` follows from.

    Raises:
        RecipeError: it has mistakes.
        UsageError: the hardware cannot be read, or the model's shape cannot be known.
        FetchError: the hub cannot be asked for it.
    """
    machine = parse_hardware(hardware)
    loaded = load_recipe(path, overrides)
    recipe, notes = resolve_for(loaded.recipe, machine)
    if recipe.launch.device == "cuda" and machine.is_this and not machine.gpus:
        machine = replace(machine, gpus=None, ram_bytes=None, is_this=False)
        notes.append("this machine has no GPU: `--gpus 2x24GiB --ram 64GiB` says whether it fits")
    return Planned(
        loaded, recipe, shape_of(loaded), machine, (*notes, *_machine_notes(recipe, machine))
    )


def parse_hardware(given: Hardware) -> Machine:
    """Returns the machine that the options describe; where none does, this one.

    Raises:
        UsageError: one of them cannot be read.
    """
    machine = describe_this_machine() if given.gpus is None else Machine(parse_gpus(given.gpus))
    if given.ram is not None:
        machine = replace(machine, ram_bytes=_ram(given.ram), is_this=False)
    return replace(
        machine,
        disk_bandwidth=_rate(given.disk, "--disk", "5GB/s"),
        network_bandwidth=_rate(given.network, "--network", "12.5GB/s"),
        price_per_hour=given.price,
    )


def resolve_for(
    recipe: Recipe, machine: Machine, *, cpu_dtype: str | None = None
) -> tuple[Recipe, list[str]]:
    """Returns the recipe resolved for a machine that need not be this one, and notes about it.

    Args:
        recipe: as it was loaded.
        machine: that it is for.
        cpu_dtype: what ``model.dtype: auto`` is on a CPU, by default what this CPU was found to be
            faster in.
    """
    launch, gpus = recipe.launch, machine.gpus or ()
    asked = launch.nproc_per_node
    on_cpu = launch.device == "cpu" or (launch.device == "auto" and not gpus and asked == "auto")
    notes: list[str] = []
    if on_cpu:
        if gpus:
            notes.append("`launch.device` is `cpu`: no GPU is used")
        elif launch.device == "auto":
            notes.append("there is no GPU, so it is planned for the CPU: `--gpus 1x24GiB` plans")
            notes[-1] += " for one"
        dtype = cpu_dtype or kept_cpu_dtype()
        return resolve_launch(recipe, num_gpus=0, cpu_dtype=dtype), notes
    number = len(gpus) if asked == "auto" else asked
    if gpus and number < len(gpus):
        notes.append(f"`launch.nproc_per_node` is {number}, so {len(gpus) - number} of the")
        notes[-1] += f" {len(gpus)} GPUs are not used"
    wanted = recipe.model_copy(update={"launch": launch.model_copy(update={"device": "cuda"})})
    return resolve_launch(wanted, num_gpus=max(1, number)), notes


def shape_of(loaded: LoadedRecipe) -> ModelShape:
    """Returns the shape of the recipe's model: of its directory, its card, or the hub's headers.

    Raises:
        UsageError: it cannot be told; says why.
        FetchError: the hub cannot be asked.
    """
    model = loaded.recipe.model
    try:
        shape = find_shape(model.name_or_path, loaded.base_dir)
        if shape is None and REPOSITORY_PATTERN.fullmatch(model.name_or_path):
            shape = shape_from_hub(model.name_or_path, revision=model.revision)
    except CheckpointError as error:
        raise UsageError(error.message, hint=error.hint) from error
    if shape is None:
        message = f"the shape of `{model.name_or_path}` is not known"
        hint = "name a directory of this machine, or a model of `fsdpq kinds model`"
        raise UsageError(message, hint=hint)
    return shape


def count_rows(recipe: Recipe) -> int | None:
    """Returns the training rows of an epoch, at most; None where only the data itself says."""
    return recipe.data.max_rows


def _machine_notes(recipe: Recipe, machine: Machine) -> Iterator[str]:
    """Yields what a machine cannot do, and what is not known of it."""
    if machine.gpus and not machine.gpus[0].has_bf16 and compute_dtype(recipe) == "bf16":
        yield (
            f"`fsdpq train` refuses bf16 on a {machine.gpus[0].name}, which lacks it: "
            "`fsdp.precision=fp16_autocast` computes in fp16 and scales the loss"
        )
    if machine.gpus and machine.gpus[0].bf16_flops is None:
        yield "how fast the GPU is is not known: name it, as in `--gpus 2xRTX4090`, for times"
    if machine.gpus and machine.ram_bytes is None:
        yield "host memory is not known: `--ram 64GiB` says whether it is enough"


def _ram(text: str) -> int:
    """Returns the bytes of ``64GiB``; memory that is sold as 64 GB has 64 GiB too."""
    plain = text.strip().lower().removesuffix("b").removesuffix("i").removesuffix("g").strip()
    return _size(f"{plain}GiB" if plain.isdecimal() else text, "--ram", "64GiB")


def _size(text: str, option: str, example: str) -> int:
    try:
        return parse_size(text)
    except UsageError as error:
        message = f"`{option} {text}` is no size"
        raise UsageError(message, hint=f"write it like `{option} {example}`") from error


def _rate(text: str | None, option: str, example: str) -> float | None:
    if text is None:
        return None
    rate = float(_size(text.removesuffix("/s"), option, example))
    if rate < MIN_RATE:
        message = f"`{option} {text}` is less than a megabyte a second"
        raise UsageError(message, hint=f"write it like `{option} {example}`")
    return rate
