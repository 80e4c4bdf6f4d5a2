"""What the launcher makes of the self-test's rows."""

from __future__ import annotations

from pathlib import Path

import pytest

from fsdpq.errors import EnvironmentProblemError, FsdpqError, UsageError
from fsdpq.launch import self_test
from fsdpq.launch.doctor import FAIL, OK, WARN
from fsdpq.launch.doctor.ranks import explain_test, find_ranks
from fsdpq.launch.self_test import Ranks, SelfTest, choose_ranks, run_self_test
from fsdpq.run_files.rows import CheckResult


@pytest.mark.parametrize(
    ("device", "count", "num_gpus", "expected"),
    [(None, None, 4, Ranks("cuda", 4)), (None, None, 0, Ranks("cpu", 2)),
     (None, 3, 4, Ranks("cuda", 3)), ("cpu", None, 4, Ranks("cpu", 2)),
     ("cpu", 5, 0, Ranks("cpu", 5)), ("cuda", 1, 4, Ranks("cuda", 1))],
)  # fmt: skip
def test_self_test_takes_all_gpus_or_two_cpu_ranks(
    device: str | None, count: int | None, num_gpus: int, expected: Ranks
) -> None:
    assert choose_ranks(device, count, num_gpus=num_gpus) == expected


def test_self_test_refuses_gpus_that_are_not_there() -> None:
    with pytest.raises(EnvironmentProblemError, match="shows no GPU"):
        choose_ranks("cuda", None, num_gpus=0)
    with pytest.raises(UsageError, match="this machine has 2 GPUs") as caught:
        choose_ranks(None, 3, num_gpus=2)
    assert "`--nproc 2`" in caught.value.hint


WORKER = """\
import json, os, sys
from pathlib import Path
run_dir = Path(sys.argv[-1])
names = [["bytes", "gather"], ["bytes", "offload"], ["training", "step"]]
fields = {"group": "bytes", "name": "gather", "detail": "5 bytes", "remedy": "", "seconds": 0.1}
rows = [{"event": "checks", "names": names},
        fields | {"event": "check", "status": os.environ["FIRST"]},
        fields | {"event": "check", "status": "failed", "detail": "too late"}]
if os.environ["FIRST"] != "nothing":
    for row in rows:
        with (run_dir / "events.jsonl").open("a") as file:
            file.write(json.dumps(row) + "\\n")
sys.exit(5)
"""


def run_fake(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, first: str) -> self_test.SelfTest:
    monkeypatch.setenv("FIRST", first)
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(self_test.tempfile, "tempdir", None)
    script = tmp_path / "worker.py"
    script.write_text(WORKER)
    seen: list[CheckResult] = []
    test = run_self_test(
        Ranks("cpu", 1), on_names=lambda _names: None, on_result=seen.append, worker=[str(script)]
    )
    assert seen == list(test.results)
    return test


def test_checks_that_the_ranks_did_not_come_to_have_failed(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    test = run_fake(monkeypatch, tmp_path, "passed")
    assert [(result.name, result.status) for result in test.results] == [
        ("gather", "passed"), ("offload", "failed"), ("step", "failed"),
    ]  # fmt: skip
    assert test.results[0].detail == "5 bytes"
    assert all(result.detail.startswith("did not run: ") for result in test.results[1:])
    assert not test.ok
    assert test.logs is not None
    assert (test.logs / "torchrun.log").is_file()


def test_ranks_that_never_start_are_an_error_of_the_environment(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with pytest.raises(FsdpqError) as caught:
        run_fake(monkeypatch, tmp_path, "nothing")
    assert caught.value.exit_code == 4


def test_ranks_that_never_start_are_a_finding_with_a_remedy(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refuse(*_given: object, **_more: object) -> SelfTest:
        raise EnvironmentProblemError("no port is free", hint="free one")

    monkeypatch.setattr("fsdpq.launch.doctor.ranks.run_self_test", refuse)
    [found] = find_ranks([])
    assert (found.status, found.value, found.remedy) == (
        FAIL, "2 ranks on the CPU: no port is free", "free one",
    )  # fmt: skip


def test_checks_of_the_ranks_are_findings() -> None:
    results = (
        CheckResult("collectives", "all-reduce", "passed", "exact", "", 0.1),
        CheckResult("shards against it", "bnb nf4, double", "failed", "1 byte", "do not", 0.1),
        CheckResult("gradients against it", "bnb nf4, double", "skipped", "missing: x", "", 0.1),
    )
    found = list(explain_test(SelfTest(Ranks("cpu", 2), results, None)))
    assert [(f.name, f.status, f.remedy) for f in found] == [
        ("all-reduce", OK, ""),
        ("bnb nf4, double: shards", FAIL, "do not"),
        ("bnb nf4, double: gradients", WARN, "missing: x"),
    ]
