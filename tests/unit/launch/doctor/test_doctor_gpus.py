"""What the doctor says about GPUs, for machines that ``nvidia-smi`` describes."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.nvidia_smi import GPU, install_nvidia_smi

from fsdpq.launch.doctor import FAIL, OK, WARN, Finding, gpus
from fsdpq.launch.doctor.gpus import (
    find_driver,
    find_gpus,
    find_links,
    find_processes,
    read_topology,
)
from fsdpq.launch.machine.gpus import query_gpus

H100 = {"name": "NVIDIA H100 80GB HBM3", "compute_cap": "9.0", "memory.total": "81559 MiB",
        "memory.free": "81000 MiB", "pcie.link.gen.max": "5", "ecc.mode.current": "Enabled",
        "power.limit": "500.00 W", "power.default_limit": "700.00 W"}  # fmt: skip
TOPOLOGY = (
    "\t\x1b[4mGPU0\tGPU1\tNIC0\tCPU Affinity\tNUMA Affinity\tGPU NUMA ID\x1b[0m\n"
    "GPU0\t X \t{way}\tPXB\t0-47\t0\t\tN/A\n"
    "GPU1\t{way}\t X \tSYS\t0-47\t0\t\tN/A\n"
    "NIC0\tPXB\tSYS\t X \t\t\t\t\n\n"
    "Legend:\n\n  X    = Self\n"
)


@pytest.fixture(autouse=True)
def torch_for_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpus, "torch_cuda", lambda: "13.0")


def test_gpus_are_described(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install_nvidia_smi(tmp_path, monkeypatch, [H100])
    assert [*find_driver(query_gpus()), *find_gpus(query_gpus())] == [
        Finding("GPUs", "driver", OK, "580.65.06"),
        Finding(
            "GPUs", "GPU 0", OK,
            "NVIDIA H100 80GB HBM3, 79.1 of 79.6 GiB free, PCIe 5.0 x16, 500 of 700 W, ECC",
        ),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("given", "name", "says", "do"),
    [
        ({"name": "Tesla T4", "compute_cap": "7.5"}, "GPU 0", "without bf16", "fp16_autocast"),
        ({"compute_cap": "7.0"}, "GPU 0", "without bf16", "fp16_autocast"),
        ({"memory.free": "9000 MiB"}, "GPU 0", "8.8 of 24.0 GiB free", "CUDA_VISIBLE_DEVICES"),
        ({"pcie.link.width.current": "4"}, "GPU 0 lanes", "4 of its 16 PCIe lanes", "slot"),
    ],
)
def test_what_is_odd_about_a_gpu_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    given: dict[str, str], name: str, says: str, do: str,
) -> None:  # fmt: skip
    install_nvidia_smi(tmp_path, monkeypatch, [given])
    [odd] = [finding for finding in find_gpus(query_gpus()) if finding.status != OK]
    assert (odd.name, odd.status) == (name, WARN)
    assert says in odd.value
    assert do in odd.remedy


def test_split_and_mixed_gpus_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install_nvidia_smi(tmp_path, monkeypatch, [H100 | {"mig.mode.current": "Enabled"}, {}])
    odd = [finding for finding in find_gpus(query_gpus()) if finding.status != OK]
    assert [finding.name for finding in odd] == ["GPU 0 parts", "kinds"]
    assert f"{GPU['name']} has least memory" in odd[1].value


def test_cpu_build_of_torch_beside_a_gpu_is_a_failure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install_nvidia_smi(tmp_path, monkeypatch, [{}])
    monkeypatch.setattr(gpus, "torch_cuda", lambda: "")
    [failed] = [finding for finding in find_gpus(query_gpus()) if finding.status == FAIL]
    assert failed.name == "CUDA"


def test_card_without_a_driver_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for number, (vendor, kind) in enumerate(
        [("0x10de", "0x030000"), ("0x10de", "0x040300"), ("0x1002", "0x030000")]
    ):
        device = tmp_path / f"0000:0{number}:00.0"
        device.mkdir()
        (device / "vendor").write_text(f"{vendor}\n")
        (device / "class").write_text(f"{kind}\n")
    monkeypatch.setattr(gpus, "PCI_DEVICES", tmp_path)
    [found] = find_driver([])
    assert (found.status, found.value) == (
        WARN, "PCI shows 1 NVIDIA card and `nvidia-smi` shows none",
    )  # fmt: skip
    assert "--gpus all" in found.remedy
    monkeypatch.setattr(gpus, "PCI_DEVICES", tmp_path / "none")
    assert list(find_driver([])) == []
    assert [finding.status for finding in find_gpus([])] == [WARN]


@pytest.mark.parametrize(
    ("way", "says"),
    [("NV18", "NVLink between all (NV18)"),
     ("PHB", "between GPUs: over the processor's PCIe host (PHB)"),
     ("SYS", "between GPUs: over the link between processors (SYS)")],
)  # fmt: skip
def test_ways_between_gpus_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, way: str, says: str
) -> None:
    texts = {("topo", "-m"): TOPOLOGY.format(way=way)}
    install_nvidia_smi(tmp_path, monkeypatch, [{}, {}], texts=texts)
    assert list(find_links(query_gpus())) == [Finding("GPUs", "links", OK, says)]
    assert read_topology(texts["topo", "-m"])["GPU0", "GPU1"] == way
    assert list(find_links(query_gpus()[:1])) == []
    install_nvidia_smi(tmp_path, monkeypatch, [{}, {}])
    assert list(find_links(query_gpus())) == [], "a driver that does not answer"


def test_programs_on_visible_gpus_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    app = {"gpu_uuid": "GPU-0000", "pid": "4711", "process_name": "/usr/bin/python, old",
           "used_memory": "1024 MiB"}  # fmt: skip
    other = app | {"gpu_uuid": "GPU-0001", "pid": "5"}
    hidden = app | {"pid": "6", "process_name": "[Insufficient Permissions]",
                    "used_memory": "[N/A]"}  # fmt: skip
    install_nvidia_smi(
        tmp_path, monkeypatch, [{}, {}], apps=[app | {"process_name": "py"}, other, hidden]
    )
    found = list(find_processes(query_gpus({"CUDA_VISIBLE_DEVICES": "0"})))
    assert [(f.name, f.value) for f in found] == [
        ("process 4711", "computes on GPU 0: py, 1.1 GB"),
        ("process 6", "computes on GPU 0: no name"),
    ]
