"""``fsdpq bench``: what is chosen, what is written, what is printed, what is drawn."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from fsdpq.cli.main import main
from fsdpq.errors import EnvironmentProblemError, ExitCode, MissingDependencyError, UsageError
from fsdpq.launch import bench, bench_plots
from fsdpq.launch.bench import BenchOptions, choose_benchmarks, choose_device
from fsdpq.run_files.bench_record import BenchResult, Plot

FAKE = str(Path(__file__).with_name("fake_bench.py"))
TABLE = """\
cli: runs=2

|       | rows/s              | peak, MB |
| ----- | ------------------- | -------- |
| fsdpq | 20.0 (19.0 to 22.5) | 1,234    |
| cpu   | 10.0                |          |

| ratio           |      | pairs        | aim               |
| --------------- | ---- | ------------ | ----------------- |
| speed, of stock | 2.00 | 1.90 to 2.25 | at least 1.5      |
| peak, of stock  | 1.10 |              | at most 1: missed |

- a note

"""


@pytest.fixture(autouse=True)
def fake_worker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setitem(bench.run_benchmarks.__kwdefaults__, "worker", (FAKE,))


def run(capsys: pytest.CaptureFixture[str], *arguments: str, code: int = 0) -> tuple[str, str]:
    if code:
        with pytest.raises(SystemExit) as stop:
            main(["bench", *arguments])
        assert stop.value.code == code
    else:
        main(["bench", *arguments])
    captured = capsys.readouterr()
    return captured.out, captured.err


def record_of(directory: Path) -> Any:
    return json.loads((directory / "bench.json").read_text())


def test_tables_are_printed_and_the_record_written(capsys: pytest.CaptureFixture[str]) -> None:
    out, err = run(capsys, "cli", "--set", "cli.runs=2", "--out", "here", "--device", "cpu")
    assert out == TABLE
    assert err.splitlines()[0].startswith("cli: how long commands take")
    assert "  measuring cli" in err.splitlines()
    assert err.splitlines()[-1] == "written to here"
    record = record_of(Path("here"))
    assert record["command"] == "fsdpq bench cli --device cpu --set 'cli.runs=2'"
    assert record["compare"] is None
    assert record["versions"]["python"].startswith("3.")
    assert record["hardware"]["memory_bytes"] > 0
    [(name, content)] = record["benchmarks"].items()
    assert (name, content["settings"]) == ("cli", {"runs": 2})
    assert BenchResult.from_json(content).ratios[1].missed
    left = sorted(path.name for path in Path("here").iterdir())
    assert left == ["bench.json", "cli-speed.png", "logs"], "what was made up is gone"


def test_what_was_measured_stays_when_a_later_one_fails(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAKE_BENCH", "memory")
    out, err = run(capsys, "cli", "memory", "step", "--out", "here", code=1)
    assert "error: it broke" in err
    assert "mend it" in err
    assert list(record_of(Path("here"))["benchmarks"]) == ["step"], "in the order of the table"
    assert out.count("- a note") == 1


def test_json_is_the_record(capsys: pytest.CaptureFixture[str]) -> None:
    out, _ = run(capsys, "load", "--quick", "--json")
    [directory] = Path("runs").glob("bench-*")
    assert json.loads(out) == record_of(directory)
    settings = json.loads(out)["benchmarks"]["load"]["settings"]
    assert settings == {"shape": "1b", "layers": 3, "ranks": "1 2", "repeats": 1}


def test_without_matplotlib_there_is_a_notice_and_no_picture(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench_plots, "is_installed", lambda _name: False)
    _, err = run(capsys, "cli", "--out", "here")
    assert "pip install 'fsdpq[bench]'" in err
    assert not list(Path("here").glob("*.png"))


def test_a_record_is_not_written_over(capsys: pytest.CaptureFixture[str]) -> None:
    run(capsys, "cli", "--out", "here")
    before = (Path("here") / "bench.json").read_bytes()
    _, err = run(capsys, "cli", "--out", "here", code=ExitCode.RECIPE)
    assert "holds a record already" in err
    assert (Path("here") / "bench.json").read_bytes() == before


def test_the_list_names_every_benchmark_and_its_settings(
    capsys: pytest.CaptureFixture[str],
) -> None:
    out, _ = run(capsys, "--list")
    for text in ("load ", "step ", "memory ", "data ", "cli ", "step.batches=1x512 2x2048"):
        assert text in out
    listed = json.loads(run(capsys, "--list", "--json")[0])
    assert [row["name"] for row in listed] == ["load", "step", "memory", "data", "cli"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (BenchOptions(["speed"]), "there is no benchmark `speed`"),
        (BenchOptions(["step"], changes=["step.round=3"]), "`step` has no setting `round`"),
        (BenchOptions(["step"], changes=["step.rounds=many"]), "is no whole number"),
        (BenchOptions(["step"], changes=["rounds=3"]), "`--set rounds=3`"),
        (BenchOptions(["step"], changes=["data.rows=3"]), "`data` is not measured"),
    ],
)
def test_mistakes_of_the_command_line(options: BenchOptions, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        choose_benchmarks(options, "cpu")


def test_a_gpu_has_settings_of_its_own() -> None:
    [step] = choose_benchmarks(BenchOptions(["step"], changes=["step.lora_rank=8"]), "cuda")
    assert step.settings["shape"] == "7b"
    assert step.settings["lora_rank"] == 8
    [quick] = choose_benchmarks(BenchOptions(["step"], quick=True), "cuda")
    assert (quick.settings["shape"], quick.settings["layers"]) == ("7b", 2)


def test_the_device_is_a_gpu_where_there_is_one() -> None:
    assert choose_device(None, ["NVIDIA H200"]) == "cuda"
    assert choose_device("cpu", ["NVIDIA H200"]) == "cpu"
    assert choose_device(None, []) == "cpu"
    with pytest.raises(EnvironmentProblemError, match="shows no GPU"):
        choose_device("cuda", [])


def test_a_missing_reference_is_named_before_anything_runs(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(bench, "is_installed", lambda name: name not in ("trl", "peft"))
    with pytest.raises(MissingDependencyError, match="`step` needs `peft`") as caught:
        choose_benchmarks(BenchOptions(["step", "load"], compare=True), "cpu")
    assert "pip install peft" in caught.value.hint
    assert choose_benchmarks(BenchOptions(["step", "data"]), "cpu"), "alone it needs neither"


PLOTS = (
    Plot(
        "lines", "T", "tokens", "MB", lines={"one": [(1.0, 2.0), (2.0, 3.0)], "two": [(1.0, 5.0)]}
    ),
    Plot("bars", "T", "", "MB", bars={"a": {"x": 1.0, "y": 2.0}, "b": {"y": 3.0}}),
    Plot("lying", "T", "", "ms", bars={f"command {n}": {"wall": n + 1.0} for n in range(6)}),
    Plot("empty", "T", "", "ms"),
)


def test_pictures_are_drawn_without_a_display(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from matplotlib.image import imread

    monkeypatch.delenv("DISPLAY", raising=False)
    paths = bench_plots.draw_plots(PLOTS, tmp_path)
    assert [path.name for path in paths] == ["lines.png", "bars.png", "lying.png"]
    for path in paths:
        pixels = imread(path)
        assert pixels.shape[0] > 400
        first = [int(bench_plots.COLORS[0][n : n + 2], 16) for n in (1, 3, 5)]
        shown = (255 * pixels[..., :3]).round() == first
        assert shown.all(axis=-1).sum() > 20, "the first series has the first colour"
    assert "matplotlib.pyplot" not in sys.modules
