"""Launchers of several machines meet, here over the loopback: who may take part, what is said."""

from __future__ import annotations

import dataclasses
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from support.screens import Lines
from support.tiny import tiny_recipe

from fsdpq.errors import FsdpqError, LaunchError, RunSavedError, UsageError
from fsdpq.launch.nodes import first as first_module
from fsdpq.launch.nodes import line as line_module
from fsdpq.launch.nodes import member as member_module
from fsdpq.launch.nodes.address import Endpoint, find_endpoint, free_port, network_environment
from fsdpq.launch.nodes.facts import NodeFacts, facts_of, why_not
from fsdpq.launch.nodes.first import First, RanksEndedElsewhereError
from fsdpq.launch.nodes.join import joined
from fsdpq.launch.nodes.line import Line
from fsdpq.launch.nodes.member import FirstLostError, Part, take_part
from fsdpq.launch.ranks.failure import EndedRank, RanksEnd, explain_end
from fsdpq.launch.ranks.keeper import RunKeeper
from fsdpq.launch.ranks.processes import StopSignals
from fsdpq.launch.ranks.stacks import Frame, RankStack
from fsdpq.launch.ranks.watch import Hang, HangWatch
from fsdpq.launch.ready import Settled
from fsdpq.run_files.beats import Beat
from fsdpq.run_files.paths import RunFiles
from fsdpq.run_files.rows import RankError

INPUTS = {"model": {"sha256": "aa"}, "prepared": {"digest": "rows"}}


def settled(endpoint: str, **sections: dict[str, Any]) -> Settled:
    """Returns a recipe of two machines that is ready to run."""
    launch = {"nnodes": 2, "rdzv_endpoint": endpoint, "join_timeout_s": 20.0, "node_timeout_s": 5.0}
    launch |= sections.pop("launch", {})
    recipe = tiny_recipe(launch=launch, **sections)
    loaded = SimpleNamespace(recipe=recipe, overrides=())
    return Settled(cast("Any", loaded), recipe, [])


def poll_until(first: First, condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        first.poll()
        time.sleep(0.01)


@dataclasses.dataclass
class Meeting:
    """A first machine, and what its user sees."""

    first: First
    screen: Lines
    endpoint: Endpoint
    files: RunFiles
    ready: Settled
    lines: list[Line] = dataclasses.field(default_factory=list)

    def join(self, **changes: Any) -> Line:
        """Connects another machine that says the same of itself, but for ``changes``."""
        line = self.connect()
        facts = facts_of(self.ready, address="10.0.0.2", process=1, node_rank=None)
        facts = dataclasses.replace(facts, host="other", **changes)
        line.send({"say": "hello", "facts": facts.as_json()})
        return line

    def connect(self, silence_s: float = 5.0) -> Line:
        """Connects, and says nothing."""
        connection = socket.create_connection(self.endpoint.address)
        self.lines.append(Line(connection, silence_s=silence_s))
        return self.lines[-1]

    def next_of(self, line: Line) -> dict[str, Any]:
        """Returns what the first machine says next to another one."""
        deadline = time.monotonic() + 20
        while (message := line.receive()) is None:
            assert time.monotonic() < deadline, line.lost
            self.first.poll()
            time.sleep(0.01)
        return message

    def close(self) -> None:
        """Ends it, the other machines first."""
        for line in self.lines:
            line.close()
        self.first.close(None)

    def make_ready(self, **changes: Any) -> Line:
        """Brings another machine so far that its ranks can start."""
        line = self.join(**changes)
        assert self.next_of(line)["say"] == "prepare"
        line.send({"say": "prepared", "inputs": {"the model": "aa", "the rows": "rows"}})
        self.first.take_inputs(INPUTS)
        self.first.share(self.files)
        assert (said := self.next_of(line))["say"] == "run"
        assert (self.files.logs / f"meeting-{said['token']}").is_file()
        line.send({"say": "sees"})
        return line


def next_of(line: Line) -> dict[str, Any]:
    message = line.receive(20)
    assert message is not None, line.lost
    return message


def meet(tmp_path: Path, **sections: dict[str, Any]) -> Meeting:
    listener = socket.create_server(("127.0.0.1", 0))
    text = f"127.0.0.1:{listener.getsockname()[1]}"
    endpoint, ready, screen = find_endpoint(text), settled(text, **sections), Lines()
    facts = dataclasses.replace(
        facts_of(ready, address="10.0.0.1", process=0, node_rank=0), host="one"
    )
    files = RunFiles(tmp_path / "run")
    files.logs.mkdir(parents=True)
    first = First(listener, endpoint, facts, ready.recipe.launch, screen)
    return Meeting(first, screen, endpoint, files, ready)


@pytest.fixture
def meeting(tmp_path: Path) -> Iterator[Meeting]:
    made = meet(tmp_path)
    yield made
    made.close()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"ranks": 3}, "`launch.nproc_per_node` is 3 on other (10.0.0.2) and 2 on one (10.0.0.1)"),
        ({"device": "cuda"}, "`launch.device` is cuda on other"),
        ({"versions": {"torch": "2.0"}}, "torch is 2.0 on other (10.0.0.2) and "),
        ({"protocol": 99}, "fsdpq is "),
        ({"node_rank": 2}, "`--node-rank 2` is none of the machines, which are 0 to 1"),
        ({"node_rank": 0}, "`--node-rank 0` is one (10.0.0.1)"),
    ],
)
def test_another_machine_that_differs_is_turned_away(
    meeting: Meeting, changes: dict[str, Any], words: str
) -> None:
    line = meeting.join(**changes)
    poll_until(meeting.first, lambda: any(words in text for text in meeting.screen.lines))
    said = next_of(line)
    assert said["say"] == "turned away"
    assert words in said["message"]
    assert not meeting.first._nodes_here()


def start_to_take_part(part: Part) -> tuple[threading.Thread, list[Any]]:
    """Lets another machine take part; the list gets what it returns, or the error that ends it."""
    result: list[Any] = []

    def run() -> None:
        try:
            result.append(take_part(part))
        except FsdpqError as error:
            result.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    return thread, result


def test_another_recipe_is_refused_with_both_values(meeting: Meeting) -> None:
    other = settled(meeting.endpoint.text, training={"seed": 8}, model={"dtype": "bf16"})
    part = Part(other, meeting.endpoint, 1, None, (), Lines())
    thread, caught = start_to_take_part(part)
    poll_until(meeting.first, lambda: bool(caught))
    thread.join()
    assert isinstance(caught[0], UsageError)
    assert "`training.seed` is 8 on " in caught[0].message
    assert "and 7 on one (10.0.0.1)" in caught[0].message
    assert "`model.dtype` is bf16" in caught[0].message


def test_a_dtype_that_each_machine_chose_is_that_of_the_first(meeting: Meeting) -> None:
    facts = meeting.first.facts
    other = meeting.ready.recipe.model_dump(mode="json")
    other["model"]["dtype"] = "bf16"
    chosen = dataclasses.replace(facts, recipe=other, free_dtype=True)
    assert "`model.dtype` is bf16" in why_not(facts, chosen)
    assert why_not(dataclasses.replace(facts, free_dtype=True), chosen) == ""


def test_other_rows_are_refused_with_both_hashes(meeting: Meeting) -> None:
    line = meeting.join()
    meeting.first.take_inputs(INPUTS)
    assert meeting.next_of(line)["say"] == "prepare"
    line.send({"say": "prepared", "inputs": {"the model": "aa", "the rows": "others"}})
    poll_until(meeting.first, lambda: not meeting.first._nodes_here())
    said = next_of(line)
    assert said["message"] == (
        "the rows on other (10.0.0.2) (others) is another than on one (10.0.0.1) (rows)"
    )


def test_a_machine_that_never_comes_is_said_after_the_time(tmp_path: Path) -> None:
    made = meet(tmp_path, launch={"join_timeout_s": 1.0})
    line = made.join(ranks=5)
    with pytest.raises(LaunchError) as caught:
        made.first.gather()
    made.first.close(caught.value)
    assert caught.value.message == "1 of 2 machines came within 1 s: one (10.0.0.1)"
    assert "`launch.nproc_per_node` is 5 on other" in caught.value.details
    assert made.endpoint.text in caught.value.hint
    line.close()


def test_a_range_starts_with_the_least_after_the_last_call(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(first_module, "LAST_CALL_S", 0.3)
    made = meet(tmp_path, launch={"nnodes": "1:3"})
    made.first.gather()
    assert made.screen.lines == [
        f"waiting for the other machines, 1 to 3 in all, at {made.endpoint.text}",
        "1 machine: one (10.0.0.1)",
    ]
    made.first.take_inputs(INPUTS)
    made.first.share(made.files)
    place = made.first.start(resumes=False)
    assert (place.node, place.num_nodes) == (0, 1)
    assert made.screen.lines[-1] == "starting on 1 machine of 3"
    made.close()
    assert not list(made.files.logs.glob("meeting-*"))


def test_machines_get_the_places_that_they_were_told(tmp_path: Path) -> None:
    made = meet(tmp_path, launch={"nnodes": 3})
    lines = {2: made.make_ready(node_rank=2)}
    taken = made.join(node_rank=2)
    poll_until(made.first, lambda: "is other (10.0.0.2) already" in made.screen.lines[-1])
    assert next_of(taken)["say"] == "turned away"
    lines[1] = made.make_ready()
    place = made.first.start(resumes=True)
    assert place.arguments()[:2] == ["--nnodes=3", "--node-rank=0"]
    for number, line in lines.items():
        start = next_of(line)
        assert start["say"] == "start"
        assert (start["node"], start["num_nodes"], start["resumes"]) == (number, 3, True)
        assert start["port"] == place.port
        line.close()
    made.close()


def start_two(meeting: Meeting) -> tuple[Line, RunKeeper, HangWatch]:
    """Starts the ranks of two machines; returns the other one, and what keeps the first's."""
    line = meeting.make_ready()
    meeting.first.start(resumes=False)
    assert next_of(line)["say"] == "start"
    watch = HangWatch(meeting.files, 2, None)
    keeper = RunKeeper(meeting.files, watch, meeting.screen.report, others=meeting.first)
    return line, keeper, watch


def check_until_raised(keeper: RunKeeper) -> None:
    for _ in range(2000):
        keeper.check()
        time.sleep(0.01)


def test_a_launcher_that_ends_is_named(meeting: Meeting) -> None:
    line, keeper, _ = start_two(meeting)
    keeper.check()
    line.close()
    with pytest.raises(LaunchError) as caught:
        check_until_raised(keeper)
    assert caught.value.message == (
        "other (10.0.0.2), machine 1 beside the first, is lost: its launcher ended"
    )
    assert meeting.first.finish(at_once=True) == []


def test_a_rank_that_was_killed_elsewhere_is_named_with_its_host(
    meeting: Meeting, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(first_module, "END_S", 0.2)
    line, keeper, _ = start_two(meeting)
    end = RanksEnd(1, (lost_peer(3, 10.0),), (EndedRank(2, -9, 9.0, False),), oom_kills=1)
    line.send({"say": "ended", "end": dataclasses.asdict(end)})
    with pytest.raises(RanksEndedElsewhereError):
        check_until_raised(keeper)
    ends = meeting.first.finish(at_once=False)
    # What another machine's ranks wrote into the shared folder is not taken for this one's.
    found = RanksEnd(None, (lost_peer(0, 11.0), lost_peer(2, 1.0)))
    own = meeting.first.own_end(found)
    assert [record.rank for record in own.records] == [0]
    error = explain_end(meeting.files, [own, *ends])
    assert error.message.startswith("rank 2 on other (10.0.0.2) was killed (SIGKILL): memory ran")
    raised = dataclasses.replace(ends[0], killed=(), records=(boom(3),))
    error = explain_end(meeting.files, [own, raised])
    assert error.message == "rank 3 on other (10.0.0.2) failed: ValueError: boom"


def lost_peer(rank: int, at: float) -> RankError:
    return RankError(rank, "RuntimeError", "Connection closed by peer", "", "Traceback", 1, at)


def boom(rank: int) -> RankError:
    return RankError(rank, "ValueError", "boom", "", "Traceback", 1, 99.0)


def test_the_rank_that_hangs_is_found_on_the_other_machine(meeting: Meeting) -> None:
    line, keeper, watch = start_two(meeting)
    frame = Frame("/x/site-packages/torch/distributed/c10d.py", 7, "all_reduce")
    waits, stuck = RankStack("", (frame,)), RankStack("", (Frame("/x/fsdpq/data.py", 1, "read"),))
    watch.describe = lambda: Hang({0: Beat(1, 9, 4, "train", "forward")}, {0: waits}, 60.0)
    beats = {"2": dataclasses.asdict(Beat(1, 8, 4, "train", "data"))}
    hang = {"beats": beats, "stacks": {"2": dataclasses.asdict(stuck)}, "idle_s": 61.0}
    line.send({"say": "hang", "hang": hang})
    with pytest.raises(LaunchError) as caught:
        check_until_raised(keeper)
    assert "rank 2 on other (10.0.0.2) is stuck waiting for rows of step 4" in caught.value.message
    assert "rank 0 on one (10.0.0.1): in the forward pass of step 4, waits" in caught.value.details


def test_a_signal_elsewhere_asks_the_ranks_to_save(meeting: Meeting) -> None:
    line, keeper, _ = start_two(meeting)
    stop = StopSignals()
    assert keeper.asked(stop) == ("", False)
    line.send({"say": "signal", "name": "SIGTERM", "insists": False})
    poll_until(meeting.first, lambda: bool(meeting.first.wish))
    assert keeper.asked(stop) == ("SIGTERM", False)
    # The same wish reaches every machine of a job, at moments that differ.
    stop.note(15)
    line.send({"say": "signal", "name": "SIGTERM", "insists": False})
    meeting.first.poll()
    assert keeper.asked(stop) == ("SIGTERM", False)
    line.send({"say": "signal", "name": "SIGTERM", "insists": True})
    poll_until(meeting.first, lambda: meeting.first.insists)
    assert keeper.asked(stop) == ("SIGTERM", True)


def test_what_says_nothing_that_a_launcher_says_is_dropped(meeting: Meeting) -> None:
    strangers = [socket.create_connection(meeting.endpoint.address) for _ in range(3)]
    strangers[0].sendall(b"GET / HTTP/1.1\r\n\r\n")
    strangers[1].sendall(b"[1, 2]\n")
    strangers[2].sendall(b'{"say": "hello", "facts": {"host": "x"}}\n')
    poll_until(meeting.first, lambda: len(meeting.screen.lines) > 0)
    poll_until(meeting.first, lambda: len(meeting.first._nodes) <= 1)
    assert "an unknown machine does not take part" in meeting.screen.lines[0]
    for stranger in strangers:
        stranger.close()
    assert not meeting.make_ready().lost


def test_silence_is_a_loss_and_signs_of_life_are_none(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        ends = (socket.create_connection(server.getsockname()), server.accept()[0])
    monkeypatch.setattr(line_module, "BEAT_S", 0.2)
    line, other = (Line(end, silence_s=0.8) for end in ends)
    time.sleep(1.2)
    assert not line.lost
    assert line.receive() is None
    other.send({"say": "last"})
    monkeypatch.setattr(other, "_send", lambda _content: None)  # packets vanish
    assert next_of(line) == {"say": "last"}
    assert line.receive(5.0) is None
    assert line.lost.startswith("it was not heard from for 0.8 s")
    line.close()
    other.close()


@pytest.mark.parametrize(
    ("end", "expected"),
    [
        ({"code": 75, "message": "stopped by SIGTERM", "hint": ""}, RunSavedError),
        ({"code": 1, "message": "rank 0 failed", "hint": "look"}, LaunchError),
        ({"code": 0, "message": "", "hint": ""}, None),
    ],
)
def test_other_machines_end_as_the_first_one_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, end: dict[str, Any], expected: type | None
) -> None:
    inputs = {**INPUTS, "data": None}
    monkeypatch.setattr(member_module, "gather_inputs", lambda _settled, **_named: inputs)
    made = meet(tmp_path)
    part = Part(made.ready, made.endpoint, None, None, (), Lines())
    thread, result = start_to_take_part(part)
    made.first.gather()
    made.first.take_inputs(INPUTS)
    made.first.share(made.files)
    poll_until(made.first, lambda: all(node.sees for node in made.first._nodes))
    for node in made.first._nodes:
        node.line.send({"say": "end", **end})
    thread.join(20)
    made.close()
    if expected is None:
        assert result[0].root == made.files.root.absolute()
    else:
        assert isinstance(result[0], expected)
        assert int(result[0].exit_code) == end["code"]
        assert result[0].message == end["message"]


def test_a_run_directory_that_is_not_shared_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs = {**INPUTS, "data": None}
    monkeypatch.setattr(member_module, "gather_inputs", lambda _settled, **_named: inputs)
    monkeypatch.setattr(member_module, "SEE_S", 0.3)
    made = meet(tmp_path)
    part = Part(made.ready, made.endpoint, None, tmp_path / "mine", (), Lines())
    thread, caught = start_to_take_part(part)
    made.first.gather()
    made.first.take_inputs(INPUTS)
    made.first.share(made.files)
    poll_until(made.first, lambda: bool(caught))
    thread.join()
    poll_until(made.first, lambda: "does not take part" in made.screen.lines[-1])
    assert "mine` of the first machine is not on this one" in caught[0].message
    assert "storage that all machines share" in caught[0].hint
    made.close()


def test_a_first_machine_that_is_lost_is_waited_for_as_often_as_there_are_restarts(
    tmp_path: Path,
) -> None:
    made = meet(tmp_path)
    more = settled(made.endpoint.text, launch={"max_restarts": 1, "join_timeout_s": 1.0})
    screen = Lines()
    part = Part(more, made.endpoint, None, None, (), screen)
    thread, caught = start_to_take_part(part)
    line = made.first._arrived.get(timeout=20)
    made.close()
    line.close()
    thread.join(30)
    assert any(line.endswith("waiting for it to come back") for line in screen.lines)
    assert isinstance(caught[0], LaunchError)
    assert not isinstance(caught[0], FirstLostError)
    assert "no first machine listens at 127.0.0.1:" in caught[0].message


def test_the_place_must_be_one_that_this_machine_can_have(tmp_path: Path) -> None:
    def enter(ready: Settled, node_rank: int | None) -> Any:
        with joined(ready, node_rank=node_rank, run_dir=None, screen=Lines(), worker=()) as part:
            return part

    alone = settled("127.0.0.1:1", launch={"nnodes": 1})
    assert enter(alone, None) is None
    with pytest.raises(UsageError, match=r"has no effect with `launch\.nnodes: 1`"):
        enter(alone, 0)
    elsewhere = settled("192.0.2.7:29500")  # an address for documentation: nobody has it
    with pytest.raises(UsageError, match="this machine has no address"):
        enter(elsewhere, 0)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        here = settled(f"127.0.0.1:{taken.getsockname()[1]}")
        assert isinstance(enter(here, None), Part), "the first one is another process here"
        assert isinstance(enter(here, 1), Part)
        with pytest.raises(FsdpqError, match="cannot be used"):
            enter(here, 0)


def test_ranks_keep_to_the_interface_of_the_endpoint(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("GLOO_SOCKET_IFNAME", raising=False)
    monkeypatch.setenv("NCCL_SOCKET_IFNAME", "mine")
    assert network_environment("127.0.0.1") == {"GLOO_SOCKET_IFNAME": "lo"}
    assert network_environment("192.0.2.7") == {}
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        before = Endpoint("x", socket.AF_INET, ("127.0.0.1", port - 1))
        assert free_port(before) > port


def test_a_name_that_leads_to_the_machine_itself_is_listened_to_everywhere() -> None:
    debian = Endpoint("host-a:29500", socket.AF_INET, ("127.0.1.1", 29500))
    assert debian.own_host == ""
    assert dataclasses.replace(debian, address=("10.0.0.1", 29500)).own_host == "10.0.0.1"


def test_facts_of_a_newer_version_are_read() -> None:
    ready = settled("127.0.0.1:1")
    facts = facts_of(ready, address="a", process=1, node_rank=None)
    assert NodeFacts.from_json(facts.as_json() | {"new": 1}) == facts
