"""What ``fsdpq doctor`` prints, for given findings and results."""

from __future__ import annotations

import json
from pathlib import Path

import click
import pytest

from fsdpq.cli import doctor as command
from fsdpq.cli.main import main
from fsdpq.launch import doctor, self_test
from fsdpq.launch.doctor import FAIL, OK, WARN, Finding
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
