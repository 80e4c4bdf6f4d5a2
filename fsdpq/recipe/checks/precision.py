"""Rules about ``fsdp.precision``: dtypes that contradict each other, or do nothing."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from fsdpq.errors import Problem
from fsdpq.recipe.checks.facts import num_ranks, precision_key, told_dtype
from fsdpq.recipe.describe import list_words
from fsdpq.recipe.precision import base_dtype, precision_options
from fsdpq.recipe.root import Recipe


def check_dtype_agrees(recipe: Recipe, _base_dir: Path) -> Iterator[Problem]:
    """A ``model.dtype`` that is not the preset's, or neither fp32 nor ``compute``."""
    dtype, options = recipe.model.dtype, precision_options(recipe.fsdp)
    if dtype == "auto" or options.compute == "auto":
        return
    allowed, does = ["fp32", options.compute], f"computes in {options.compute}"
    if isinstance(recipe.fsdp.precision, str):
        free = recipe.model_copy(
            update={"model": recipe.model.model_copy(update={"dtype": "auto"})}
        )
        allowed = [base_dtype(free, "fp32")]
        does = f"keeps weights in {allowed[0]}"
    if dtype in allowed:
        return
    key = precision_key(recipe, "compute")
    value = recipe.fsdp.precision if key == "fsdp.precision" else options.compute
    message = f"`model.dtype: {dtype}` contradicts `{key}: {value}`, which {does}"
    hint = (
        f"delete `model.dtype`, or use {list_words(dict.fromkeys(f'dtype: {d}' for d in allowed))}"
    )
    yield Problem(message, "model.dtype", hint=hint)


def check_param_trains(recipe: Recipe, _base_dir: Path) -> Iterator[Problem]:
    """Trained weights in fp16, or in bf16 beside products in fp16."""
    param, compute = precision_options(recipe.fsdp).param, told_dtype(recipe)
    key = precision_key(recipe, "param")
    if param == "fp16":
        message = (
            f"`{key}: fp16`: weights do not train in fp16, where the squares of gradients that "
        )
        message += "Adam keeps are zero below 3e-8"
        yield Problem(message, key, hint="use `param: fp32` with `compute: fp16`, or `param: bf16`")
    elif param == "bf16" and compute == "fp16":
        message = f"`{key}: bf16` beside products in fp16: each rounds away what the other keeps"
        yield Problem(message, key, hint="use `param: fp32`, or `compute: bf16`")


def check_buffers_meet_compute(recipe: Recipe, _base_dir: Path) -> Iterator[Problem]:
    """Buffers of 16 bits beside products that are not in that dtype."""
    buffers, compute = precision_options(recipe.fsdp).buffers, told_dtype(recipe)
    if buffers in ("auto", "fp32", compute):
        return
    key = precision_key(recipe, "buffers")
    message = f"`{key}: {buffers}` rounds buffers, and products are in "
    message += compute or "the dtype that the machine has"
    yield Problem(message, key, hint=f"use `buffers: fp32`, or `compute: {buffers}` beside it")


def check_reduce_sends(recipe: Recipe, _base_dir: Path) -> Iterator[Problem]:
    """Gradients rounded to bf16 for the way between ranks, on one rank."""
    if precision_options(recipe.fsdp).reduce == "bf16" and num_ranks(recipe) == 1:
        key = precision_key(recipe, "reduce")
        message = f"`{key}: bf16` only rounds gradients: with one rank nothing is sent"
        yield Problem(message, key, hint="delete `reduce`")


CHECKS = (
    check_dtype_agrees,
    check_param_trains,
    check_buffers_meet_compute,
    check_reduce_sends,
)
