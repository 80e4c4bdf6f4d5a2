"""What the verbs print, and that they never import torch."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from fsdpq.cli.main import main
from fsdpq.launch import ready, run_ranks, train
from fsdpq.launch.slurm import training_job
from fsdpq.recipe.root import recipe_schema_text
from fsdpq.rows.formats import FORMATS
from fsdpq.run_files.paths import RunFiles
from fsdpq.run_files.writing import append_json_lines

ROOT = Path(__file__).parents[2]
QUICKSTART = str(ROOT / "recipes" / "quickstart.yaml")
FAKE_WORKER = str(ROOT / "tests" / "unit" / "launch" / "fake_worker.py")
HEAVY = ("torch", "transformers", "peft", "bitsandbytes", "datasets", "accelerate")

IMPORT_CHECK = f"""
import sys
from fsdpq.cli.main import cli
print("EARLY", sorted({{"pydantic", "yaml", "psutil"}} & set(sys.modules)))
for arguments in (
    ["--help"], ["train", "--help"], ["--version"], ["kinds"], ["kinds", "model"], ["schema"],
    ["validate", {QUICKSTART!r}, "adapter.rank=8"], ["show", {QUICKSTART!r}],
    ["show", {QUICKSTART!r}, "--explain", "adapter"], ["diff", {QUICKSTART!r}, {QUICKSTART!r}],
    ["recipes", "ls"], ["migrate", {QUICKSTART!r}], ["kinds", "--json"],
    ["cache", "ls"], ["quantize", "--help"], ["data", "inspect", "--help"],
):
    cli.main(args=arguments, standalone_mode=False)
import fsdpq.cli.inspection, fsdpq.launch.inspect, fsdpq.pages.inspection
import fsdpq.cli.screen, fsdpq.launch.train, fsdpq.launch.resume, fsdpq.launch.generate
import fsdpq.cli.answering.chat, fsdpq.cli.answering.chat_input
import fsdpq.launch.chat, fsdpq.launch.answers
import fsdpq.cli.run_result, fsdpq.cli.runs.listing, fsdpq.cli.runs.tail, fsdpq.launch.follow
import fsdpq.fetch.resolve
print("HEAVY", sorted(set({HEAVY!r}) & set(sys.modules)))
"""


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    main(arguments)
    captured = capsys.readouterr()
    assert captured.err == ""
    return captured.out


def test_front_half_never_imports_torch() -> None:
    done = subprocess.run(
        [sys.executable, "-c", IMPORT_CHECK], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0] == "EARLY []", "`--help` and the shell's completion need no recipe"
    assert lines[-1] == "HEAVY []"


def _cpu_seconds(command: list[str]) -> float:
    """Returns what a process computes, start-up included: other work on the machine adds little."""
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    assert process.returncode == 0
    return usage.ru_utime + usage.ru_stime


def test_validate_costs_little_more_than_importing_its_libraries() -> None:
    """``make bench`` prints seconds; here is what keeps them low on any machine."""
    libraries = [sys.executable, "-c", "import click, pydantic.fields, pydantic.main, yaml"]
    command = [sys.executable, "-m", "fsdpq", "validate", QUICKSTART]
    floor = min(_cpu_seconds(libraries) for _ in range(5))
    times = min(_cpu_seconds(command) for _ in range(5))
    # 1.4 to 1.9 was measured, the latter where every start compiles our modules.
    assert times < 2.5 * floor, (times, floor)


def test_validate_needs_neither_hydra_nor_rich() -> None:
    code = (
        "import sys; from fsdpq.cli.main import main\n"
        f"main(['validate', {QUICKSTART!r}])\n"
        "print([name for name in ('hydra', 'rich', 'numpy') if name in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.stdout.splitlines()[-1] == "[]", done.stderr


def test_validate_says_that_all_is_well(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(capsys, "validate", QUICKSTART) == f"{QUICKSTART}: no mistakes found\n"


def test_show_prints_the_resolved_recipe(capsys: pytest.CaptureFixture[str]) -> None:
    shown = yaml.safe_load(run(capsys, "show", QUICKSTART, "adapter.rank=8"))
    assert shown["adapter"]["rank"] == 8
    assert shown["adapter"]["use_rslora"] is False


def test_schema_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(capsys, "schema") == recipe_schema_text()


def test_kinds_lists_every_choice(capsys: pytest.CaptureFixture[str]) -> None:
    out = run(capsys, "kinds")
    for text in ("kind: bnb ", "kind: cosine ", "pypi:smollm2-135m-instruct", "pypi:chatterbot"):
        assert text in out


def test_kinds_of_data_show_a_row_of_every_format(capsys: pytest.CaptureFixture[str]) -> None:
    out = run(capsys, "kinds", "data")
    assert "  format: alpaca             instruction and output; input may be missing\n" in out
    assert '    text               {"text": "..."}\n' in out
    [data] = json.loads(run(capsys, "kinds", "data", "--json"))
    formats = {entry["format"]: entry for entry in data["formats"]}
    assert set(formats) == set(FORMATS)
    assert formats["messages"]["optional"] == ["system", "tools"]


def test_kinds_of_a_section_explains_its_keys(capsys: pytest.CaptureFixture[str]) -> None:
    out = run(capsys, "kinds", "adapter")
    assert "  rank: a whole number from 1 to 4096 (default 16)\n" in out
    assert "  dtype: auto, bf16, fp16 or fp32 (default auto)\n" in run(capsys, "kinds", "model")


@pytest.mark.parametrize(
    "verb",
    [
        "train",
        "validate",
        "data",
        "show",
        "diff",
        "kinds",
        "generate",
        "chat",
        "schema",
        "bench",
        "recipes",
        "migrate",
        "quantize",
        "prepare",
        "cache",
        "resume",
    ],
)
def test_every_verb_has_help(capsys: pytest.CaptureFixture[str], verb: str) -> None:
    assert f" {verb} " in run(capsys, verb, "--help")


@pytest.fixture
def fetched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A directory of our own, inputs that need no network, and a worker that needs no torch."""
    inputs: dict[str, Any] = {"model": {"directory": "/m"}, "data": {"path": "/d"}}
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setattr(ready, "fetch_inputs", lambda *_args, **_kwargs: inputs)
    monkeypatch.setattr(ready, "prepare_inputs", lambda *_args, **_kwargs: {})
    monkeypatch.setitem(train.train_loaded.__kwdefaults__, "worker", (FAKE_WORKER,))


@pytest.mark.usefixtures("fetched")
def test_train_prints_the_run_directory(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAKE_MODE", "finish-quietly")
    monkeypatch.setattr(run_ranks, "run_torchrun", fake_run)
    main(["train", QUICKSTART, "--run-dir", "here"])
    captured = capsys.readouterr()
    assert captured.out == "here\n"
    assert "held-out loss  3.0000  2.0000" in captured.err
    assert "fsdpq generate here --prompt 'How are you?'" in captured.err
    assert "\x1b" not in captured.err

    main(["train", QUICKSTART, "--run-dir", "again", "--quiet"])
    assert capsys.readouterr() == ("again\n", "")
    main(["train", QUICKSTART, "--run-dir", "third", "--quiet", "--json"])
    out, err = capsys.readouterr()
    found = json.loads(out)
    assert (found["ok"], found["run_dir"], found["state"]) == (True, "third", "finished")
    assert (found["measures"]["eval_loss"], err) == (2.0, "")


def test_ctrl_c_before_the_ranks_start_is_json_too(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_args: object, **_kwargs: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(train, "train_loaded", interrupted)
    with pytest.raises(SystemExit) as end:
        main(["train", QUICKSTART, "--json"])
    found = json.loads(capsys.readouterr().out)
    assert (end.value.code, found["exit_code"], found["run_dir"]) == (130, 130, None)


def test_a_run_that_becomes_a_job_says_so_as_json(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    job = (RunFiles(Path("runs/x")), 7)
    monkeypatch.setattr(training_job, "submit_training", lambda *_args, **_kwargs: job)
    asked = ("launch.scheduler=slurm", "launch.device=cpu", "--quiet", "--json")
    main(["train", QUICKSTART, *asked])
    out, err = capsys.readouterr()
    told = {"run_dir": "runs/x", "job": 7, "exit_code": 0}
    assert json.loads(out) == {"ok": True, "problems": []} | told
    assert err == ""


def fake_run(files: RunFiles, *_args: object, on_row: Any, **_kwargs: object) -> tuple[int, str]:
    rows = [
        {"event": "sample", "when": "before", "prompt": "How are you?", "answer": "\x1b[2J"},
        {
            "event": "done", "steps": 3, "train_s": 61.0, "tokens": 9, "trained_tokens": 5,
            "eval_loss_before": 3.0, "eval_loss_after": 2.0, "peak_memory_bytes": [2**30],
            "adapter": "here/adapter",
        },
    ]  # fmt: skip
    append_json_lines(files.events, rows)
    for row in rows:
        on_row(row)
    return 0, ""


@pytest.mark.usefixtures("fetched")
@pytest.mark.skipif(importlib.util.find_spec("torch") is None, reason="needs torchrun")
def test_traceback_of_a_dead_rank_is_the_last_thing_on_screen(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAKE_MODE", "raise")
    with pytest.raises(SystemExit) as end:
        main(["train", QUICKSTART, "--run-dir", "here"])
    captured = capsys.readouterr()
    assert (end.value.code, captured.out) == (1, "")
    assert captured.err.splitlines()[-1] == "ValueError: boom"
    assert "error: rank 1 failed: ValueError: boom" in captured.err


@pytest.mark.usefixtures("fetched")
def test_stopped_run_exits_130_with_one_line(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def stopped(*_args: object, on_row: Any, **_kwargs: object) -> tuple[int, str]:
        on_row({
            "event": "step", "step": 4, "total_steps": 9, "loss": 1.0, "lr": 1e-4,
            "tokens_per_s": 1.0, "memory_bytes": 1, "time": 0.0,
        })  # fmt: skip
        return 0, "SIGINT"

    monkeypatch.setattr(run_ranks, "run_torchrun", stopped)
    with pytest.raises(SystemExit) as end:
        main(["train", QUICKSTART, "--run-dir", "here"])
    assert end.value.code == 130
    stopped_line = "stopped by SIGINT after step 4 of 9; its metrics and logs are in `"
    assert capsys.readouterr().err.splitlines()[-1] == f"{stopped_line}here`"
    with pytest.raises(SystemExit) as end:
        main(["train", QUICKSTART, "--run-dir", "again", "--json"])
    out, err = capsys.readouterr()
    found = json.loads(out)
    assert (end.value.code, found["exit_code"], found["run_dir"]) == (130, 130, "again")
    assert found["state"] == "stopped"
    assert found["problems"][0]["message"] == err.splitlines()[-1] == f"{stopped_line}again`"
