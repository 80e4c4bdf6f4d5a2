"""Which parts run, in which order, which at the same time, and for how long at most."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Task:
    """A process.

    Attributes:
        part: a name of `PARTS`.
        seconds: that it gets.
        tiny: with shapes that only try the code.
    """

    part: str
    seconds: float
    tiny: bool = False


PARTS = {
    "copies": "scripts.gpu.parts.copies:run",
    "bases": "scripts.gpu.parts.bases:run",
    "self-test": "scripts.gpu.parts.commands:self_test",
    "gpu-tests": "scripts.gpu.parts.commands:gpu_tests",
    "train": "scripts.gpu.parts.commands:train",
    "isolation": "scripts.gpu.parts.packing:isolation",
    "packing": "scripts.gpu.parts.packing:cost",
    "seven": "scripts.gpu.parts.seven:variants",
    "stock": "scripts.gpu.parts.seven:contenders",
    "seventy": "scripts.gpu.parts.seventy:offloaded",
    "whole": "scripts.gpu.parts.seventy:on_device",
    "stock70": "scripts.gpu.parts.seven:contender_70b",
    "trace": "scripts.gpu.parts.trace:run",
    "plan": "scripts.gpu.parts.proof:foretell",
    "traces": "scripts.gpu.parts.proof:traces",
    "pinned70": "scripts.gpu.parts.alone:pinned",
    "disk70": "scripts.gpu.parts.alone:disk",
    "few-cards": "scripts.gpu.parts.proof:few_cards",
    "first": "scripts.gpu.parts.proof:first_recipe",
}
"""Functions of a `Bench`, by the name of the part."""

Stage = tuple[Task, ...]
"""Tasks that run at the same time: nothing in it is timed, or there is one only."""

_TIMED = ("packing", "seven", "stock", "seventy", "whole", "stock70", "trace")

_PROOF = {"plan": 60, "pinned70": 330, "few-cards": 150, "disk70": 240, "first": 180}
"""Seconds that each gets at most, the most important first; they should need two thirds of it."""

_CHECKS = ("self-test", "gpu-tests", "isolation", "bases", "train")

PLANS: dict[str, tuple[Stage, ...]] = {
    "smoke": (
        tuple(Task(part, 300, tiny=True) for part in (*_CHECKS, *_TIMED, *_PROOF)),
        (Task("copies", 60),),
    ),
    "full": (
        tuple(Task(part, 300) for part in _CHECKS),
        (Task("copies", 60),),
        *((Task(part, 400),) for part in _TIMED),
    ),
    "traces": ((Task("traces", 3600),),),
    "proof": tuple((Task(part, seconds),) for part, seconds in _PROOF.items()),
}
