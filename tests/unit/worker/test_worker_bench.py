"""The benchmarks compare like with like: the same model, counted operations, recipes that exist."""

from __future__ import annotations

import json
import os
import pkgutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from support.ranks import RankPool
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from fsdpq.errors import LaunchError, UsageError
from fsdpq.run_files.bench_record import BenchResult, Spread, ratio
from fsdpq.run_files.benchmarks import BENCHMARKS, BenchJob
from fsdpq.worker.bench import (
    cli_start,
    contender_processes,
    load,
    made_up,
    memory,
    memory_process,
    memory_setups,
    step,
)
from fsdpq.worker.bench.allocations import fit_line
from fsdpq.worker.bench.children import Work, run_children
from fsdpq.worker.bench.cli_start import time_command
from fsdpq.worker.bench.contender_processes import Found, OutOfMemoryHere, Rounds
from fsdpq.worker.bench.contenders import ContenderOptions, MatmulRate
from fsdpq.worker.bench.made_up import write_made_up
from fsdpq.worker.bench.memory_process import build_recipe, make_step
from fsdpq.worker.bench.memory_setups import choose_setups, list_setups
from fsdpq.worker.bench.shapes import SHAPES, Batch, attention_flops, find_shape, step_flops

LENGTHS = (64, 96, 128, 160)
OURS = [setup for setup in list_setups(LENGTHS, compare=True) if not setup.stock]


def nothing(_text: str) -> None:
    """Tells nobody."""


def job_for(tmp_path: Path, **settings: Any) -> BenchJob:
    return BenchJob("cpu", True, 2, tmp_path, settings)


def test_every_benchmark_names_a_function_that_is_there() -> None:
    for benchmark in BENCHMARKS:
        assert callable(pkgutil.resolve_name(benchmark.function))
        assert set(benchmark.on_gpu) | set(benchmark.quick) <= set(benchmark.settings)


def test_counted_operations_are_those_of_transformers() -> None:
    shape, batch = SHAPES["tiny"], Batch(2, 16)
    model = LlamaForCausalLM(LlamaConfig(**shape.config(batch.tokens)))
    model.enable_input_require_grads()
    config = LoraConfig(r=3, target_modules="all-linear", lora_dropout=0.0)
    peft_model = get_peft_model(model, config)  # pyright: ignore[reportArgumentType]
    ids = torch.ones(batch.rows, batch.tokens, dtype=torch.long)
    with FlopCounterMode(display=False) as counter:
        peft_model(input_ids=ids, labels=ids).loss.backward()
    counted = counter.get_flop_counts()["Global"][torch.ops.aten.mm]
    attention = attention_flops(shape, batch, recompute=False)
    assert counted == step_flops(shape, batch, lora_rank=3, recompute=False) - attention


def test_the_rate_multiplies_what_it_says_it_does() -> None:
    shape, batch = SHAPES["tiny"], Batch(1, 8)
    with FlopCounterMode(display=False) as counter:
        MatmulRate(shape, torch.float32, "cpu").flops_per_s(batch)
    # each of the sizes once, whatever the number of layers, and as often again to warm up
    sizes = [*shape.linears.values(), (shape.vocab, shape.hidden)]
    expected = sum(4 * batch.size * rows * columns for rows, columns in sizes)
    assert counter.get_total_flops() == 2 * expected


@pytest.mark.parametrize("setup", OURS, ids=lambda setup: setup.name)
def test_every_setup_is_a_valid_recipe_and_has_its_tokens(setup: Any) -> None:
    assert build_recipe(setup, Path("model"), "cpu").model.dtype == "bf16"
    for length in setup.lengths:
        [batch] = make_step(setup, length).micro_batches
        assert batch.input_ids.shape == (setup.num_rows, length)
        assert (batch.position_ids is not None) == (setup.num_documents > 1)
        assert len(batch.targets) == setup.num_rows * (length - setup.num_documents)


def test_chosen_setups_bring_the_reference_of_their_method() -> None:
    setups = list_setups(LENGTHS, compare=True)
    assert len({setup.name for setup in setups}) == len(setups)
    names = [setup.name for setup in choose_setups("lora, 2 ranks; dora", setups)]
    assert names == ["dora", "lora, 2 ranks", "PEFT dora"]
    assert not [s for s in choose_setups("all of one rank", setups) if s.num_ranks > 1]
    with pytest.raises(UsageError, match="there is no `lorra`"):
        choose_setups("lorra", setups)


def test_a_setup_without_its_package_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory_setups, "is_installed", lambda name: name != "hqq")
    out = [setup.name for setup in OURS if memory_setups.lacking(setup)]
    assert out == ["lora, hqq 4 bits"]


def test_the_fit_tells_a_line_from_a_curve() -> None:
    lengths = (100, 200, 400, 800)
    straight = fit_line(lengths, [7000 + 30 * n for n in lengths])
    assert straight.token_bytes == pytest.approx(30)
    assert straight.r_squared == pytest.approx(1)
    curved = fit_line(lengths, [7000 + 30 * n + n * n for n in lengths])
    assert curved.r_squared < 0.99
    assert curved.quadratic_share == pytest.approx(800 * 800 / curved.peaks[-1])


def test_ratios_are_of_pairs_and_know_their_target() -> None:
    # a machine that became four times slower meanwhile: the pairs do not show it, the medians would
    found = ratio("speed", [2.0, 8.0, 3.0], [1.0, 4.0, 1.0], better="higher", target=1.5)
    assert (found.value, found.low, found.high, found.missed) == (2.0, 2.0, 3.0, False)
    assert ratio("memory", [3.0], [2.0], better="lower", target=1.0).missed
    uneven = ratio("speed", [2.0, 4.0], [1.0])
    assert (uneven.value, uneven.low, uneven.high) == (3.0, 2.0, 4.0)


def test_children_answer_or_say_why_not(tmp_path: Path) -> None:
    work = Work("words", "json:dumps", {"obj": {"a": 1}}, num_processes=2)
    assert run_children(work, tmp_path) == ['{"a": 1}'] * 2
    with pytest.raises(LaunchError, match="broken: Expecting property name") as caught:
        run_children(Work("broken", "json:loads", {"s": "{"}), tmp_path)
    assert "JSONDecodeError" in caught.value.details


def test_commands_are_timed_in_turns_after_one_round(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []

    def answer(command: Any, environment: Any, _directory: Path) -> tuple[float, float]:
        assert "PYTHONDONTWRITEBYTECODE" not in environment
        asked.append(command[-1])
        return (9000.0, 1.0) if len(asked) <= 3 else (100.0 * (len(asked) % 3 + 1), 1.0)

    commands = {cli_start.FLOOR: ["a"], "fsdpq validate x": ["b"], "fsdpq plan y": ["c"]}
    monkeypatch.setattr(cli_start, "list_commands", lambda **_: commands)
    monkeypatch.setattr(cli_start, "time_command", answer)
    monkeypatch.setenv("PYTHONDONTWRITEBYTECODE", "1")
    result = cli_start.measure_cli(job_for(tmp_path, runs=2), nothing)
    assert asked == ["a", "b", "c"] * 3
    rows = [(row["wall_ms"].median, row["of_floor"]) for row in result.tables[0].rows]
    assert rows == [(200.0, 1.0), (300.0, 1.5), (100.0, 0.5)], "the first round is left out"
    assert [r.value for r in result.ratios] == pytest.approx([300 / 350, 100 / 500])


def test_listed_commands_work(tmp_path: Path) -> None:
    commands = cli_start.list_commands(compare=True)
    planned = next(name for name in commands if name.startswith("fsdpq plan"))
    wall_ms, _ = time_command(commands[planned], os.environ, tmp_path)
    assert wall_ms > 0


def test_a_command_that_fails_is_no_measurement(tmp_path: Path) -> None:
    with pytest.raises(LaunchError, match="ended with 3"):
        time_command(("sh", "-c", "exit 3"), {}, tmp_path)
    wall_ms, cpu_ms = time_command(("sh", "-c", "sleep 0.2"), {"PATH": "/usr/bin:/bin"}, tmp_path)
    assert cpu_ms < 100 < 200 <= wall_ms


class FakeProcess:
    """A contender that answers from a script; a stock one has no memory for the long batch."""

    def __init__(self, name: str, _options: Any, _threads: int) -> None:
        self.name, self.closed = name, False

    def wait_until_built(self) -> None:
        pass

    def step(self, batch: Batch) -> dict[str, float]:
        assert not self.closed
        if self.name.startswith("transformers") and batch.tokens > 16:
            raise OutOfMemoryHere(self.name)
        seconds = 1.0 if self.name.startswith("fsdpq") else 2.0
        return {
            "loss": 1e9,
            "seconds": seconds,
            "cpu_seconds": 3.0,
            "peak_bytes": 5,
            "host_bytes": 6,
        }

    def close(self) -> None:
        self.closed = True


def test_a_stock_contender_without_memory_is_left_out_and_noted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(contender_processes, "ContenderProcess", FakeProcess)
    monkeypatch.setattr(contender_processes, "RateHere", FakeProcess)
    monkeypatch.setattr(step, "write_checkpoint", lambda *_: None)
    job = job_for(
        tmp_path, shape="tiny", layers=0, batches="1x16 1x32", rounds=1, dtypes="bf16", lora_rank=4
    )
    result = step.measure_step(job, nothing)
    rows = [(row["batch"], row["contender"]) for row in result.tables[0].rows]
    stock = ["transformers", "transformers, unprepared"]
    assert rows == [*(("1x16", name) for name in ("fsdpq", *stock)), ("1x32", "fsdpq")]
    assert len([note for note in result.notes if "ran out of memory" in note]) == 2
    speeds = {r.name: r.value for r in result.ratios if r.name.startswith("tokens/s")}
    assert set(speeds.values()) == {2.0}
    first = result.tables[0].rows[0]
    assert first["tokens_per_s"] == Spread(16, 16, 16, 32)  # 512 tokens a round: 32 steps of 16
    assert first["share"] == pytest.approx(
        step_flops(SHAPES["tiny"], Batch(1, 16), lora_rank=4, recompute=True) / 1e9
    )


def test_steps_that_are_not_timed_warm_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(contender_processes, "ContenderProcess", FakeProcess)
    options = ContenderOptions(SHAPES["tiny"], None, "", "cpu", 4, 16)
    batch = Batch(1, 16)
    found: dict[Any, Found] = contender_processes.measure_together(
        ["fsdpq:bf16"], Rounds([batch], lambda _: 2), options=options, threads=1, tell=nothing
    )
    assert len(found["fsdpq:bf16", batch].losses) == 3
    assert len(found["fsdpq:bf16", batch].seconds) == 2


@pytest.mark.parametrize("num_files", [1, 3])
def test_made_up_checkpoints_are_what_transformers_loads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, num_files: int
) -> None:
    whole = 2 * SHAPES["tiny"].num_weights
    monkeypatch.setattr(made_up, "MAX_FILE_BYTES", whole / num_files * 1.3)
    num_bytes = write_made_up(tmp_path / "model", SHAPES["tiny"])
    assert len(list((tmp_path / "model").glob("*.safetensors"))) == num_files
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.bfloat16)
    weights = model.state_dict()
    assert sum(tensor.nbytes for tensor in weights.values()) == num_bytes
    assert 0.01 < weights["lm_head.weight"].float().std() < 0.03
    assert not torch.equal(weights["lm_head.weight"], weights["model.embed_tokens.weight"])


def test_settings_that_make_no_sense_are_the_users_mistake(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="there is no shape `8b`"):
        find_shape("8b")
    with pytest.raises(UsageError, match="`2x` is no batch"):
        Batch.parse("2x")
    with pytest.raises(UsageError, match=r"memory\.lengths"):
        memory.measure_memory(job_for(tmp_path, shape="tiny", lengths="64", setups="all"), nothing)
    with pytest.raises(UsageError, match=r"load\.ranks"):
        load.measure_load(job_for(tmp_path, shape="tiny", layers=0, ranks="two"), nothing)


def call_here(function: str, arguments: dict[str, Any]) -> Any:
    """Does on a rank that lives on what a process of its own would do."""
    for module in (load, memory_process):
        module.start_process_group = torch.device  # type: ignore[assignment]
    return pkgutil.resolve_name(function)(**arguments)


@pytest.fixture
def on_living_ranks(ranks: RankPool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Processes of benchmarks are ranks that have imported everything already."""

    def run(work: Work, _directory: Path) -> list[Any]:
        plain = json.loads(json.dumps(work.arguments, default=str))
        return ranks.run(work.num_processes, call_here, work.function, plain)

    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setattr(load, "run_children", run)
    monkeypatch.setattr(memory, "run_children", run)
    monkeypatch.setattr(memory, "ThreadPoolExecutor", lambda _n: memory_pool(1))


memory_pool = memory.ThreadPoolExecutor


@pytest.mark.usefixtures("on_living_ranks")
def test_loading_is_measured_beside_transformers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(load, "REFERENCE_PROCESSES", (1,))
    job = job_for(tmp_path, shape="tiny", layers=0, ranks="1 2", repeats=1)
    result = load.measure_load(job, nothing)
    assert BenchResult.from_json(json.loads(json.dumps(result.as_json()))).ratios == result.ratios
    rows = {(r["contender"], r["ranks"], r["threads"]): r for r in result.tables[0].rows}
    ours, theirs = [("fsdpq", 1, 1), ("fsdpq", 1, 2), ("fsdpq", 2, 1)], ("transformers", 1, 2)
    assert list(rows) == [*ours, theirs]
    for ranks in (1, 2):
        row = rows["fsdpq", ranks, 2 // ranks]
        # a rank keeps its rows; config and headers are read beside the weights
        assert row["own_mb"] == pytest.approx(rows["fsdpq", 1, 1]["own_mb"] / ranks, rel=0.02)
        assert 1.0 <= row["read"] < 1.2 + 0.2 * ranks
    # ours has an adapter of rank 1 on all linears beside it
    assert rows[theirs]["own_mb"] == pytest.approx(rows["fsdpq", 1, 2]["own_mb"], rel=0.1)


@pytest.mark.usefixtures("on_living_ranks")
def test_memory_is_measured_by_phase_and_length(tmp_path: Path) -> None:
    setups = "lora; lora, offload disk; lora, 2 ranks"
    job = job_for(tmp_path, shape="tiny", lengths="64 128 192 256", setups=setups)
    result = memory.measure_memory(job, nothing)
    phases, lengths = result.tables
    rows = {row["setup"]: row for row in phases.rows}
    assert list(rows) == ["lora", "lora, offload disk", "lora, 2 ranks", "PEFT lora"]
    frozen, trained = rows["lora"]["frozen"], rows["lora"]["trained"]
    assert rows["PEFT lora"]["trained"] == trained
    assert rows["lora, 2 ranks"]["frozen"] == pytest.approx(frozen / 2, rel=0.05)
    for row in lengths.rows:
        assert row["64"] < row["128"] < row["192"] < row["256"]
    lines = {r["setup"]: r["r_squared"] for r in lengths.rows if r["phase"] == "backward"}
    assert lines.keys() == {"lora", "PEFT lora"}
    assert min(lines.values()) > 0.99, "a layer keeps a fixed number of values a token"
    ratios = {ratio.name: ratio.value for ratio in result.ratios}
    assert ratios["PEFT lora's largest piece / all logits, 256 tokens"] >= 1
    assert ratios["lora / PEFT lora, a step of 256 tokens"] < 1
