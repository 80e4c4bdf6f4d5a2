"""Runs sent to Weights & Biases: by its real client, offline and to nobody, and by fakes."""

from __future__ import annotations

import contextlib
import io
import json
import os
import signal
import socket
import time
from pathlib import Path
from typing import Any

import pytest
from support.tiny import tiny_recipe
from support.wandb_files import SentRun, read_run
from support.wandb_service import KEY, wandb_service

import fsdpq.launch.tracking.tracker as tracker_module
from fsdpq.errors import RunStoppedError
from fsdpq.launch.ranks import processes
from fsdpq.launch.tracking.tracker import Tracker, tracked, tracker_environment, wanted_mode
from fsdpq.launch.tracking.wandb_process import Outcome, Tracking
from fsdpq.recipe.load import dump_recipe
from fsdpq.recipe.sections.output import WandbOptions
from fsdpq.reports.run_record import read_record
from fsdpq.run_files.paths import RunFiles
from fsdpq.run_files.tracking import read_tracker_state
from fsdpq.run_files.writing import append_json_line, read_json_lines

SENT = {"sinks": ["jsonl", "wandb"]}


@pytest.fixture(autouse=True)
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """A busy machine takes its time to start Python."""
    monkeypatch.setattr(tracker_module, "PATIENCE_S", 600.0)
    monkeypatch.setattr(tracker_module, "STOPPED_S", 120.0)


class FakeRanks:
    """Writes what rank 0 of a run writes."""

    def __init__(self, root: Path, **wandb: Any) -> None:
        self.files = RunFiles(root)
        self.files.logs.mkdir(parents=True)
        self.recipe = tiny_recipe(
            metrics={**SENT, "wandb": {"project": "p", "mode": "offline"} | wandb},
            export={"format": "peft"},
        )
        self.files.resolved.write_text(dump_recipe(self.recipe))
        lock = {"fsdpq": "1", "inputs": {"model": {"sha256": "ab"}}}
        self.files.lock.write_text(json.dumps(lock))

    def event(self, event: str, **facts: Any) -> None:
        row = {"event": event, **facts, "time": time.time()}
        append_json_line(self.files.events, row)

    def metric(self, name: str, **facts: Any) -> None:
        append_json_line(self.files.metrics, {"event": name, **facts, "time": time.time()})

    def steps(self, first: int, last: int, *, shift: float = 0.0) -> None:
        for step in range(first, last + 1):
            loss = 3.0 / step + shift
            self.metric("step", step=step, total_steps=6, loss=loss, grad_norm=None, lr=1e-3)

    def finish(self) -> None:
        self.event("sample", when="after", prompt="What is one?", answer="one")
        self.files.adapter.mkdir()
        (self.files.adapter / "adapter_model.safetensors").write_bytes(b"weights")
        self.event("export", format="peft", num_bytes=7, verified=True, max_difference=1e-6)
        numbers = {"steps": 6, "train_s": 2.0, "tokens": 90, "trained_tokens": 60}
        losses = {"eval_loss_before": 4.0, "eval_loss_after": 0.5}
        self.event("done", **numbers, **losses, peak_memory_bytes=[5, 9], peak_host_bytes=[1, 2])


def kept_values(files: RunFiles, rows: str, name: str) -> list[tuple[int, float]]:
    return [(row["step"], row[name]) for row in getattr(read_record(files), rows)]


def send(ranks: FakeRanks, told: list[str]) -> contextlib.AbstractContextManager[Tracker]:
    return tracked(ranks.files, ranks.recipe, report=told.append)


def send_in_two_starts(ranks: FakeRanks, told: list[str]) -> tuple[SentRun, SentRun]:
    """Sends a run that is stopped after step 4 and goes on from a checkpoint of step 2."""
    with (
        contextlib.suppress(RunStoppedError),
        tracked(ranks.files, ranks.recipe, report=told.append),
    ):
        ranks.event("phase", name="load")
        ranks.metric("memory", phase="load", bytes=100, peak_bytes=120)
        ranks.metric("eval", step=0, loss=4.0, perplexity=54.6)
        ranks.event("sample", when="before", prompt="What is one?", answer="two")
        ranks.event("phase", name="train")
        ranks.steps(1, 4)
        raise RunStoppedError("stopped by SIGTERM")
    first = read_run(ranks.files.root / "wandb")
    with send(ranks, told):
        ranks.event("resume", step=2, directory="checkpoints/step-00000002", world_size=2)
        ranks.event("phase", name="train")
        ranks.steps(3, 6, shift=0.25)
        ranks.metric("eval", step=6, loss=0.5, perplexity=1.6)
        ranks.finish()
    return first, read_run(ranks.files.root / "wandb")


def test_a_run_in_two_starts_is_one_whole_offline_run(tmp_path: Path) -> None:
    """Sent by the real client; rows of the second start differ from those that it makes void."""
    given = {"tags": ["a", "b"], "group": "g", "job_type": "trial", "log_adapter": True}
    ranks, told = FakeRanks(tmp_path / "runs" / "tiny-1", **given), list[str]()
    files = ranks.files
    first, sent = send_in_two_starts(ranks, told)
    assert not told
    assert (first.exit_code, sent.exit_code) == (75, 0)
    assert [step for step, _ in first.values("train/loss")] == [1, 2, 3, 4]
    assert [step for step, _ in sent.values("train/loss")] == [1, 2, 3, 4, 5, 6]
    assert sent.values("train/loss") == kept_values(files, "steps", "loss")
    assert sent.values("train/lr") == kept_values(files, "steps", "lr")
    assert sent.values("eval/loss") == kept_values(files, "evals", "loss")
    assert sent.values("memory/load/peak_bytes") == [(0, 120)]
    assert sent.config == ranks.recipe.model_dump(mode="json")
    assert sent.run.run_id == first.run.run_id
    assert (sent.run.project, sent.run.display_name, sent.run.run_group) == ("p", "tiny-1", "g")
    assert (sent.run.job_type, list(sent.run.tags)) == ("trial", ["a", "b"])
    expected = {"eval_loss": 0.5, "best_eval_loss": 0.5, "peak_memory_bytes": 9, "train_s": 2.0}
    assert expected.items() <= sent.summary.items()
    [table] = (files.root / "wandb").rglob("*.table.json")
    assert json.loads(table.read_text())["data"] == [["What is one?", "two", "one"]]
    check_artifact(sent, files)


def check_artifact(sent: SentRun, files: RunFiles) -> None:
    """What was exported, by name and size; nothing says where it lies."""
    [artifact] = [each for each in sent.artifacts if each.type == "model"]
    [entry] = artifact.manifest.contents
    assert (entry.path, entry.size) == ("adapter_model.safetensors", 7)
    metadata = json.loads(artifact.metadata)
    assert (metadata["base_model"], metadata["base_sha256"]) == ("tiny", "ab")
    assert metadata["export"]["verified"] is True
    assert str(files.root) not in artifact.metadata


def test_a_service_that_cannot_be_reached_costs_no_row(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The real client, and a port where nobody listens; what is sent waits for ``wandb sync``."""
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("WANDB_API_KEY", "a" * 40)
    monkeypatch.setenv("WANDB_INIT_TIMEOUT", "1")
    ranks, told = FakeRanks(tmp_path / "tiny-1", mode="online"), list[str]()
    with send(ranks, told):
        ranks.event("phase", name="train")
        ranks.steps(1, 3)
    assert len(told) == 1
    assert "wandb cannot be reached" in told[0]
    assert "wandb sync" in told[0]
    assert len(read_run(ranks.files.root / "wandb").values("train/loss")) == 3
    [row] = [row for row in read_json_lines(ranks.files.events) if row["event"] == "tracking"]
    assert row["message"] == told[0]
    assert "a" * 40 not in ranks.files.wandb_log.read_text()


def test_a_resumed_run_goes_on_at_the_service(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The real client and a stand-in for the service. What that has of a step stays."""
    with wandb_service() as (address, service):
        monkeypatch.setenv("WANDB_BASE_URL", address)
        monkeypatch.setenv("WANDB_API_KEY", KEY)
        ranks, told = FakeRanks(tmp_path / "tiny-1", mode="online", group="g"), list[str]()
        with contextlib.suppress(RunStoppedError), send(ranks, told):
            ranks.event("phase", name="train")
            ranks.steps(1, 4)
            raise RunStoppedError("stopped by SIGTERM")
        assert [row["_step"] for row in service.history] == [1, 2, 3, 4]
        with send(ranks, told):
            ranks.event("resume", step=2)
            ranks.event("phase", name="train")
            ranks.steps(3, 6, shift=0.25)
    losses = [(row["_step"], row["train/loss"]) for row in service.history]
    assert losses == [(1, 3.0), (2, 1.5), (3, 1.0), (4, 0.75), (5, 0.85), (6, 0.75)]
    assert service.exit_codes == [75, 0]
    config = {name: entry["value"] for name, entry in service.config.items() if name[0] != "_"}
    expected = ranks.recipe.model_dump(mode="json")
    assert expected["data"].pop("columns") == {}, "the client leaves out empty mappings"
    assert config == expected
    assert (service.variables["project"], service.variables["groupName"]) == ("p", "g")
    sent = json.dumps([service.variables, service.config])
    assert socket.gethostname() not in sent
    [url] = {
        row["url"] for row in read_json_lines(ranks.files.events) if row["event"] == "tracking"
    }
    assert url == f"{address}/me/p/runs/{service.variables['name']}"
    assert told == [f"wandb: {url}"] * 2


@pytest.mark.parametrize(
    ("program", "words"),
    [("import time; time.sleep(60)", "was not done 0 s after"), ("exit(3)", "exit code 3")],
)
def test_a_tracker_that_hangs_or_dies_is_told_once_and_ends_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, program: str, words: str
) -> None:
    monkeypatch.setattr(tracker_module, "PROGRAM", ("-c", program))
    monkeypatch.setattr(tracker_module, "START_S", 0.0)
    ranks, told = FakeRanks(tmp_path, finish_timeout_s=0.4), list[str]()
    before = time.monotonic()
    with tracked(ranks.files, ranks.recipe, report=told.append) as tracker:
        tracker.look()
    assert time.monotonic() - before < 20
    assert len(told) == 1
    assert words in told[0]
    assert tracker.tree is not None
    assert tracker.tree.poll() is not None


def test_a_signal_ends_the_waiting_and_the_run_is_as_finished_as_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tracker_module, "PROGRAM", ("-c", "import time; time.sleep(60)"))
    monkeypatch.setattr(tracker_module, "PATIENCE_S", 0.1)
    ranks, told = FakeRanks(tmp_path), list[str]()

    def report(line: str) -> None:
        told.append(line)
        if "Ctrl-C" in line:
            os.kill(os.getpid(), signal.SIGINT)

    with tracked(ranks.files, ranks.recipe, report=report):
        pass
    assert [line.partition(",")[0] for line in told] == [
        "waiting for wandb",
        "wandb was not done 0 s after the end of the run",
    ]


def test_a_disabled_tracker_starts_nothing(tmp_path: Path) -> None:
    ranks = FakeRanks(tmp_path, mode="disabled", project=None)
    with tracked(ranks.files, ranks.recipe, report=pytest.fail) as tracker:
        assert tracker.tree is None
    assert not (ranks.files.root / "wandb").exists()


@pytest.mark.parametrize(
    ("mode", "variable", "expected"),
    [
        ("online", "offline", "offline"),
        ("online", "disabled", "disabled"),
        ("offline", "online", "offline"),
        ("disabled", "online", "disabled"),
        ("online", "nonsense", "online"),
        ("online", "dryrun", "offline"),
    ],
)
def test_the_environment_asks_for_less_and_never_for_more(
    monkeypatch: pytest.MonkeyPatch, mode: Any, variable: str, expected: str
) -> None:
    monkeypatch.setenv("WANDB_MODE", variable)
    assert wanted_mode(WandbOptions(project="p", mode=mode)) == expected


def test_keys_reach_who_needs_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "key")
    monkeypatch.setenv("HF_TOKEN", "token")
    monkeypatch.setenv("WANDB_SERVICE", "of somebody else")
    for network in (False, True):
        assert "WANDB_API_KEY" not in processes.worker_environment(num_ranks=1, network=network)
    environment = tracker_environment()
    assert environment["WANDB_API_KEY"] == "key"
    assert environment.keys().isdisjoint({"HF_TOKEN", "WANDB_SERVICE"})


class FakeRun:
    """A run at a service that keeps what it is given."""

    def __init__(self, mode: str, step: int = 0) -> None:
        self.mode, self.url, self.directory, self.step = mode, "", Path("there"), step
        self.rows: list[tuple[int, float]] = []
        self.is_discarded = False

    def log(self, row: dict[str, Any]) -> None:
        self.step = row["step"]
        self.rows.append((row["step"], row["loss"]))

    def end(self, record: Any, outcome: str) -> str:
        assert record.settings, outcome
        if self.mode == "slow":
            raise TimeoutError
        return ""

    def discard(self) -> None:
        self.is_discarded = True


class EndsAfter(Outcome):
    """Says after some looks that the run has ended; does something before every look."""

    def __init__(self, *actions: Any) -> None:
        self.word, self._actions = "finished", list(actions)

    def wait(self) -> bool:
        if self._actions:
            self._actions.pop(0)()
            return False
        return True


@pytest.mark.parametrize("mode", ["offline", "online"])
@pytest.mark.parametrize("has_checkpoint", [True, False])
def test_ranks_that_restart_meanwhile_leave_no_gap_and_no_double_step(
    tmp_path: Path, mode: str, has_checkpoint: bool
) -> None:
    ranks, runs = FakeRanks(tmp_path), list[FakeRun]()

    def open_run(_run_id: str, mode: str) -> FakeRun:
        runs.append(FakeRun(mode))
        return runs[-1]

    def begin() -> None:
        ranks.event("phase", name="train")
        ranks.steps(1, 4)

    def restart() -> None:
        if has_checkpoint:
            ranks.event("resume", step=2)
        else:
            for path in (ranks.files.metrics, ranks.files.events):
                path.rename(path.with_suffix(".old"))
        ranks.event("phase", name="train")
        ranks.steps(3 if has_checkpoint else 1, 6, shift=0.5)

    tracking = Tracking(ranks.files, open_run, mode=mode, since=time.time())
    tracking.send(EndsAfter(begin, restart))
    steps = [step for step, _ in runs[-1].rows]
    assert steps == [1, 2, 3, 4, 5, 6]
    assert tracking.state.state == "done"
    if mode == "offline":
        assert [run.is_discarded for run in runs] == [True, False]
        assert runs[-1].rows == kept_values(ranks.files, "steps", "loss")
    else:
        assert len(runs) == 1


def test_a_resumed_run_sends_what_the_service_does_not_have(tmp_path: Path) -> None:
    """The service says which step it takes next; what an earlier start left over is sent too."""
    ranks = FakeRanks(tmp_path)
    ranks.steps(1, 4)
    since = time.time()
    run = FakeRun("online", step=3)
    tracking = Tracking(ranks.files, lambda _id, _mode: run, mode="online", since=since)

    def go_on() -> None:
        assert not run.rows, "rows of the first start may be void"
        ranks.event("resume", step=4)
        ranks.event("phase", name="train")
        ranks.steps(5, 6)

    ranks.event("phase", name="load")
    tracking.send(EndsAfter(lambda: None, go_on))
    assert [step for step, _ in run.rows] == [3, 4, 5, 6]


@pytest.mark.parametrize("fails", ["never", "online", "both"])
def test_what_does_not_work_is_said(tmp_path: Path, fails: str) -> None:
    ranks = FakeRanks(tmp_path)

    def open_run(_run_id: str, mode: str) -> FakeRun:
        if fails == "both" or fails == mode:
            raise ConnectionError("no route to api.wandb.ai\nand more")
        return FakeRun("slow" if fails == "never" else mode)

    tracking = Tracking(ranks.files, open_run, mode="online", since=0.0)
    if fails == "both":
        with pytest.raises(ConnectionError) as caught:
            tracking.send(EndsAfter())
        tracking.fail(caught.value)
    else:
        tracking.send(EndsAfter())
    state = read_tracker_state(ranks.files.wandb)
    assert state is not None
    words = {"never": "in time", "online": "cannot be reached (no route to api.wandb.ai)"}
    assert words.get(fails, "wandb failed (no route") in state.notices[0]
    assert len(state.notices) == 1
    assert state.state == ("done" if fails == "online" else "failed")


@pytest.mark.parametrize(
    ("told", "word"), [("finished\n", "finished"), ("stopped\n", "stopped"), ("", "failed")]
)
def test_a_launcher_that_is_gone_is_a_run_that_failed(
    monkeypatch: pytest.MonkeyPatch, told: str, word: str
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO(told))
    outcome = Outcome()
    assert outcome.wait()
    assert outcome.word == word
