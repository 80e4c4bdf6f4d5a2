"""What a machine must have for attention kernels and compiled layers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from support.tiny import tiny_recipe

from fsdpq.errors import EnvironmentProblemError, ExitCode
from fsdpq.launch.inputs.shrink import shrink_recipe
from fsdpq.launch.machine.kernels import check_kernels

CPU = {"device": "cpu"}
GPU = {"device": "cuda"}
COMPILED: dict[str, Any] = {"training": {"compile": True, "steps": 5}}
FLEX: dict[str, Any] = {"model": {"name_or_path": "tiny", "attn_implementation": "flex_attention"}}
FLASH: dict[str, Any] = {
    "model": {"name_or_path": "tiny", "attn_implementation": "flash_attention_2"}
}
LIGER: dict[str, Any] = {"model": {"name_or_path": "tiny", "use_liger_kernel": True}}


def tools(directory: Path, *names: str) -> dict[str, str]:
    """Returns an environment where only programs of these names are found."""
    for name in names:
        (directory / name).write_text("#!/bin/sh\n")
        (directory / name).chmod(0o755)
    return {"PATH": str(directory)}


@pytest.mark.parametrize(
    ("sections", "setting", "override"),
    [
        (FLASH, "attn_implementation: flash_attention_2", "model.attn_implementation=sdpa"),
        (FLEX, "attn_implementation: flex_attention", "model.attn_implementation=sdpa"),
        (LIGER, "use_liger_kernel: true", "model.use_liger_kernel=false"),
    ],
)
def test_kernels_for_gpus_are_refused_where_the_run_is_on_the_cpu(
    tmp_path: Path, sections: dict[str, Any], setting: str, override: str
) -> None:
    environ = tools(tmp_path, "gcc")
    with pytest.raises(EnvironmentProblemError) as caught:
        check_kernels(tiny_recipe(**sections, launch=CPU), environ)
    assert caught.value.exit_code is ExitCode.ENVIRONMENT
    assert f"`{setting}` cannot be trained with on a CPU" in caught.value.message
    assert override in caught.value.hint
    check_kernels(tiny_recipe(**sections, launch=GPU), environ)


@pytest.mark.parametrize(
    ("sections", "launch", "compiler", "language"),
    [(COMPILED, CPU, "g++", "C++"), (COMPILED, GPU, "clang", "C"), (FLEX, GPU, "gcc", "C")],
)
def test_a_missing_compiler_is_found_before_a_rank_starts(
    tmp_path: Path, sections: dict[str, Any], launch: dict[str, Any], compiler: str, language: str
) -> None:
    recipe = tiny_recipe(**sections, launch=launch)
    with pytest.raises(EnvironmentProblemError) as caught:
        check_kernels(recipe, tools(tmp_path))
    assert f"needs a {language} compiler, and there is none (looked for" in caught.value.message
    assert "apt install g++" in caught.value.hint
    check_kernels(recipe, tools(tmp_path, compiler))


def test_a_compiler_that_the_environment_names_is_the_one_looked_for(tmp_path: Path) -> None:
    environ = tools(tmp_path, "g++", "g++-14")
    recipe = tiny_recipe(**COMPILED, launch=CPU)
    check_kernels(recipe, environ | {"CXX": "g++-14"})
    with pytest.raises(EnvironmentProblemError, match="`CXX` names `g\\+\\+-99`"):
        check_kernels(recipe, environ | {"CXX": "g++-99"})


def test_a_smoke_run_replaces_what_its_machine_cannot_do_or_takes_long() -> None:
    shrunk = shrink_recipe(
        tiny_recipe(model=FLASH["model"] | LIGER["model"], training={"compile": True})
    )
    assert shrunk.recipe.model.attn_implementation == "sdpa"
    assert not shrunk.recipe.model.use_liger_kernel
    assert not shrunk.recipe.training.compile
    assert [line.partition(":")[0] for line in shrunk.replaced] == [
        "attention", "kernels", "compile",
    ]  # fmt: skip
