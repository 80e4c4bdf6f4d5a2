"""A worker that answers through pipes: what comes out of it, and what is said when it is gone."""

from __future__ import annotations

import json
import os
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
from support.finished import FAKE_ANSWERER, finished_run

from fsdpq.errors import LaunchError, RecipeError, RunStoppedError, UsageError
from fsdpq.launch.answers import (
    AnswerSession,
    Choosing,
    Loading,
    stop_signals_raised,
)
from fsdpq.launch.chat import Conversation, Turn, save_conversation
from fsdpq.launch.generate import generate, make_question, read_questions
from fsdpq.launch.runs.trained_run import choose_device
from fsdpq.run_files.paths import RunFiles


@pytest.fixture
def files(tmp_path: Path) -> RunFiles:
    return finished_run(tmp_path)


def open_session(files: RunFiles, **options: Any) -> AnswerSession:
    return AnswerSession(
        files.root, Loading(**options), on_notice=lambda _notice: None, worker=FAKE_ANSWERER
    )


def events_of(session: AnswerSession) -> list[dict[str, Any]]:
    found = [session.next_event()]
    while found[-1]["event"] == "text":
        found.append(session.next_event())
    return found


def nothing(_done: int, _total: int) -> None:
    pass


def test_answers_come_in_pieces_and_the_worker_ends_with_the_session(files: RunFiles) -> None:
    loads: list[tuple[int, int]] = []
    with open_session(files, verb="chat", base=True, dequantize="never") as session:
        ready = session.wait_ready(lambda done, total: loads.append((done, total)))
        assert loads == [(0, 4), (4, 4)]
        assert (ready.asks, ready.context, ready.notices) == ("conversation", 64, ["know this"])
        session.ask([{"role": "user", "content": "caf\u00e9 \udcff"}], Choosing())
        *pieces, done = events_of(session)
        assert [piece["text"] for piece in pieces] == ["as ", "café ?"]
        assert done["answer"] == "as café ?"
        worker = psutil.Process(session._tree._process.pid)
    assert not worker.is_running()
    log = (files.logs / "chat.log").read_text()
    assert "--device=cpu --dequantize=never --base" in log
    assert not list(files.logs.glob("*.error.json"))


def test_an_answer_can_be_stopped(files: RunFiles) -> None:
    with open_session(files) as session:
        session.wait_ready(nothing)
        session.ask([{"role": "user", "content": "long"}], Choosing())
        assert session.next_event()["event"] == "text"
        session.stop()
        assert events_of(session)[-1]["stop"] == "stopped"


def test_events_of_an_answer_that_nobody_waits_for_are_passed_over(files: RunFiles) -> None:
    with open_session(files) as session:
        session.wait_ready(nothing)
        session.ask([{"role": "user", "content": "first"}], Choosing())
        session.ask([{"role": "user", "content": "second"}], Choosing())
        assert events_of(session)[-1]["answer"] == "as second"


def test_a_killed_worker_is_explained(files: RunFiles) -> None:
    with open_session(files) as session:
        session.wait_ready(nothing)
        session.ask([{"role": "user", "content": "die"}], Choosing())
        with pytest.raises(LaunchError, match=r"killed \(SIGKILL\)") as caught:
            session.next_event()
        assert "--dequantize never" in caught.value.hint
        # Asking a dead one says the same again, and does not raise a broken pipe.
        session.ask([{"role": "user", "content": "more"}], Choosing())
        with pytest.raises(LaunchError, match="SIGKILL"):
            session.next_event()


def test_a_worker_that_cannot_load_says_why(
    files: RunFiles, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAKE_MODE", "exit")
    with (
        open_session(files) as session,
        pytest.raises(LaunchError, match="ended with exit code 1") as caught,
    ):
        session.wait_ready(nothing)
    assert "no such model" in caught.value.details


def test_logs_go_elsewhere_where_the_run_is_read_only(
    files: RunFiles, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "access", lambda _path, _mode: False)
    with open_session(files) as session:
        session.wait_ready(nothing)
        log = session._files.log
    assert "noise" in log.read_text()
    assert not list(files.logs.glob("*.log"))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_ends_the_worker(
    files: RunFiles, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    monkeypatch.setenv("FAKE_MODE", "hang")
    session = open_session(files)
    worker = psutil.Process(session._tree._process.pid)
    threading.Timer(0.3, os.kill, (os.getpid(), number)).start()
    with (
        stop_signals_raised(),
        pytest.raises(RunStoppedError, match=signal.Signals(number).name),
        session,
    ):
        session.wait_ready(nothing)
    assert not worker.is_running()


@pytest.mark.parametrize(
    ("device", "trained_on", "gpus", "chosen"),
    [
        ("auto", "cuda", ["a"], "cuda"),
        ("auto", "cuda", [], "cpu"),
        ("auto", "cpu", ["a"], "cpu"),
        ("cuda", "cpu", ["a"], "cuda"),
        ("cpu", "cuda", ["a"], "cpu"),
    ],
)
def test_the_device_is_that_of_the_run_where_there_is_one(
    files: RunFiles,
    monkeypatch: pytest.MonkeyPatch,
    device: str,
    trained_on: str,
    gpus: list[str],
    chosen: str,
) -> None:
    monkeypatch.setattr("fsdpq.launch.runs.trained_run.list_gpus", lambda: gpus)
    text = files.resolved.read_text()
    files.resolved.write_text(text.replace("device: cpu", f"device: {trained_on}"))
    assert choose_device(files, device) == chosen


def test_a_gpu_that_is_not_there_is_no_device(
    files: RunFiles, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fsdpq.launch.runs.trained_run.list_gpus", list)
    with pytest.raises(UsageError, match="no GPU for `--device cuda`"):
        choose_device(files, "cuda")


def test_every_question_has_an_answer_from_one_load(files: RunFiles, tmp_path: Path) -> None:
    rows = tmp_path / "prompts.jsonl"
    rows.write_text(
        '{"prompt": "one", "id": 7}\n\n'
        '{"prompt": "refuse"}\n'
        '{"conversations": 1, "messages": [{"from": "human", "value": "two"},'
        ' {"from": "gpt", "value": "known"}]}\n'
        '{"prompt": "three", "system": "own"}\n'
    )
    questions = read_questions(rows, "brief")
    assert [message["content"] for message in questions[2].messages] == ["brief", "two"]
    assert [message["content"] for message in questions[3].messages] == ["own", "three"]
    notices: list[str] = []
    found = [
        (question.row.get("id"), event.get("answer") or event.get("message"))
        for question, event in generate(
            files.root,
            questions,
            Choosing(),
            Loading(),
            on_notice=notices.append,
            worker=FAKE_ANSWERER,
        )
        if event["event"] != "text"
    ]
    assert found == [(7, "as one"), (None, "no"), (None, "as two"), (None, "as three")]
    assert notices == ["know this"]


def test_rows_that_ask_nothing_are_listed_before_anything_is_loaded(tmp_path: Path) -> None:
    rows = tmp_path / "prompts.jsonl"
    rows.write_text('{"prompt": "good"}\n{"question": "x"}\n{"prompt": 3}\nnot json\n')
    with pytest.raises(RecipeError) as caught:
        read_questions(rows)
    assert [problem.location.line for problem in caught.value.problems if problem.location] == [
        2, 3, 4,
    ]  # fmt: skip
    with pytest.raises(RecipeError, match="problem"):
        read_questions(tmp_path / "missing.jsonl")


def test_the_seed_is_the_runs_where_none_is_given(
    files: RunFiles, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Choosing] = []
    ask: Callable[..., None] = AnswerSession.ask

    def note(self: AnswerSession, messages: Any, choosing: Choosing, **rest: Any) -> None:
        asked.append(choosing)
        ask(self, messages, choosing, **rest)

    monkeypatch.setattr(AnswerSession, "ask", note)
    for choosing in (Choosing(), Choosing(seed=9)):
        list(generate(files.root, [make_question("x")], choosing, Loading(), worker=FAKE_ANSWERER))
    assert [choosing.seed for choosing in asked] == [1, 9]


def test_an_unfinished_run_points_at_its_checkpoints(files: RunFiles) -> None:
    (files.adapter / "adapter_model.safetensors").unlink()
    files.adapter.rmdir()
    with pytest.raises(UsageError, match="did not finish") as caught:
        open_session(files)
    assert "fsdpq resume" in caught.value.hint
    (files.checkpoints / "step-00000004").mkdir(parents=True)
    with pytest.raises(UsageError) as caught:
        open_session(files)
    assert "--checkpoint newest" in caught.value.hint


def test_a_conversation_knows_what_the_model_still_sees(tmp_path: Path) -> None:
    talk = Conversation("brief")
    for number in range(3):
        talk.add(Turn(f"q{number}", f"a{number}"), num_dropped=0)
    asked = [message["content"] for message in talk.messages("new")]
    assert asked == ["brief", "q0", "a0", "q1", "a1", "q2", "a2", "new"]
    talk.add(Turn("new", "answer"), num_dropped=4)
    assert [m["content"] for m in talk.messages("x")] == ["brief", "q2", "a2", "new", "answer", "x"]
    path = tmp_path / "rows.jsonl"
    save_conversation(talk, path)
    save_conversation(talk, path)
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert rows[0] == rows[1]
    assert [m["content"] for m in rows[0]["messages"]][:3] == ["brief", "q0", "a0"]
    assert talk.undo() == Turn("new", "answer")
    talk.single = True
    assert talk.messages("x") == [{"role": "user", "content": "x"}]


def test_saving_overwrites_nothing(tmp_path: Path) -> None:
    path = tmp_path / "talk.txt"
    with pytest.raises(ValueError, match="no turn to save"):
        save_conversation(Conversation(), path)
    talk = Conversation("brief", [Turn("q", "a")])
    save_conversation(talk, path)
    assert path.read_text() == "System: brief\n\nUser: q\n\nAssistant: a\n"
    with pytest.raises(ValueError, match="is there already"):
        save_conversation(talk, path)
