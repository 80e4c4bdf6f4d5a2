"""Counting GPUs without torch, and what `auto` becomes."""

import os
from pathlib import Path

import pytest

from fsdpq.errors import EnvironmentProblemError
from fsdpq.launch.machine.devices import check_bf16, count_cores, cpu_has_bf16, list_gpus
from fsdpq.launch.machine.resolve import resolve_launch
from fsdpq.recipe.load import load_recipe
from fsdpq.recipe.root import Recipe

QUICKSTART = Path(__file__).parents[3] / "recipes" / "quickstart.yaml"
NVIDIA_SMI = """\
#!/bin/sh
echo "GPU 0: NVIDIA H100 80GB HBM3 (UUID: GPU-aaaa-1111)"
echo "GPU 1: NVIDIA H100 80GB HBM3 (UUID: GPU-bbbb-2222)"
"""


@pytest.fixture
def two_gpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "nvidia-smi"
    program.write_text(NVIDIA_SMI)
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")


def recipe(*overrides: str) -> Recipe:
    return load_recipe(QUICKSTART, overrides).recipe


@pytest.mark.parametrize(
    ("visible", "count"),
    [
        (None, 2),
        ("", 0),
        (" ", 0),
        ("0", 1),
        ("1,0", 2),
        ("0,7", 1),
        ("-1", 0),
        ("GPU-bbbb", 1),
        ("GPU-cccc", 0),
    ],
)
@pytest.mark.usefixtures("two_gpus")
def test_visible_gpus_are_counted_as_cuda_does(visible: str | None, count: int) -> None:
    environ = {} if visible is None else {"CUDA_VISIBLE_DEVICES": visible}
    assert len(list_gpus(environ)) == count


def test_no_nvidia_smi_means_no_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert list_gpus({}) == []


@pytest.mark.parametrize(
    ("overrides", "num_gpus", "num_cpus", "expected"),
    [
        ((), 0, 8, ("cpu", 2, "fp32")),
        ((), 0, 1, ("cpu", 1, "fp32")),
        ((), 4, 8, ("cuda", 4, "bf16")),
        (("launch.device=cpu",), 4, 8, ("cpu", 2, "fp32")),
        (("launch.nproc_per_node=2",), 4, 8, ("cuda", 2, "bf16")),
        (("launch.nproc_per_node=3", "training.global_batch_size=12"), 0, 2, ("cpu", 3, "fp32")),
        (("model.dtype=fp32",), 1, 8, ("cuda", 1, "fp32")),
        (("model.dtype=bf16",), 0, 8, ("cpu", 2, "bf16")),
    ],
)
def test_auto_becomes_concrete(
    overrides: tuple[str, ...], num_gpus: int, num_cpus: int, expected: tuple[str, int, str]
) -> None:
    found = resolve_launch(
        recipe(*overrides), num_gpus=num_gpus, num_cpus=num_cpus, cpu_dtype="fp32"
    )
    assert (found.launch.device, found.launch.nproc_per_node, found.model.dtype) == expected


@pytest.mark.parametrize(
    ("line", "has"),
    [
        ("flags\t\t: fpu avx512f avx512_bf16 avx512vbmi", True),
        ("Features\t: fp asimd bf16 i8mm", True),
        ("flags\t\t: fpu avx512f avx512_vnni", False),
        ("model name\t: avx512_bf16 in a name is no flag", False),
    ],
)
def test_bf16_instructions_are_read_from_the_flags(tmp_path: Path, line: str, has: bool) -> None:
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text(f"processor\t: 0\n{line}\n")
    assert cpu_has_bf16(cpuinfo) is has


def test_more_ranks_than_gpus_says_both_numbers() -> None:
    with pytest.raises(EnvironmentProblemError) as caught:
        resolve_launch(recipe("launch.nproc_per_node=8"), num_gpus=2)
    assert caught.value.message == (
        "`launch.nproc_per_node` asks for 8 ranks and this machine has 2 GPUs"
    )
    assert "launch.nproc_per_node=2" in caught.value.hint
    assert "launch.device=cpu" in caught.value.hint


def test_cuda_without_a_gpu_is_refused() -> None:
    with pytest.raises(EnvironmentProblemError, match="shows no GPU"):
        resolve_launch(recipe("launch.device=cuda"), num_gpus=0)


@pytest.mark.parametrize(
    "name",
    ["Tesla T4", "Tesla V100-SXM2-16GB", "NVIDIA GeForce RTX 2080 Ti", "NVIDIA GeForce GTX 1080",
     "NVIDIA TITAN RTX", "Quadro RTX 8000", "Tesla P100-PCIE-16GB"],
)  # fmt: skip
def test_bf16_is_refused_where_a_gpu_lacks_it(name: str) -> None:
    gpus = [f"GPU 0: {name} (UUID: GPU-1)"]
    with pytest.raises(EnvironmentProblemError) as caught:
        check_bf16("bf16", gpus)
    assert f"which `GPU 0: {name}` lacks" in caught.value.message
    assert "fp16_autocast" in caught.value.hint
    check_bf16("fp32", gpus)


@pytest.mark.parametrize(
    "name",
    ["NVIDIA GeForce RTX 3090", "NVIDIA A100-SXM4-80GB", "NVIDIA H100 80GB HBM3", "NVIDIA L4",
     "NVIDIA RTX A6000", "NVIDIA GeForce RTX 4090", "NVIDIA RTX 2000 Ada Generation",
     "NVIDIA A40", "NVIDIA RTX 6000 Ada Generation", "NVIDIA B200"],
)  # fmt: skip
def test_bf16_is_welcome_where_gpus_have_it(name: str) -> None:
    check_bf16("bf16", [f"GPU 0: {name} (UUID: GPU-1)"])


@pytest.mark.parametrize(
    ("quota", "expected"),
    [
        (None, 12),
        ("max 100000", 12),
        ("400000 100000", 4),
        ("50000 100000", 1),
        ("6400000 100000", 12),
    ],
)
def test_cores_are_those_of_the_mask_and_the_container(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, quota: str | None, expected: int
) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: 64)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _pid: set(range(12)), raising=False)
    path = tmp_path / "cpu.max"
    if quota is not None:
        path.write_text(f"{quota}\n")
    assert count_cores(path) == expected
    monkeypatch.delattr(os, "sched_getaffinity")
    assert count_cores(tmp_path / "none") == 64
