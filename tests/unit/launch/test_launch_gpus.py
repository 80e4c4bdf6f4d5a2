"""What ``nvidia-smi`` tells about GPUs, read from a program that answers as it does."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.nvidia_smi import install_nvidia_smi

from fsdpq.launch.machine.devices import list_gpus
from fsdpq.launch.machine.gpus import MORE_FIELDS, GpuFacts, query_gpus
from fsdpq.launch.machine.hardware import describe_hardware
from fsdpq.launch.machine.nvidia_smi import ask_nvidia_smi, query_table

MIB = 2**20


def test_facts_of_a_gpu_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install_nvidia_smi(tmp_path, monkeypatch, [{}, {"pcie.link.width.current": "4"}])
    first, second = query_gpus()
    assert first == GpuFacts(
        index=0, uuid="GPU-0000", name="NVIDIA GeForce RTX 4090", memory_bytes=24564 * MIB,
        free_bytes=24076 * MIB, driver="580.65.06", compute_capability=(8, 9), pcie_generation=4,
        pcie_width=16, pcie_max_width=16, ecc=False, mig=None, power_limit_w=450.0,
        default_power_limit_w=450.0, bus_id="00000000:01:00.0",
    )  # fmt: skip
    assert (second.index, second.pcie_width, second.bus_id) == (1, 4, "00000000:02:00.0")
    assert [gpu.label for gpu in (first, second)] == list_gpus()


@pytest.mark.parametrize(
    ("visible", "indices"), [("1,0", [1, 0]), ("GPU-0001", [1]), ("0,7", [0]), ("", []), (" ", [])]
)
def test_gpus_are_those_that_are_visible_in_their_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, visible: str, indices: list[int]
) -> None:
    install_nvidia_smi(tmp_path, monkeypatch, [{}, {}])
    assert [gpu.index for gpu in query_gpus({"CUDA_VISIBLE_DEVICES": visible})] == indices


def test_old_driver_that_lacks_fields_still_tells_the_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lacking: dict[str, str | None] = dict.fromkeys(MORE_FIELDS, None)
    install_nvidia_smi(tmp_path, monkeypatch, [lacking])
    [gpu] = query_gpus()
    assert (gpu.memory_bytes, gpu.compute_capability) == (24564 * MIB, None)


def test_what_the_driver_does_not_say_is_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said = {
        "name": "NVIDIA GB10", "memory.total": "[N/A]", "memory.free": "[Not Supported]",
        "power.limit": "[N/A]", "ecc.mode.current": "[N/A]", "mig.mode.current": "Enabled",
    }  # fmt: skip
    install_nvidia_smi(tmp_path, monkeypatch, [said])
    [gpu] = query_gpus()
    assert (gpu.memory_bytes, gpu.free_bytes, gpu.power_limit_w, gpu.ecc) == (None,) * 4
    assert gpu.mig is True


def test_lost_gpu_is_not_counted_and_a_part_of_one_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install_nvidia_smi(tmp_path, monkeypatch, [{}, {"name": "[Unknown Error]"}])
    assert [gpu.index for gpu in query_gpus()] == [0]
    [part] = query_gpus({"CUDA_VISIBLE_DEVICES": "MIG-1234"})
    assert (part.uuid, part.memory_bytes, part.mig) == ("MIG-1234", None, True)


def test_program_that_is_missing_or_fails_tells_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert query_gpus({}) == []
    install_nvidia_smi(tmp_path, monkeypatch, [{}])
    assert ask_nvidia_smi("--no-such-option") is None
    assert query_table(("no.such.field",)) is None
    assert query_table(("pid",), of="compute-apps") == []


def test_driver_of_the_first_gpu_goes_into_the_run_lock(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install_nvidia_smi(tmp_path, monkeypatch, [{}])
    assert describe_hardware(list_gpus())["gpu_driver"] == "580.65.06"
