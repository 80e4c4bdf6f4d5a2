"""A run is planned before it starts, and refused where no GPU of the machine has that memory."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from support.nvidia_smi import install_nvidia_smi
from support.screens import Lines
from support.tiny import tiny_recipe

from fsdpq.cli.main import main
from fsdpq.errors import ExitCode, PlanError
from fsdpq.launch.fit import keep_plan, refuse_early, show_fit
from fsdpq.launch.machine import this_machine
from fsdpq.launch.machine.resolve import resolve_launch
from fsdpq.launch.ready import Settled
from fsdpq.recipe.load import dump_recipe, load_recipe
from fsdpq.run_files.paths import RunFiles

LARGE = "meta-llama/Llama-2-70b-hf"
GIB = 2**30


@pytest.fixture
def one_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine with one RTX 4090 and 64 GiB."""
    install_nvidia_smi(tmp_path, monkeypatch, [{}])
    monkeypatch.setattr(this_machine, "read_ram_bytes", lambda: 64 * GIB)


def settled(tmp_path: Path, *overrides: str, smoke: bool = False, **sections: Any) -> Settled:
    sections = {
        "model": {"name_or_path": LARGE, "dtype": "bf16"},
        "data": {"seq_len": 2048},
        "launch": {"device": "auto", "nproc_per_node": "auto"},
    } | sections
    path = tmp_path / "my.yaml"
    path.write_text(dump_recipe(tiny_recipe(**sections)))
    (tmp_path / "rows.jsonl").touch()
    loaded = load_recipe(path, overrides)
    recipe = resolve_launch(loaded.recipe, num_gpus=0 if smoke else 1)
    return Settled(loaded, recipe, [], smoke)


@pytest.mark.usefixtures("one_gpu")
def test_a_run_that_fits_on_no_gpu_is_refused_before_its_model_is_fetched(tmp_path: Path) -> None:
    with pytest.raises(PlanError) as error:
        refuse_early(settled(tmp_path))
    assert "does not fit: a GPU needs 4" in error.value.message
    assert "has 23.99 GiB" in error.value.message
    assert error.value.hint.startswith("add `fsdp.offload=cpu")
    assert "launch.plan_check=false" in error.value.hint
    assert "of the host" in error.value.details
    refuse_early(settled(tmp_path, "fsdp.offload=cpu"))  # as the hint says


@pytest.mark.usefixtures("one_gpu")
def test_who_insists_goes_on(tmp_path: Path) -> None:
    screen = Lines()
    insists = settled(tmp_path, "launch.plan_check=false")
    refuse_early(insists)
    show_fit(insists, card_directory(tmp_path), screen=screen)
    assert screen.lines[0].startswith("plan: 4")
    assert " of 23.99 GiB a GPU, " in screen.lines[0]
    assert screen.lines[0].endswith(" of 64.00 GiB of host memory")
    assert len(screen.lines) == 1


def card_directory(tmp_path: Path, **changes: Any) -> Path:
    """A directory that holds nothing but Llama-2-70B's config."""
    config = {
        "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 8192,
        "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64,
        "num_key_value_heads": 8, "vocab_size": 32000, "max_position_embeddings": 4096,
        "tie_word_embeddings": False, "rms_norm_eps": 1e-5,
    }  # fmt: skip
    directory = tmp_path / "model"
    directory.mkdir(exist_ok=True)
    (directory / "config.json").write_text(json.dumps(config | changes))
    return directory


@pytest.mark.usefixtures("one_gpu")
def test_the_directory_that_was_fetched_is_what_counts(tmp_path: Path) -> None:
    run, directory = settled(tmp_path), card_directory(tmp_path)
    with pytest.raises(PlanError, match="does not fit"):
        show_fit(run, directory, screen=Lines())
    screen = Lines()
    show_fit(run, card_directory(tmp_path, num_hidden_layers=8), screen=screen)
    assert screen.lines[0].startswith("plan: ")


def test_a_host_that_is_too_small_is_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install_nvidia_smi(tmp_path, monkeypatch, [{}])
    monkeypatch.setattr(this_machine, "read_ram_bytes", lambda: 32 * GIB)
    screen = Lines()
    show_fit(settled(tmp_path, "fsdp.offload=cpu"), card_directory(tmp_path), screen=screen)
    assert screen.lines[1].startswith("note: by plan the host needs 4")
    assert "and has 32.00 GiB: the system may swap" in screen.lines[1]
    assert "; `fsdp.offload=disk" in screen.lines[1]


def test_a_cpu_is_never_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setattr(this_machine, "read_ram_bytes", lambda: 4 * GIB)
    screen, smoke = Lines(), settled(tmp_path, smoke=True)
    refuse_early(smoke)
    show_fit(smoke, card_directory(tmp_path), screen=screen)
    assert screen.lines[0].endswith(" of 4.00 GiB of host memory")
    assert screen.lines[1].startswith("note: by plan the host needs ")


@pytest.mark.usefixtures("one_gpu")
def test_what_cannot_be_planned_is_a_note(tmp_path: Path) -> None:
    screen, run = Lines(), settled(tmp_path)
    empty = tmp_path / "empty"
    empty.mkdir()
    (empty / "config.json").write_text('{"model_type": "unheard_of"}')
    show_fit(run, empty, screen=screen)
    assert screen.lines[0].startswith("note: there is no plan of this run: ")
    files = RunFiles(tmp_path)
    files.plan.write_text("{}")
    keep_plan(files, run, {"model": {"directory": str(empty)}})
    assert not files.plan.exists(), "that of an earlier start"


@pytest.mark.usefixtures("one_gpu")
def test_the_plan_of_a_run_knows_its_rows(tmp_path: Path) -> None:
    run, files = settled(tmp_path, "fsdp.offload=cpu", "training.steps=null"), RunFiles(tmp_path)
    inputs = {
        "model": {"directory": str(card_directory(tmp_path))},
        "prepared": {"report": {"num_sequences": 160}},
    }
    keep_plan(files, run, inputs)
    plan = json.loads(files.plan.read_text())
    assert plan["device"]["type"] == "cuda"
    assert plan["time"]["total_steps"] == 160 // 8
    assert plan["machine"]["gpus"][0]["name"] == "RTX 4090"


@pytest.mark.usefixtures("one_gpu")
def test_train_ends_with_exit_code_3(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    settled(tmp_path)
    with pytest.raises(SystemExit) as end:
        main(["train", "my.yaml"])
    assert end.value.code == ExitCode.DOES_NOT_FIT
    assert "by plan the run does not fit" in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()
