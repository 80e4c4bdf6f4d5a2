"""What the doctor makes of what a program with torch finds, hangs at, or dies of."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fsdpq.launch.doctor import FAIL, OK, WARN, Finding
from fsdpq.launch.doctor.device import Probed, explain_probed, read_probed, run_probe
from fsdpq.launch.machine.gpus import GpuFacts

RTX_4090 = [
    GpuFacts(n, f"GPU-{n}", "NVIDIA GeForce RTX 4090", pcie_generation=4, pcie_width=16)
    for n in range(2)
]
RIGHT = {
    "torch": {"version": "2.13.0", "cuda": "13.0", "gpus": 2, "cudnn": 91400, "nccl": "2.28.9",
              "seconds": 2.04},
    "products cuda:0": {"different": 0, "entries": 65536},
    "products cuda:1": {"different": 0, "entries": 65536},
    "pinned": {"pinned_bytes": 2**32, "failure": ""},
    "host cuda:0": {"to_device": 25e9, "from_device": 24e9, "different": 0, "pinned": True},
    "host cuda:1": {"to_device": 25e9, "from_device": 24e9, "different": 0, "pinned": True},
    "peer cuda:0 cuda:1": {"access": True, "different": 0, "bytes_per_s": 21e9},
    "peer cuda:1 cuda:0": {"access": True, "different": 0, "bytes_per_s": 20e9},
    "import triton": {"version": "3.6.0"},
}  # fmt: skip


def explained(**changes: dict[str, object]) -> list[Finding]:
    rows = RIGHT | {name.replace("__", " "): row for name, row in changes.items()}
    return list(explain_probed(Probed(rows), RTX_4090))


def test_what_is_right_is_said_in_one_line_each() -> None:
    assert [(f.name, f.status, f.value) for f in explained()] == [
        ("torch", OK, "imported in 2.0 s, CUDA 13.0, cuDNN 91400, NCCL 2.28.9"),
        ("bf16 products", OK, "exact (2 GPUs)"),
        ("pinned memory", OK, "4.3 GB at least"),
        ("host and cuda:0", OK, "25.0 GB/s to it, 24.0 GB/s back"),
        ("host and cuda:1", OK, "25.0 GB/s to it, 24.0 GB/s back"),
        ("peer copies", OK, "2 pairs right, directly, 20.0 GB/s at least"),
    ]


@pytest.mark.parametrize(
    ("name", "row", "title", "status", "says", "do"),
    [
        ("torch", {"error": "OSError: libcudart.so.13"}, "torch", FAIL, "libcudart", "reinstall"),
        ("torch", {"cuda": "13.0", "gpus": 0, "why_no_cuda": "driver too old", "seconds": 1.0},
         "torch", FAIL, "driver too old", "driver"),
        ("torch", {"cuda": "13.0", "gpus": 1, "seconds": 1.0}, "torch", FAIL, "1 of 2 GPUs",
         "restart"),
        ("products cuda:1", {"different": 3, "entries": 65536}, "products cuda:1", FAIL,
         "3 of 65536", "do not train"),
        ("products cuda:1", {"error": "RuntimeError: no kernel image"}, "products cuda:1", FAIL,
         "no kernel image", "built for this GPU"),
        ("pinned", {"pinned_bytes": 2**29, "failure": "CUDA error: invalid argument"},
         "pinned memory", WARN, "fails after 536.9 MB: CUDA error", ".wslconfig"),
        ("host cuda:1", {"to_device": 3e9, "from_device": 3e9, "different": 0, "pinned": True},
         "host and cuda:1", WARN, "could do 31.5 GB/s", "slot"),
        ("host cuda:1", {"to_device": 25e9, "from_device": 25e9, "different": 9, "pinned": True},
         "host and cuda:1", FAIL, "9 bytes arrive wrong", "do not train"),
        ("peer cuda:1 cuda:0", {"access": True, "different": 5, "bytes_per_s": 1e9},
         "peer copies", FAIL, "1 of 2 pairs, the first cuda:1 to cuda:0: 5 bytes arrive wrong",
         "NCCL_P2P_DISABLE=1"),
        ("peer cuda:1 cuda:0", {"error": "RuntimeError: unspecified"}, "peer copies", FAIL,
         "unspecified", "nccl-tests#117"),
        ("import flash_attn", {"error": "ImportError: undefined symbol: _ZN3c105"}, "flash-attn",
         WARN, "undefined symbol", "pip install"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_told_with_a_remedy(
    name: str, row: dict[str, object], title: str, status: str, says: str, do: str
) -> None:
    [odd] = [f for f in explain_probed(Probed(RIGHT | {name: row}), RTX_4090) if f.status != OK]
    assert (odd.name, odd.status) == (title, status)
    assert says in odd.value
    assert do in odd.remedy


def test_slow_copies_are_no_finding_where_nothing_is_pinned_or_known() -> None:
    slow = {"to_device": 3e9, "from_device": 3e9, "different": 0, "pinned": False}
    assert all(finding.status == OK for finding in explained(host__cuda__1=slow))
    rows = {"host cuda:0": slow | {"pinned": True}}
    [found] = explain_probed(Probed(rows), [GpuFacts(0, "GPU-0", "GPU")])
    assert found.status == OK


@pytest.mark.parametrize(
    ("started", "status", "says", "do"),
    [("peer cuda:0 cuda:1", FAIL, "copying from cuda:0 to cuda:1", "NCCL_P2P_DISABLE=1"),
     ("import flash_attn", WARN, "importing flash_attn", "flash-attn"),
     ("pinned", FAIL, "pinning host memory", "dmesg"), ("torch", FAIL, "importing torch", "torch")],
)  # fmt: skip
def test_try_that_does_not_end_is_named(started: str, status: str, says: str, do: str) -> None:
    lines = [{"probe": "products cpu", "state": "start"},
             {"probe": "products cpu", "different": 0, "entries": 4},
             {"probe": started, "state": "start"}]  # fmt: skip
    text = "a library's banner\n[1]\n" + "\n".join(map(json.dumps, lines))
    probed = read_probed(text, "it took more than 120 s")
    right, hung = explain_probed(probed, RTX_4090)
    assert right.value == "exact (CPU)"
    assert (hung.status, hung.value) == (
        status, f"{hung.value.partition(' did not')[0]} did not end well: it took more than 120 s",
    )  # fmt: skip
    assert says in hung.value
    assert do in hung.remedy


WORKER = """\
import json, os, sys, time
print(json.dumps({"probe": "torch", "state": "start"}), flush=True)
if "--device=cuda" in sys.argv:
    time.sleep(60)
os._exit(139)
"""


def test_program_that_hangs_is_ended_and_one_that_dies_is_told(tmp_path: Path) -> None:
    script = tmp_path / "worker.py"
    script.write_text(WORKER)
    hung = run_probe("cuda", worker=[str(script)], timeout_s=1.0)
    assert (hung.hung, hung.end) == ("torch", "it took more than 1 s")
    died = run_probe("cpu", worker=[str(script)])
    assert (died.hung, died.end) == ("torch", "it ended with exit code 139")
    assert run_probe("cpu", worker=[str(tmp_path / "missing.py")]).hung == "torch"
