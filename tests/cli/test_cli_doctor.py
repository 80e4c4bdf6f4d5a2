"""What ``fsdpq doctor`` prints, for given findings and results."""

from __future__ import annotations

import json
from pathlib import Path

import click
import pytest
from support.nvidia_smi import install_nvidia_smi

from fsdpq.cli import doctor as command
from fsdpq.cli.main import main
from fsdpq.launch import doctor, self_test
from fsdpq.launch.doctor import FAIL, OK, WARN, Finding
from fsdpq.launch.doctor import gpus as gpu_looks
from fsdpq.launch.doctor.device import Probed, explain_probed
from fsdpq.launch.machine.gpus import query_gpus
from fsdpq.launch.self_test import Ranks, SelfTest
from fsdpq.run_files.rows import CheckResult

FINDINGS = [
    Finding("software", "torch", OK, "2.13.0, CPU build"),
    Finding("software", "hqq", OK, "missing, for hqq only", "pip install 'fsdpq[hqq]'"),
    Finding("hardware", "GPU", WARN, "none", "get one"),
    Finding("disk", "runs", FAIL, "0 bytes free", "free some"),
]
RESULTS = (
    CheckResult("collectives", "all-reduce", "passed", "5 sums exact", "", 0.1),
    CheckResult("collectives", "host memory", "skipped", "on CPUs", "", 0.0),
    CheckResult("bytes", "gather", "failed", "rank 1: 3 bytes differ", "try another torch", 0.2),
)


def test_findings_are_aligned_under_their_subjects() -> None:
    lines = [click.unstyle(line) for line in command.render_findings(FINDINGS)]
    assert lines == [
        "software",
        "  ok       torch  2.13.0, CPU build",
        "  ok       hqq    missing, for hqq only: pip install 'fsdpq[hqq]'",
        "",
        "hardware",
        "  warn     GPU  none",
        "                do: get one",
        "",
        "disk",
        "  fail     runs  0 bytes free",
        "                 do: free some",
        "",
        "training cannot work here: 1 of 4 findings failed",
    ]
    assert "training can work here" in list(command.render_findings(FINDINGS[:3]))[-1]


@pytest.mark.parametrize(("count", "code"), [(3, 0), (4, 4)])
def test_exit_code_says_whether_training_can_work(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], count: int, code: int
) -> None:
    monkeypatch.setattr(doctor, "examine", lambda **_given: FINDINGS[:count])
    if code:
        with pytest.raises(SystemExit) as end:
            main(["doctor", "--json"])
        assert end.value.code == code
    else:
        main(["doctor", "--json"])
    found = json.loads(capsys.readouterr().out)
    assert found["ok"] is (code == 0)
    assert found["findings"][0] == {
        "subject": "software", "name": "torch", "status": "ok", "value": "2.13.0, CPU build",
        "remedy": "",
    }  # fmt: skip


def test_machine_with_two_gpus_is_told_as_here(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    topology = "\tGPU0\tGPU1\nGPU0\t X \tPHB\nGPU1\tPHB\t X \n"
    install_nvidia_smi(
        tmp_path, monkeypatch,
        [{}, {"pcie.link.width.current": "4", "memory.free": "20000 MiB"}],
        apps=[{"gpu_uuid": "GPU-0001", "pid": "4711", "process_name": "python",
               "used_memory": "4100 MiB"}],
        texts={("topo", "-m"): topology},
    )  # fmt: skip
    monkeypatch.setattr(gpu_looks, "torch_cuda", lambda: "13.0")
    found = query_gpus()
    looks = (
        gpu_looks.find_driver, gpu_looks.find_gpus, gpu_looks.find_links, gpu_looks.find_processes,
    )  # fmt: skip
    findings = [finding for look in looks for finding in look(found)]
    peer = {"access": True, "different": 9, "bytes_per_s": 1e9}
    findings += explain_probed(Probed({"peer cuda:0 cuda:1": peer}), found)
    lines = [click.unstyle(line) for line in command.render_findings(findings)]
    assert lines == TWO_GPUS.splitlines()


TWO_GPUS = """\
GPUs
  ok       driver        580.65.06
  ok       GPU 0         NVIDIA GeForce RTX 4090, 23.5 of 24.0 GiB free, PCIe 4.0 x16, 450 W
  warn     GPU 1         NVIDIA GeForce RTX 4090, 19.5 of 24.0 GiB free, PCIe 4.0 x4, 450 W: others use it
                         do: end what uses it (see `nvidia-smi`), or leave it out: CUDA_VISIBLE_DEVICES
  warn     GPU 1 lanes   4 of its 16 PCIe lanes
                         do: put it into a slot with more lanes, or plan without `fsdp.offload`, which moves the base over them in every step
  ok       links         between GPUs: over the processor's PCIe host (PHB)
  warn     process 4711  computes on GPU 1: python, 4.3 GB
                         do: wait for it, or end it if it is yours: `kill 4711`

device
  fail     peer copies  1 of 1 pairs, the first cuda:0 to cuda:1: 9 bytes arrive wrong
                        do: set `NCCL_P2P_DISABLE=1` in the environment: peer-to-peer copies of GeForce 40 and 50 hang or corrupt on some boards (NVIDIA/nccl-tests#117, NVIDIA/nccl#1637)

training cannot work here: 1 of 7 findings failed
"""  # noqa: E501


def test_only_looking_tries_nothing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: list[bool] = []

    def examine(*, quick: bool) -> list[Finding]:
        asked.append(quick)
        return FINDINGS[:3]

    monkeypatch.setattr(doctor, "examine", examine)
    main(["doctor", "--quick"])
    assert capsys.readouterr().err == ""
    main(["doctor"])
    assert capsys.readouterr().err.startswith("trying devices, ranks and the disk too")
    assert asked == [True, False]
    with pytest.raises(SystemExit) as end:
        main(["doctor", "--quick", "--self-test"])
    assert end.value.code == 2


def fake_self_test(monkeypatch: pytest.MonkeyPatch, results: tuple[CheckResult, ...]) -> None:
    def run(ranks: Ranks, *, on_names: object, on_result: object) -> SelfTest:
        assert callable(on_names)
        assert callable(on_result)
        on_names([(result.group, result.name) for result in RESULTS])
        for result in results:
            on_result(result)
        failed = any(result.status == "failed" for result in results)
        return SelfTest(ranks, results, Path("/tmp/x/logs") if failed else None)

    monkeypatch.setattr(self_test, "run_self_test", run)


def test_self_test_prints_every_result_and_fails_where_one_does(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fake_self_test(monkeypatch, RESULTS)
    with pytest.raises(SystemExit) as end:
        main(["doctor", "--self-test", "--device", "cpu", "--nproc", "3"])
    assert end.value.code == 4
    captured = capsys.readouterr()
    assert captured.err == "starting 3 ranks on the CPU\n"
    assert captured.out.splitlines() == [
        "collectives",
        "  passed   all-reduce   5 sums exact",
        "  skipped  host memory  on CPUs",
        "",
        "bytes",
        "  failed   gather       rank 1: 3 bytes differ",
        "                        do: try another torch",
        "",
        "1 passed, 1 failed, 1 skipped, on 3 ranks on the CPU",
        "the logs of the ranks are in /tmp/x/logs",
    ]


def test_self_test_as_json(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fake_self_test(monkeypatch, RESULTS[:2])
    main(["doctor", "--self-test", "--device", "cpu", "--json"])
    found = json.loads(capsys.readouterr().out)
    assert (found["ok"], found["device"], found["num_ranks"], found["logs"]) == (
        True, "cpu", 2, None,
    )  # fmt: skip
    assert [check["status"] for check in found["checks"]] == ["passed", "skipped"]


def test_examining_this_machine_never_imports_torch() -> None:
    import subprocess
    import sys

    code = (
        "import sys; from fsdpq.launch.doctor import examine; found = examine(quick=True);"
        "assert {'torch', 'CPU', 'memory', 'cache', 'runs'} <= {f.name for f in found};"
        "assert 'torch' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
