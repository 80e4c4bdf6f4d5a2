"""The report says what the run's files say, whatever they hold."""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
from pathlib import Path

import pytest
from support.run_dirs import HOSTILE, Tags, write_run

from fsdpq.reports.charts import build_chart
from fsdpq.reports.report import find_drift, format_bytes, format_duration, write_report
from fsdpq.reports.ticks import format_number, tick_values
from fsdpq.run_files.paths import RunFiles
from fsdpq.run_files.writing import append_json_line


def render(files: RunFiles) -> tuple[str, dict]:
    write_report(files)
    return files.report_html.read_text(), json.loads(files.report_json.read_text())


def words(html: str) -> str:
    return re.sub(r"\s+", " ", Tags(html).text)


def test_page_shows_the_numbers_of_the_files(tmp_path):
    html, _ = render(write_run(tmp_path / "demo-1"))
    text = words(html)
    for expected in (
        "2.500 → 1.500 (-1.000)", "perplexity 12.18 → 4.482", "of 4, in 2 min 05 s",
        "last training loss0.812", "12,345", "of 25,000 read", "4.884M",
        "3.63% of the base's 134.5M", "3.00 GiB", "80.00 MiB", "9.00 MiB", "2.00 GiB",
        "packages.torch", "2.13.0", "finished", "runs/plain, 3.00 MiB",
        "differ from the trained model's by at most 3.3e-07 of the largest",
    ):  # fmt: skip
        assert expected in text, expected


def test_json_holds_the_same_numbers(tmp_path):
    _, content = render(write_run(tmp_path / "demo-1"))
    headline = content["headline"]
    assert (headline["eval_loss_before"], headline["eval_loss_after"]) == (2.5, 1.5)
    assert headline["perplexity_after"] == pytest.approx(math.exp(1.5))
    assert headline["median_tokens_per_s"] == 302.5
    assert [row["loss"] for row in content["steps"]] == [3.25, 3.25 / 2, 3.25 / 3, 3.25 / 4]
    assert [row["step"] for row in content["evals"]] == [0, 4]
    assert content["memory"][1] == {
        "rank": 1,
        "base_bytes": 79 * 2**20,
        "adapter_bytes": 9 * 2**20,
        "peak_bytes": 2 * 2**30,
    }
    assert content["status"] == "finished"
    assert content["missing"] == []


def test_memory_by_phase_of_the_last_start(tmp_path):
    files = write_run(tmp_path / "demo-1")
    without, content = render(files)
    assert content["memory_phases"] == []
    assert "Memory by phase" not in without
    mib = 2**20
    measured = [("start", 100), ("load", 900), ("start", 100), ("load", 160), ("forward", 250)]
    measured += [("backward", 190), ("forward", 280), ("backward", 180), ("optimizer", 170)]
    for phase, size in measured:
        row = {"event": "memory", "phase": phase, "bytes": size * mib, "peak_bytes": 300 * mib}
        append_json_line(files.metrics, row)
    html, content = render(files)
    found = [(row["phase"], row["bytes"] // mib) for row in content["memory_phases"]]
    assert found == [
        ("start", 100), ("load", 160), ("forward", 280), ("backward", 190), ("optimizer", 170)
    ]  # fmt: skip
    assert "forward280.00 MiB300.00 MiB" in words(html).replace(" MiB ", " MiB")
    assert "width: 93.33%" in html, "280 of 300 MiB"
    assert "width: 6.67%" in html


def test_page_shows_plan_and_actual_beside_each_other(tmp_path):
    files = write_run(tmp_path / "demo-1")
    assert "Plan against actual" not in render(files)[0]
    gib = 2**30
    moments = [{"phase": "backward", "name": "b", "allocated_bytes": 10 * gib, "bytes": 11 * gib}]
    moments = [moment | {"parts": {"context": gib}} for moment in moments]
    plan = {"device": {"type": "cuda", "moments": moments}, "host": {"peak_bytes": gib}}
    files.plan.write_text(json.dumps(plan | {"workload": {"rows": 1, "seq_len": 64}}))
    memory = {"event": "memory", "phase": "backward", "bytes": gib, "peak_bytes": 12 * gib}
    append_json_line(files.metrics, memory)
    append_json_line(files.metrics, {"event": "held", "device": {}, "tokens": 60})
    html, content = render(files)
    text = words(html)
    assert re.search(r"backward ?10\.00 GiB ?12\.00 GiB ?\+20\.0 %", text)
    assert "Drift: memory was 20% above the plan (backward: 12.00 GiB" in text
    assert "shorter rows or fewer of them" in text
    assert content["plan_against_actual"]["phases"][0]["measured_bytes"] == 12 * gib
    assert find_drift(files) == content["plan_against_actual"]["drift"]


def test_loss_curve_has_every_point_where_it_belongs(tmp_path):
    html, _ = render(write_run(tmp_path / "demo-1"))
    titles = re.findall(r"<title>([^<]*step[^<]*)</title>", html)
    assert "training, step 1: 3.25" in titles
    assert "held out, step 4: 1.5" in titles
    chart = build_chart("Loss", {"a": [(0, 1.0), (10, 3.0), (20, 2.0)]})
    assert [tick.label for tick in chart.y_ticks] == ["1", "1.5", "2", "2.5", "3"]
    assert [(dot.x, dot.y) for dot in chart.curves[0].dots] == [(0, 100), (50, 0), (100, 50)]
    assert chart.curves[0].path == "M0.00 100.00L50.00 0.00L100.00 50.00"


def test_a_load_balancing_loss_has_a_chart_of_its_own(tmp_path):
    files = write_run(tmp_path / "demo-1")
    assert "Load-balancing loss" not in render(files)[0]
    append_json_line(files.metrics, {"event": "step", "step": 5, "loss": 1.0, "aux_loss": 2.125})
    html, content = render(files)
    assert "Load-balancing loss, step 5: 2.125" in html
    assert content["steps"][-1]["aux_loss"] == 2.125


def test_hostile_text_is_escaped_everywhere(tmp_path):
    plain, _ = render(write_run(tmp_path / "demo-1"))
    hostile, content = render(write_run(tmp_path / "demo-2", text=HOSTILE))
    assert "script" not in {tag for tag, _ in Tags(hostile).found}
    assert "img" not in {tag for tag, _ in Tags(hostile).found}
    assert len(Tags(hostile).found) == len(Tags(plain).found)
    assert HOSTILE in Tags(hostile).text
    assert content["samples"][0]["prompt"] == HOSTILE


def test_page_loads_nothing_and_runs_nothing(tmp_path):
    html, _ = render(write_run(tmp_path / "demo-1"))
    assert "http:" not in html
    assert "https:" not in html
    assert "url(" not in html
    assert "@import" not in html
    tags = Tags(html).found
    assert not {tag for tag, _ in tags} & {"script", "link", "img", "iframe", "object", "use"}
    attributes = {name for _, attrs in tags for name in attrs}
    assert not {name for name in attributes if name.startswith("on") or name in ("src", "href")}
    assert any("default-src 'none'" in (attrs.get("content") or "") for _, attrs in tags)


@pytest.mark.parametrize(("num_steps", "num_evals"), [(0, 0), (1, 0), (0, 1), (1, 1), (2000, 2)])
def test_any_number_of_points_gives_a_page(tmp_path, num_steps, num_evals):
    files = write_run(tmp_path / "r", num_steps=num_steps, num_evals=num_evals, done=False)
    html, content = render(files)
    assert content["status"] == "unfinished"
    assert "the run has not finished" in html
    assert ("no measurements" in html) == (num_steps == 0)
    assert len(content["steps"]) == num_steps
    assert not re.search(r"\bnan\b|\binf\b", html)
    assert ("mean of 3 measurements" in html) == (num_steps == 2000)
    assert ("mean of 41 around" in html) == (num_steps == 2000)
    dots = re.findall(r'class="dot" [^>]*><title>held out', html)
    assert len(dots) == num_evals, "held-out losses are not averaged"


def test_loss_that_is_not_finite_leaves_valid_json_and_a_gap(tmp_path):
    files = write_run(tmp_path / "r", done=False)
    row = {"event": "step", "step": 5, "loss": float("nan"), "lr": float("inf")}
    append_json_line(files.metrics, row)
    html, content = render(files)
    assert content["steps"][-1]["loss"] is None
    assert "step 5" not in html


def test_empty_directory_lists_what_is_missing(tmp_path):
    html, content = render(RunFiles(tmp_path))
    assert content["missing"] == [
        "recipe.resolved.yaml is not there",
        "run.lock.json is not there",
        "metrics.jsonl is not there",
        "events.jsonl is not there",
    ]
    assert all(line in html for line in content["missing"])


def test_torn_files_are_named_and_the_rest_is_shown(tmp_path):
    files = write_run(tmp_path / "r", num_steps=2)
    with files.metrics.open("a") as file:
        file.write('{"event": "step", "st\n{"event": "step"')
    files.lock.write_text('{"packages": ')
    _, content = render(files)
    assert content["missing"] == [
        "run.lock.json cannot be read",
        "metrics.jsonl cannot be read after line 4",
    ]
    assert len(content["steps"]) == 2


def test_failed_run_shows_the_rank_that_failed_first(tmp_path):
    files = write_run(tmp_path / "r", done=False)
    files.logs.mkdir()
    for rank, time in ((0, 9.0), (1, 8.0)):
        error = {"rank": rank, "kind": "TrainingError", "message": f"broke {rank}", "time": time}
        files.rank_error(rank).write_text(json.dumps({**error, "hint": "lower the lr"}))
    html, content = render(files)
    assert content["status"] == "failed"
    assert "Rank 1 failed: TrainingError" in html
    assert "broke 1" in html
    assert "broke 0" not in html


def test_repeated_step_of_a_resumed_run_counts_once(tmp_path):
    files = write_run(tmp_path / "r")
    append_json_line(files.metrics, {"event": "step", "step": 4, "loss": 0.5})
    _, content = render(files)
    assert [row["step"] for row in content["steps"]] == [1, 2, 3, 4]
    assert content["steps"][-1]["loss"] == 0.5


def test_resumes_are_listed_and_marked_and_what_they_undid_is_left_out(tmp_path):
    files = write_run(tmp_path / "r")
    undone = {"event": "step", "step": 5, "loss": 0.1, "time": 2.0}
    append_json_line(files.metrics, undone)
    append_json_line(files.metrics, {"event": "eval", "step": 9, "loss": 0.1, "time": 2.0})
    for time in (3.0, 4.0):
        resume = {"event": "resume", "step": 2, "directory": "x/step-00000002", "world_size": 2}
        append_json_line(files.events, resume | {"time": time})
    append_json_line(files.metrics, {"event": "step", "step": 3, "loss": 0.7, "time": 5.0})
    html, content = render(files)
    assert [(row["step"], row["loss"]) for row in content["steps"]] == [
        (1, 3.25), (2, 1.625), (3, 0.7),
    ]  # fmt: skip
    assert [row["step"] for row in content["evals"]] == [0]
    assert [row["step"] for row in content["resumes"]] == [2, 2]
    text = words(html)
    assert "Started again 2 times, going on from step 2, 2" in text
    # One line in the middle of steps 0 to 4, told in its tooltip.
    assert html.count('class="mark"') == 1
    assert "went on from step 2, saved by 2 ranks" in html


def test_report_is_replaced_whole_and_leaves_no_drafts(tmp_path):
    files = write_run(tmp_path / "r")
    write_report(files)
    before = sorted(path.name for path in files.root.iterdir())
    write_report(files)
    assert sorted(path.name for path in files.root.iterdir()) == before
    assert not [name for name in before if name.startswith(".")]


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [(0, 100, [0, 50, 100]), (0.0, 5e-4, [0, 5e-4]), (2, 2, [1.8, 2, 2.2]), (0, 0, [-1, 0, 1])],
)
def test_ticks_are_round_and_enclose_the_values(low, high, expected):
    assert tick_values(low, high, 3) == pytest.approx(expected)


def test_units_are_readable():
    assert [format_bytes(n) for n in (None, 512, 2**20, 1.5 * 2**30)] == [
        "\N{EN DASH}", "512 B", "1.00 MiB", "1.50 GiB",
    ]  # fmt: skip
    assert [format_duration(s) for s in (4.25, 125, 3720)] == ["4.2 s", "2 min 05 s", "1 h 02 min"]
    assert [format_number(n) for n in (0, 5e-4, 1.25, 12_000, 3e6)] == [
        "0", "5e-4", "1.25", "12k", "3M",
    ]  # fmt: skip


def test_report_imports_no_torch(tmp_path):
    code = (
        "import sys; from pathlib import Path; from fsdpq.reports.report import write_report; "
        "from fsdpq.run_files.paths import RunFiles; write_report(RunFiles(Path(sys.argv[1]))); "
        "print('torch' in sys.modules)"
    )
    root = Path(__file__).parents[3]
    command = [sys.executable, "-c", code, str(tmp_path)]
    output = subprocess.run(command, cwd=root, capture_output=True, text=True, check=True)
    assert output.stdout.strip() == "False"
