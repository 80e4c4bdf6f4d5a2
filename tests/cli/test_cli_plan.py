"""``fsdpq plan``: its exit code, its JSON, its colour, and what it costs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import click
import pytest
from support.nvidia_smi import install_nvidia_smi

from fsdpq.cli.main import main
from fsdpq.cli.plan_compared import render_comparison
from fsdpq.cli.plan_text import format_flops, render_plan
from fsdpq.errors import EnvironmentProblemError, UsageError
from fsdpq.launch.machine.this_machine import describe_this_machine, read_ram_bytes
from fsdpq.launch.plan import Hardware, parse_hardware, prepare_plan
from fsdpq.plan.build import Wanted
from fsdpq.plan.host import EARLY_HEAP_BYTES, HEAP_BYTES
from fsdpq.plan.result import Moment, RankMemory
from fsdpq.plan.traced import Traced

ROOT = Path(__file__).parents[2]
SEVENTY = str(ROOT / "recipes" / "llama-2-70b-qlora-2x24gb.yaml")
GIB = 2**30


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str]:
    code = 0
    try:
        main(["plan", *arguments])
    except SystemExit as end:
        code = int(end.code or 0)
    return code, capsys.readouterr().out


def test_exit_code_and_json_say_whether_it_fits(capsys: pytest.CaptureFixture[str]) -> None:
    code, out = run(capsys, SEVENTY, "--gpus", "2xRTX4090", "--ram", "64GiB", "--json")
    told = json.loads(out)
    assert (code, told["fits"], told["edits"], told["limits"]) == (0, True, [], [])
    code, out = run(
        capsys, SEVENTY, "--gpus", "2x8GiB", "--ram", "64GiB", "--json", "--max", "--table"
    )
    told = json.loads(out)
    assert (code, told["fits"]) == (3, False)
    assert told["edits"]
    assert [limit["setting"] for limit in told["limits"]] == [
        "data.seq_len", "training.micro_batch_size", "adapter.rank",
    ]  # fmt: skip
    assert len(told["variants"]) == 18


def test_a_mistake_in_the_recipe_is_one_here_too(capsys: pytest.CaptureFixture[str]) -> None:
    code, out = run(capsys, SEVENTY, "--json", "adapter.rank=none")
    assert code == 2
    assert json.loads(out)["problems"][0]["key"] == "adapter.rank"


def test_verdict_is_coloured_and_text_is_not_wider_for_it() -> None:
    case = prepare_plan(Path(SEVENTY), (), Hardware(gpus="2x8GiB", ram="64GiB"))
    plan = case.build(Wanted(limits=True))
    lines = list(render_plan(plan))
    assert lines[0].startswith("\x1b[31m\x1b[1m")
    plain = [click.unstyle(line) for line in lines]
    assert plain[0] == "llama-2-70b-qlora-2x24gb does not fit: 2 x 8 GiB GPU, 64.00 GiB of memory"
    start = plain.index("it fits with one of these lines added to the command, fastest first")
    for edit, line in zip(plan.edits, plain[start + 1 :], strict=False):
        assert " ".join(edit.settings) in line
        assert edit.changes_result is ("another result" in line)


def test_every_one_of_several_machines_is_meant() -> None:
    machines = ("launch.nnodes=2", "launch.rdzv_endpoint=10.0.0.1:29500")
    case = prepare_plan(Path(SEVENTY), machines, Hardware(gpus="2x4GiB", ram="64GiB"))
    lines = [click.unstyle(line) for line in render_plan(case.build())]
    each = "64.00 GiB of memory, on each of 2 machines"
    assert lines[0] == f"llama-2-70b-qlora-2x24gb does not fit: 2 x 4 GiB GPU, {each}"
    assert any("a step: 4 ranks on 2 machines, " in line for line in lines)
    assert any("2 x 16 GiB on each of 2 machines" in line for line in lines)


def test_this_machine_is_its_gpus_with_their_bus(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install_nvidia_smi(tmp_path, monkeypatch, [{}, {"pcie.link.width.current": "8"}])
    machine = describe_this_machine()
    first, second = machine.gpus or ()
    assert (first.name, first.memory_bytes) == ("RTX 4090", 24564 * 2**20)
    assert first.link_bandwidth is not None
    assert second.link_bandwidth == first.link_bandwidth / 2
    assert machine.is_this
    assert machine.ram_bytes == read_ram_bytes()


def test_a_gpu_that_nobody_knows_has_its_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install_nvidia_smi(
        tmp_path, monkeypatch, [{"name": "NVIDIA Foo 1", "memory.total": "1024 MiB"}]
    )
    [gpu] = describe_this_machine().gpus or ()
    assert (gpu.name, gpu.memory_bytes, gpu.bf16_flops) == ("Foo 1", GIB, None)


def test_memory_is_that_of_the_container(tmp_path: Path) -> None:
    limit = tmp_path / "memory.max"
    limit.write_text("1073741824\n")
    assert read_ram_bytes(limit) == GIB
    limit.write_text("max\n")
    assert read_ram_bytes(limit) == read_ram_bytes(tmp_path / "none") > GIB


@pytest.mark.parametrize("text", ["64GiB", "64GB", "64 gb", "64g", "64"])
def test_memory_may_be_written_in_many_ways(text: str) -> None:
    machine = parse_hardware(Hardware(gpus="24GiB", ram=text, disk="5GB/s", network="12.5GB/s"))
    assert machine.ram_bytes == 64 * GIB
    assert (machine.disk_bandwidth, machine.network_bandwidth) == (5e9, 12.5e9)


def test_a_rate_without_its_unit_is_no_rate() -> None:
    with pytest.raises(UsageError, match="less than a megabyte a second"):
        parse_hardware(Hardware(gpus="24GiB", disk="3"))


def test_operations_have_units() -> None:
    found = [format_flops(flops) for flops in (12.0, 2e9, 3.5e12, 1.25e15)]
    assert found == ["12 FLOP", "2.00 GFLOP", "3.50 TFLOP", "1.25 PFLOP"]


def test_plan_imports_nothing_heavy_and_validates_the_recipe_once() -> None:
    """What keeps it under half a second on any machine: no torch, and no loader inside loops."""
    code = (
        "import sys, fsdpq.recipe.load as load, fsdpq.launch.plan as plan\n"
        "from fsdpq.cli.main import main\n"
        "count, validate = [], load._validate\n"
        "load._validate = lambda *given: (count.append(1), validate(*given))[1]\n"
        f"try: main(['plan', {SEVENTY!r}, '--gpus', '2x8GiB', '--ram', '64GiB', '--max',"
        " '--table'])\n"
        "except SystemExit: pass\n"
        "heavy = {'torch', 'transformers', 'huggingface_hub', 'rich'} & set(sys.modules)\n"
        "print('LOADED', len(count), sorted(heavy))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    words = done.stdout.splitlines()[-1].split(maxsplit=2)
    assert words[0] == "LOADED"
    assert 1 <= int(words[1]) <= 7, "the recipe, and one for every edit that is shown"
    assert words[2] == "[]"


def _cpu_seconds(*command: str) -> float:
    """Returns what the quickest of three processes computes, start-up included."""
    seconds: list[float] = []
    for _ in range(3):
        process = subprocess.Popen([sys.executable, *command], cwd=ROOT, stdout=subprocess.DEVNULL)
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        assert process.returncode == 0
        seconds.append(usage.ru_utime + usage.ru_stime)
    return min(seconds)


def test_plan_costs_little_more_than_importing_its_libraries() -> None:
    floor = _cpu_seconds("-c", "import click, pydantic.fields, pydantic.main, yaml, psutil")
    plan = _cpu_seconds("-m", "fsdpq", "plan", SEVENTY, "--gpus", "2xRTX4090", "--ram", "64GiB")
    # 2.2 was measured, 0.3 s of CPU time; more where every start compiles our modules.
    assert plan < 4 * floor, (plan, floor)


def test_a_trace_is_compared_by_phase_and_category(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The trace has tests of its own; this one says what the plan says, and twice the loss."""
    case = prepare_plan(Path(SEVENTY), (), Hardware(gpus="2x24GiB"))
    moments = case.build(Wanted()).device.moments
    [loss] = [moment for moment in moments if moment.name == "the loss"]
    doubled = Moment("forward", "traced", {**loss.parts, "loss": 2 * loss.parts["loss"]})
    backward = [moment for moment in moments if moment.phase == "backward"]
    found = Traced("trace", RankMemory((doubled, *backward)), {}, 3.0, notes=("a note",))
    monkeypatch.setattr("fsdpq.launch.plan_runs.trace_recipe", lambda *_, **__: found)
    _, out = run(capsys, SEVENTY, "--gpus", "2x24GiB", "--trace")
    lines = out[out.index("planned and traced (3.0 s)") :].splitlines()
    [line] = [line for line in lines if line.startswith("  backward ")]
    assert line.endswith("+0.0 %")
    assert lines[-1] == "  a note"
    _, out = run(capsys, SEVENTY, "--gpus", "2x24GiB", "--trace", "--json")
    assert Traced.from_json(json.loads(out)["trace"]) == found
    assert doubled.total > loss.total


def test_a_measurement_needs_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    case = prepare_plan(Path(SEVENTY), (), Hardware(gpus="2x24GiB"))
    with pytest.raises(EnvironmentProblemError, match="runs a step on a GPU"):
        case.measure()


def test_a_measured_process_is_compared_with_what_the_host_plans_for_one() -> None:
    quickstart = ROOT / "recipes" / "quickstart.yaml"
    case = prepare_plan(quickstart, ("launch.device=cpu",), Hardware(ram="8GiB"))
    plan = case.build(Wanted())
    holes = HEAP_BYTES - EARLY_HEAP_BYTES  # that come with more steps
    half = Moment("backward", "measured", {"measured": plan.host.total // 2 - holes})
    found = Traced("measure", RankMemory((half,)), {}, 3.0)
    lines = list(render_comparison(plan, found))
    assert lines[1] == "planned and measured (3.0 s), memory of a process"
    assert lines[-1].startswith("  peak, in backward")
    assert lines[-1].endswith("+0.0 %"), "two ranks share the host's memory"
