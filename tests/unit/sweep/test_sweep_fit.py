"""A trial is skipped where `fsdpq train` itself would refuse, and nowhere else."""

import dataclasses
from functools import cached_property
from pathlib import Path

import pytest

from fsdpq.errors import PlanError
from fsdpq.launch.fit import refuse_early
from fsdpq.launch.plan import Hardware, parse_hardware, resolve_for
from fsdpq.launch.ready import Settled
from fsdpq.plan.case import Case
from fsdpq.plan.hardware.machine import Machine
from fsdpq.plan.shapes.find import find_shape
from fsdpq.recipe.load import load_recipe
from fsdpq.recipe.shipped import shipped_recipes
from fsdpq.sweep.choosing.expand import expand
from fsdpq.sweep.choosing.fit import why_not
from fsdpq.sweep.choosing.spec import recipe_spec
from fsdpq.sweep.trial import Trial

CARD = shipped_recipes() / "llama-2-7b-qlora-2x24gb.yaml"


class OnMachine(Settled):
    """A settled recipe on a machine that is not here."""

    place: Machine

    @cached_property
    def machine(self) -> Machine:
        return self.place


def trials(*words: str) -> list[Trial]:
    return list(expand(recipe_spec(CARD, words)).trials)


def refusal(trial: Trial, machine: Machine) -> str:
    """Returns what `fsdpq train` says on the machine, empty where it starts."""
    loaded = load_recipe(trial.source, trial.overrides)
    settled = OnMachine(loaded, resolve_for(loaded.recipe, machine)[0], [])
    object.__setattr__(settled, "place", machine)
    try:
        refuse_early(settled)
    except PlanError as error:
        return error.message
    return ""


@pytest.mark.parametrize("gpus", ["2x8GiB", "2x12GiB", "2x24GiB"])
def test_a_reason_is_that_of_the_train_command(gpus: str) -> None:
    machine = parse_hardware(Hardware(gpus=gpus))
    made = trials("data.seq_len=256,4096", "training.micro_batch_size=1,16", "adapter=lora,dora")
    ours = [why_not(trial, machine) for trial in made]
    theirs = [refusal(trial, machine) for trial in made]
    assert [reason.removeprefix("by plan ") for reason in ours] == [
        message.removeprefix("by plan the run does not fit: ") for message in theirs
    ]
    assert {bool(reason) for reason in ours} == {True, False}


def test_a_reason_has_numbers_with_units() -> None:
    [trial] = trials("quantization=none")
    reason = why_not(trial, parse_hardware(Hardware(gpus="2x8GiB")))
    assert reason.startswith("by plan a GPU needs ")
    assert "and has 8.00 GiB (" in reason


def test_a_gpu_with_just_enough_memory_is_enough() -> None:
    [trial] = trials("quantization=none")
    gpu = parse_hardware(Hardware(gpus="1x24GiB")).gpus
    assert gpu
    resolved, _ = resolve_for(trial.recipe, Machine(gpus=gpu * 2))
    shape = find_shape(trial.recipe.model.name_or_path, trial.base_dir)
    assert shape is not None
    peak = Case(shape).memory(resolved).peak_bytes
    gpus = [dataclasses.replace(gpu[0], memory_bytes=peak - missing) for missing in (0, 1)]
    reasons = [why_not(trial, Machine(gpus=(gpu, gpu))) for gpu in gpus]
    assert [bool(reason) for reason in reasons] == [False, True]


def test_ranks_without_a_gpu_are_a_reason() -> None:
    [trial] = trials("launch.nproc_per_node=4")
    reason = why_not(trial, parse_hardware(Hardware(gpus="2x24GiB")))
    assert reason == "`launch.nproc_per_node` asks for 4 ranks and there are 2 GPUs"


@pytest.mark.parametrize(
    "words",
    [
        ("launch.plan_check=false",),
        ("launch.device=cpu", "fsdp.precision=fp32"),
        ("model.name_or_path=org/unknown",),
    ],
)
def test_what_train_would_start_has_no_reason(words: tuple[str, ...]) -> None:
    made = list(expand(recipe_spec(CARD, words), smoke=False).trials)
    assert [why_not(trial, Machine(gpus=())) for trial in made] == [""]
    machine = parse_hardware(Hardware(gpus="2x1GiB"))
    assert [why_not(trial, machine) for trial in made] == [""]


def test_a_directory_that_is_no_model_is_left_to_train(tmp_path: Path) -> None:
    [trial] = trials("quantization=none")
    model = trial.recipe.model.model_copy(update={"name_or_path": str(tmp_path)})
    recipe = trial.recipe.model_copy(update={"model": model})
    machine = parse_hardware(Hardware(gpus="2x1GiB"))
    assert why_not(dataclasses.replace(trial, recipe=recipe), machine) == ""
