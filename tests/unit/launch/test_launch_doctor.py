"""Findings of ``fsdpq doctor``, and what the launcher makes of the self-test's rows."""

from __future__ import annotations

import sys
from collections import namedtuple
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from fsdpq.errors import EnvironmentProblemError, FsdpqError, UsageError
from fsdpq.launch import doctor, self_test
from fsdpq.launch.doctor import FAIL, OK, WARN, Finding
from fsdpq.launch.self_test import Ranks, choose_ranks, run_self_test
from fsdpq.run_files.rows import CheckResult

if sys.version_info >= (3, 11):
    import tomllib
else:
    tomllib = pytest.importorskip("tomli")

PYPROJECT = Path(__file__).parents[3] / "pyproject.toml"
H100 = "GPU 0: NVIDIA H100 80GB HBM3 (UUID: GPU-aaaa)"
Usage = namedtuple("Usage", "total used free")


def only(findings: list[Finding], name: str) -> Finding:
    [found] = [finding for finding in findings if finding.name == name]
    return found


def versions(monkeypatch: pytest.MonkeyPatch, **given: str | None) -> None:
    """Everything is installed in the smallest version, but for what is given."""
    installed: dict[str, str | None] = {
        package.name: package.minimum for package in (*doctor.PACKAGES, doctor.TORCH)
    }
    installed |= {name.replace("_", "-"): version for name, version in given.items()}
    monkeypatch.setattr(doctor, "installed_version", installed.get)


def test_smallest_versions_are_those_of_pyproject() -> None:
    project = tomllib.loads(PYPROJECT.read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"].values()
    lines = [*project["dependencies"], *(line for extra in extras for line in extra)]
    wanted = {r.name: str(r.specifier) for r in map(Requirement, lines)}
    for package in (*doctor.PACKAGES, doctor.TORCH):
        assert wanted[package.name] == f">={package.minimum}", package.name
    assert project["requires-python"] == f">={'.'.join(map(str, doctor.MIN_PYTHON))}"


@pytest.mark.parametrize(
    ("version", "minimum", "older"),
    [("2.13.0+cu130", "2.13", False), ("2.9.1", "2.13", True), ("3.0", "2.13", False),
     ("0.2.8.post1", "0.2.8", False), ("5", "5.23", True), ("2.13.0a0+git12", "2.13", False)],
)  # fmt: skip
def test_versions_compare_as_numbers(version: str, minimum: str, older: bool) -> None:
    assert doctor.is_older(version, minimum) is older


def test_old_or_missing_torch_is_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    for version in (None, "2.9.1"):
        versions(monkeypatch, torch=version)
        [found] = doctor.find_torch()
        assert found.status == FAIL
        assert found.remedy == "pip install 'torch>=2.13'"
    versions(monkeypatch)
    [found] = doctor.find_torch()
    assert (found.status, found.remedy) == (OK, "")


def test_packages_fail_only_where_every_recipe_needs_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    versions(monkeypatch, peft=None, hqq=None, wandb="0.1", transformers="5.0")
    found = list(doctor.find_packages())
    assert only(found, "peft") == Finding(
        "software", "peft", FAIL, "missing", "pip install 'peft>=0.21'"
    )
    assert only(found, "hqq").status == OK
    assert only(found, "hqq").remedy == "pip install 'fsdpq[hqq]'"
    assert only(found, "wandb").status == WARN
    assert only(found, "transformers").value == "5.0: fsdpq needs 5.23"
    assert only(found, "bitsandbytes").status == OK


@pytest.mark.parametrize(
    ("line", "cuda"),
    [("cuda: Optional[str] = '13.0'", "13.0"), ("cuda: Optional[str] = None", ""),
     ("cuda = '12.8'", "12.8"), ("hip: Optional[str] = '6.4'", "")],
)  # fmt: skip
def test_cuda_of_torch_is_read_without_importing_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, line: str, cuda: str
) -> None:
    class Distribution:
        def locate_file(self, name: str) -> Path:
            return tmp_path / name

    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "version.py").write_text(f"debug = False\n{line}\n")
    monkeypatch.setattr(doctor.metadata, "distribution", lambda _name: Distribution())
    assert doctor.torch_cuda() == cuda


def test_gpus_that_torch_cannot_use_are_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    versions(monkeypatch)
    monkeypatch.setattr(doctor, "list_gpus", lambda: [H100])
    monkeypatch.setattr(doctor, "torch_cuda", lambda: "13.0")
    assert list(doctor.find_gpus()) == [Finding("hardware", "GPU 0", OK, "NVIDIA H100 80GB HBM3")]
    monkeypatch.setattr(doctor, "torch_cuda", lambda: "")
    assert only(list(doctor.find_gpus()), "CUDA").status == FAIL
    monkeypatch.setattr(doctor, "list_gpus", lambda: ["GPU 0: Tesla T4 (UUID: GPU-b)"])
    old = only(list(doctor.find_gpus()), "GPU 0")
    assert (old.status, old.value) == (WARN, "Tesla T4, without bf16")
    monkeypatch.setattr(doctor, "list_gpus", list)
    assert [finding.status for finding in doctor.find_gpus()] == [WARN]


@pytest.mark.parametrize(("free", "status"), [(10**8, FAIL), (10**9, WARN), (10**11, OK)])
def test_disk_is_that_of_the_nearest_directory_that_exists(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, free: int, status: str
) -> None:
    asked: list[Path] = []

    def disk_usage(path: Path) -> Usage:
        asked.append(path)
        return Usage(10**12, 10**12 - free, free)

    monkeypatch.setattr(doctor.shutil, "disk_usage", disk_usage)
    found = doctor.disk_finding("cache", tmp_path / "not" / "there", "move it")
    assert (found.status, asked) == (status, [tmp_path])
    assert not list(tmp_path.iterdir())


def test_directory_that_cannot_be_written_is_a_failure(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(doctor, "can_write", lambda _directory: False)
    found = doctor.disk_finding("runs", tmp_path, "give `--run-dir`")
    assert (found.status, found.remedy) == (FAIL, "give `--run-dir`")


def test_memory_is_what_the_container_may_use(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    limit = tmp_path / "memory.max"
    limit.write_text("2000000000\n")
    monkeypatch.setattr(doctor, "CGROUP_LIMIT", limit)
    [found] = doctor.find_memory()
    assert found.status == WARN
    assert found.value.endswith("of 2.0 GB")
    limit.write_text("max\n")
    assert doctor.memory_limit() is None


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
