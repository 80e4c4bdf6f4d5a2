"""What the doctor says about host, disks, network and environment."""

from __future__ import annotations

import resource
import socket
from collections import namedtuple
from collections.abc import Mapping
from pathlib import Path

import pytest
from support.nvidia_smi import install_nvidia_smi

from fsdpq.launch.doctor import FAIL, OK, WARN, Finding, disks, host, network
from fsdpq.launch.doctor.environment import find_environment
from fsdpq.launch.machine import this_machine
from fsdpq.launch.machine.gpus import GpuFacts, query_gpus

Usage = namedtuple("Usage", "total used free")
TWO = [GpuFacts(number, f"GPU-{number}", "NVIDIA L4") for number in range(2)]


def usage_of(free: int) -> Usage:
    return Usage(10**12, 10**12 - free, free)


@pytest.mark.parametrize(("free", "status"), [(10**8, FAIL), (10**9, WARN), (10**11, OK)])
def test_disk_is_that_of_the_nearest_directory_that_exists(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, free: int, status: str
) -> None:
    asked: list[Path] = []

    def disk_usage(path: Path) -> Usage:
        asked.append(path)
        return usage_of(free)

    monkeypatch.setattr(disks.shutil, "disk_usage", disk_usage)
    monkeypatch.setattr(disks, "file_system_kind", lambda _place: "ext4")
    found = disks.disk_finding("cache", tmp_path / "not" / "there", "move it")
    assert (found.status, asked) == (status, [tmp_path])
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("kind", "status", "says"),
    [("ext4", OK, "(ext4)"), ("overlay", OK, "(overlay)"), ("", OK, "free for"),
     ("nfs4", WARN, "(nfs4): slow to load"), ("tmpfs", WARN, "(tmpfs): it takes host memory")],
)  # fmt: skip
def test_kind_of_file_system_counts(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, kind: str, status: str, says: str
) -> None:
    mounts = tmp_path / "mounts"
    line = f"server:/x {tmp_path}/with\\040space {kind} rw 0 0\n" if kind else ""
    mounts.write_text(f"proc /proc proc rw 0 0\n{line}")
    monkeypatch.setattr(disks, "MOUNTS", mounts)
    monkeypatch.setattr(disks.shutil, "disk_usage", lambda _path: usage_of(10**11))
    place = tmp_path / "with space" / "deeper"
    place.mkdir(parents=True)
    found = disks.disk_finding("cache", place, "move it")
    assert found.status == status
    assert says in found.value


def test_directory_that_cannot_be_written_is_a_failure(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(disks, "can_write", lambda _directory: False)
    found = disks.disk_finding("runs", tmp_path, "give `--run-dir`")
    assert (found.status, found.remedy) == (FAIL, "give `--run-dir`")


def test_speed_of_the_disk_is_tried_with_a_file_that_is_gone_again(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    written, read = disks.measure_disk(tmp_path, num_bytes=disks.BLOCK_BYTES, seconds=0.2)
    assert written > 1e6
    assert read > 1e6
    assert not list(tmp_path.iterdir())
    monkeypatch.setattr(disks, "cache_root", lambda: tmp_path)
    for rate, status, says in ((50e6, WARN, "reads 50.0 MB/s"), (3.7e9, OK, "reads 20 s a step")):
        monkeypatch.setattr(disks, "measure_disk", lambda _place, rate=rate: (1e9, rate))
        [found] = disks.find_disk_speed()
        assert found.status == status
        assert says in found.value

    def fail(_place: Path) -> tuple[float, float]:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(disks, "measure_disk", fail)
    [found] = disks.find_disk_speed()
    assert (found.status, "Input/output error" in found.value) == (WARN, True)


def test_memory_is_what_the_container_may_use(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    limit = tmp_path / "memory.max"
    limit.write_text("2000000000\n")
    monkeypatch.setattr(this_machine, "CGROUP_LIMITS", (tmp_path / "none", limit))
    [found] = host.find_memory()
    assert found.status == WARN
    assert "of 2.0 GB (the container's limit), " in found.value
    for no_limit in ("max\n", "9223372036854771712\n"):
        limit.write_text(no_limit)
        [found] = host.find_memory()
        assert "container" not in found.value


def test_windows_underneath_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    version = tmp_path / "version"
    monkeypatch.setattr(host, "KERNEL_VERSION", version)
    version.write_text("Linux version 6.6.87.2-microsoft-standard-WSL2 (root@x) (gcc)\n")
    [found] = host.find_wsl()
    assert (found.status, ".wslconfig" in found.remedy) == (WARN, True)
    version.write_text("Linux version 6.8.0-47-generic (root@y)\n")
    assert list(host.find_wsl()) == []


def limits_found(
    monkeypatch: pytest.MonkeyPatch, limits: Mapping[int, int], gpus: list[GpuFacts]
) -> list[Finding]:
    endless = resource.RLIM_INFINITY
    monkeypatch.setattr(
        host.resource, "getrlimit", lambda kind: (limits.get(kind, endless), endless)
    )
    return list(host.find_limits(gpus))


def test_limits_of_the_system_are_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(host, "OVERCOMMIT", tmp_path / "overcommit")
    monkeypatch.setattr(host, "SHARED_MEMORY", tmp_path)
    monkeypatch.setattr(host.shutil, "disk_usage", lambda _path: Usage(64 * 10**6, 0, 0))
    assert limits_found(monkeypatch, {}, []) == []
    (tmp_path / "overcommit").write_text("2\n")
    limits = {resource.RLIMIT_AS: 10**9, resource.RLIMIT_DATA: 10**11, resource.RLIMIT_NOFILE: 256}
    found = limits_found(monkeypatch, limits, TWO)
    assert [(f.name, f.status) for f in found] == [
        ("RLIMIT_AS", FAIL), ("RLIMIT_DATA", WARN), ("open files", WARN), ("overcommit", WARN),
        ("shared memory", WARN),
    ]  # fmt: skip
    assert "`ulimit -v unlimited`" in found[0].remedy


def test_names_that_lead_nowhere_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    assert network.connect_problem("127.0.0.1") == ""
    monkeypatch.setattr(network.socket, "gethostname", lambda: "no-such-machine.invalid")
    ports, name = network.find_network()
    assert (ports.status, name.status) == (OK, WARN)
    assert "/etc/hosts" in name.remedy

    def refuse(*_given: object, **_more: object) -> socket.socket:
        raise ConnectionRefusedError(111, "Connection refused")

    monkeypatch.setattr(network.socket, "create_connection", refuse)
    found = next(iter(network.find_network()))
    assert (found.status, "Connection refused" in found.value) == (FAIL, True)


@pytest.mark.parametrize(
    ("environ", "name", "status"),
    [
        ({}, None, OK),
        ({"CUDA_VISIBLE_DEVICES": ""}, "CUDA_VISIBLE_DEVICES", WARN),
        ({"CUDA_VISIBLE_DEVICES": "0,7"}, "CUDA_VISIBLE_DEVICES", WARN),
        ({"CUDA_VISIBLE_DEVICES": "1,0"}, None, OK),
        ({"CUDA_LAUNCH_BLOCKING": "1"}, "CUDA_LAUNCH_BLOCKING", WARN),
        ({"CUDA_LAUNCH_BLOCKING": "0"}, None, OK),
        ({"NCCL_P2P_DISABLE": "1"}, "NCCL_P2P_DISABLE", WARN),
        ({"BNB_CUDA_VERSION": "126"}, "BNB_CUDA_VERSION", WARN),
        ({"NCCL_SOCKET_IFNAME": "nosuch0"}, "NCCL_SOCKET_IFNAME", FAIL),
        ({"NCCL_SOCKET_IFNAME": "^docker", "GLOO_SOCKET_IFNAME": "lo"}, None, OK),
        ({"PYTORCH_CUDA_ALLOC_CONF": "max_split_size_mb:64"}, "PYTORCH_CUDA_ALLOC_CONF", WARN),
        ({"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"}, None, OK),
    ],
)
def test_odd_variables_are_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    environ: dict[str, str], name: str | None, status: str,
) -> None:  # fmt: skip
    install_nvidia_smi(tmp_path, monkeypatch, [{}, {}])
    found = list(find_environment(query_gpus(environ), environ))
    assert [(f.name, f.status) for f in found] == ([] if name is None else [(name, status)])


def test_variables_that_hang_on_other_things(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install_nvidia_smi(tmp_path, monkeypatch, [{}, {"name": "NVIDIA L4"}])
    (tmp_path / "libcudart.so.11.0").touch()
    environ = {"CUDA_VISIBLE_DEVICES": "0,1", "LD_LIBRARY_PATH": f"/none::{tmp_path}"}
    order, libraries = find_environment(query_gpus(environ), environ)
    assert order.remedy == "set CUDA_DEVICE_ORDER=PCI_BUS_ID"
    assert "libcudart.so.11.0" in libraries.value
    assert list(find_environment([], {"CUDA_LAUNCH_BLOCKING": "1"})) == [], "there is no GPU"
