"""Another machine, as the launcher of the first one knows it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from fsdpq.launch.nodes.ends import end_from_json
from fsdpq.launch.nodes.facts import NodeFacts, other_inputs, why_not
from fsdpq.launch.nodes.line import Line
from fsdpq.launch.ranks.failure import RanksEnd
from fsdpq.launch.ranks.watch import Hang


@dataclass(eq=False)
class Node:
    """One of the other machines.

    Attributes:
        line: to its launcher.
        facts: what it says of itself, None until it has.
        inputs: `fsdpq.launch.nodes.facts.describe_inputs` of it, None until they are there.
        compared: whether they were.
        told_run: whether it knows the run directory.
        sees: it sees it, so its ranks can start.
        turned_away: it takes no part.
        number: of the machine in the start that goes on; 0 where it has no ranks.
        end: how its ranks ended, None while they work.
        hang: where they are, where they hang or it was asked.
    """

    line: Line
    facts: NodeFacts | None = None
    inputs: dict[str, Any] | None = None
    compared: bool = False
    told_run: bool = False
    sees: bool = False
    turned_away: bool = False
    number: int = 0
    end: RanksEnd | None = None
    hang: Hang | None = None

    @property
    def name(self) -> str:
        """What messages call it."""
        return "an unknown machine" if self.facts is None else self.facts.name

    @property
    def told_rank(self) -> int | None:
        """The place that its user gave it."""
        return None if self.facts is None else self.facts.node_rank

    @property
    def is_here(self) -> bool:
        """Whether it takes part, or will."""
        return self.facts is not None and not self.turned_away and not self.line.lost

    @property
    def failed(self) -> bool:
        """Whether its ranks ended, and not because they were done."""
        return self.end is not None and self.end.exit_code != 0

    def begin(self, number: int) -> None:
        """Notes that its ranks start.

        Args:
            number: its place.
        """
        self.number, self.end, self.hang = number, None, None

    def why_not(self, first: NodeFacts, others: Sequence[Node], *, most: int) -> str:
        """Returns why it cannot take part, empty where it can.

        Args:
            first: the first machine.
            others: the other ones that are here.
            most: of all machines.
        """
        if self.facts is None:
            return "it does not say what it is"
        if differences := why_not(first, self.facts):
            return differences
        rank = self.told_rank
        if rank is not None and not 0 < rank < most:
            if rank == 0:
                return f"`--node-rank 0` is {first.name}, which has the address of the endpoint"
            return f"`--node-rank {rank}` is none of the machines, which are 0 to {most - 1}"
        same = next(
            (other for other in others if rank is not None and other.told_rank == rank), None
        )
        return "" if same is None else f"`--node-rank {rank}` is {same.name} already"

    def other_inputs(self, first: NodeFacts, inputs: dict[str, Any]) -> str:
        """Returns how its inputs differ from those of the first machine, empty where they do not.

        Args:
            first: the first machine.
            inputs: `fsdpq.launch.nodes.facts.describe_inputs` of it.
        """
        if self.facts is None or self.inputs is None:
            return "it does not say what it reads"
        return other_inputs(first, inputs, self.facts, self.inputs)


def read_message(node: Node, message: dict[str, Any]) -> str:
    """Notes what a machine said about itself; returns what sort of message it is."""
    said = str(message.get("say"))
    if said == "hello":
        try:
            node.facts = NodeFacts.from_json(message["facts"])
        except (KeyError, TypeError):
            node.facts = None
    elif said == "prepared":
        node.inputs = dict(message["inputs"])
    elif said == "sees":
        node.sees = True
    elif said == "ended":
        node.end = end_from_json(message["end"])
    return said
