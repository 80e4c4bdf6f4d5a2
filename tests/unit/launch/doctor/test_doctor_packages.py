"""What the doctor says about packages, and about pairs of them that do not go together."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from fsdpq.launch.doctor import FAIL, OK, WARN, Finding, packages, pairs
from fsdpq.launch.doctor.pairs import Installed
from fsdpq.launch.machine.gpus import GpuFacts

if sys.version_info >= (3, 11):
    import tomllib
else:
    tomllib = pytest.importorskip("tomli")

PYPROJECT = Path(__file__).parents[4] / "pyproject.toml"
BNB = ("cpu", "cuda118", "cuda128", "cuda130")


def only(findings: list[Finding], name: str) -> Finding:
    [found] = [finding for finding in findings if finding.name == name]
    return found


def versions(monkeypatch: pytest.MonkeyPatch, **given: str | None) -> None:
    """Everything is installed in the smallest version, but for what is given."""
    installed: dict[str, str | None] = {
        package.name: package.minimum for package in (*packages.PACKAGES, packages.TORCH)
    }
    installed |= {name.replace("_", "-"): version for name, version in given.items()}
    monkeypatch.setattr(packages, "installed_version", installed.get)


def test_smallest_versions_are_those_of_pyproject() -> None:
    project = tomllib.loads(PYPROJECT.read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"].values()
    lines = [*project["dependencies"], *(line for extra in extras for line in extra)]
    asked = [r for r in map(Requirement, lines) if r.marker is None or r.marker.evaluate()]
    wanted = {r.name: {str(each) for each in r.specifier} for r in asked}
    for package in (*packages.PACKAGES, packages.TORCH):
        assert f">={package.minimum}" in wanted[package.name], package.name
    assert project["requires-python"] == f">={'.'.join(map(str, packages.MIN_PYTHON))}"


@pytest.mark.parametrize(
    ("version", "minimum", "older"),
    [("2.13.0+cu130", "2.13", False), ("2.9.1", "2.13", True), ("3.0", "2.13", False),
     ("0.2.8.post1", "0.2.8", False), ("5", "5.23", True), ("2.13.0a0+git12", "2.13", False)],
)  # fmt: skip
def test_versions_compare_as_numbers(version: str, minimum: str, older: bool) -> None:
    assert packages.is_older(version, minimum) is older


def test_old_or_missing_torch_is_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    for version in (None, "2.9.1"):
        versions(monkeypatch, torch=version)
        [found] = packages.find_torch()
        assert found.status == FAIL
        assert found.remedy == "pip install 'torch>=2.13'"
    versions(monkeypatch)
    [found] = packages.find_torch()
    assert (found.status, found.remedy) == (OK, "")


def test_torch_is_told_with_what_it_brings(monkeypatch: pytest.MonkeyPatch) -> None:
    versions(monkeypatch, nvidia_nccl_cu13="2.28.9", triton="3.6.0")
    monkeypatch.setattr(packages, "torch_cuda", lambda: "13.0")
    [found] = packages.find_torch()
    assert found.value == "2.13, CUDA 13.0, NCCL 2.28.9, Triton 3.6.0"


def test_packages_fail_only_where_every_recipe_needs_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    versions(monkeypatch, peft=None, hqq=None, wandb="0.1", transformers="5.0")
    found = list(packages.find_packages())
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
    monkeypatch.setattr(packages.metadata, "distribution", lambda _name: Distribution())
    assert packages.torch_cuda() == cuda


def installed(
    cuda: str = "13.0",
    driver: str | None = "580.65.06",
    capability: tuple[int, int] | None = (8, 9),
    bnb: tuple[str, ...] = BNB,
    **missing: None,
) -> Installed:
    gpu = GpuFacts(0, "GPU-0", "a GPU", driver=driver, compute_capability=capability)
    return Installed(lambda name: missing.get(name, "1"), cuda, [gpu], bnb)


@pytest.mark.parametrize(
    ("given", "names"),
    [
        (installed(), []),
        (installed(cuda="13.0", driver="570.124.06"), ["torch and driver"]),
        (installed(cuda="12.8", driver="570.124.06"), []),
        (installed(cuda="12.8", driver="525.60.12"), ["torch and driver"]),
        (installed(cuda="12.8", driver="525.60.13"), []),
        (installed(cuda="14.0", driver="1.0", bnb=("cuda140",)), []),
        (installed(driver=None, capability=None), []),
        (installed(capability=(7, 0)), ["torch and GPU 0"]),
        (installed(cuda="12.8", capability=(7, 0)), []),
        (installed(cuda="12.6", capability=(12, 0)), ["torch and GPU 0"]),
        (installed(cuda="12.8", capability=(12, 0)), []),
        (installed(bnb=("cpu", "cuda118", "cuda128")), ["torch and bitsandbytes"]),
        (installed(cuda="12.4"), []),
        (installed(bnb=(), bitsandbytes=None), []),
        (installed(termcolor=None), ["hqq and termcolor"]),
        (installed(termcolor=None, hqq=None), []),
        (installed(triton=None), ["torch and triton"]),
        (installed(cuda="", driver="1.0", capability=(3, 0), bnb=(), triton=None), []),
    ],
)
def test_known_bad_pairs_are_told(given: Installed, names: list[str]) -> None:
    found = [finding for check in pairs.KNOWN_BAD for finding in check(given)]
    assert [finding.name for finding in found] == names


def test_bad_pair_names_what_is_installed_and_what_would_do() -> None:
    [found] = pairs.torch_and_driver(installed(driver="535.183.01"))
    assert found.status == FAIL
    assert found.value == "the driver 535.183.01 is too old for CUDA 13.0 of torch"
    assert found.remedy.startswith("install a driver from 580 on")
    [found] = pairs.torch_and_bitsandbytes(installed(bnb=("cpu", "cuda118")))
    assert found.value.endswith("(it has: cuda118)")


def test_requirements_of_packages_that_are_not_met_are_told(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked = {
        "torch": ["nvidia-nccl-cu13==2.28.9; platform_system == 'Linux'", "sympy"],
        "peft": ["transformers<6", "black>=99; extra == 'dev'", "nothing-that-is-installed>=3"],
    }
    versions(monkeypatch, **{"nvidia-nccl-cu13": "2.27.3", "sympy": "1.14", "black": "1"})
    monkeypatch.setattr(pairs, "installed_version", packages.installed_version)
    monkeypatch.setattr(pairs.metadata, "requires", asked.get)
    [found] = pairs.unmet_requirements()
    assert (found.name, found.status) == ("torch and nvidia-nccl-cu13", WARN)
    assert found.value == "torch asks for nvidia-nccl-cu13==2.28.9, installed is 2.27.3"
    assert found.remedy == "pip install 'nvidia-nccl-cu13==2.28.9'"


def test_versions_of_this_environment_go_together() -> None:
    assert list(pairs.find_bad_pairs([])) == []
    assert {"cpu", "cuda130"} <= set(pairs.bitsandbytes_libraries())


def test_finding_without_a_remedy_is_refused() -> None:
    with pytest.raises(ValueError, match="`x` has no remedy"):
        Finding("software", "x", WARN, "odd")
