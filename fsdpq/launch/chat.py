"""The conversation of ``fsdpq chat``: what was said, and what of it the model still sees."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fsdpq.run_files.writing import append_json_line


@dataclass(frozen=True)
class Turn:
    """A question and its answer.

    Attributes:
        question: of the user.
        answer: of the model, as far as it came.
    """

    question: str
    answer: str


@dataclass
class Conversation:
    """Turns under a system prompt.

    Attributes:
        system: the system prompt, None without.
        turns: all of them, the oldest first.
        num_forgotten: so many of the first ones do not fit the model's context any more.
        single: every message is asked by itself: rows of the run had no turns.
    """

    system: str | None = None
    turns: list[Turn] = field(default_factory=list[Turn])
    num_forgotten: int = 0
    single: bool = False

    def messages(self, question: str) -> list[dict[str, Any]]:
        """Returns what to send to ask ``question`` now."""
        asked = [{"role": "user", "content": question}]
        if self.single:
            return asked
        first = [] if self.system is None else [{"role": "system", "content": self.system}]
        return [*first, *_messages(self.turns[self.num_forgotten :]), *asked]

    def add(self, turn: Turn, num_dropped: int) -> None:
        """Adds a turn; so many messages before it were left out of what was asked."""
        self.num_forgotten += num_dropped // 2
        self.turns.append(turn)

    def undo(self) -> Turn | None:
        """Takes the last turn back and returns it, None where there is none."""
        if not self.turns:
            return None
        last = self.turns.pop()
        self.num_forgotten = min(self.num_forgotten, len(self.turns))
        return last

    def reset(self) -> None:
        """Forgets all turns; the system prompt stays."""
        self.turns, self.num_forgotten = [], 0

    def as_row(self) -> dict[str, Any]:
        """Returns the conversation as a row of training data, forgotten turns too."""
        first = [] if self.system is None else [{"role": "system", "content": self.system}]
        return {"messages": [*first, *_messages(self.turns)]}


def _messages(turns: list[Turn]) -> list[dict[str, Any]]:
    return [
        {"role": role, "content": content}
        for turn in turns
        for role, content in (("user", turn.question), ("assistant", turn.answer))
    ]


def save_conversation(conversation: Conversation, path: Path) -> None:
    """Writes a conversation: as a training row at the end of a ``.jsonl``, else as text.

    Raises:
        ValueError: there is nothing to write, or another file would be lost.
        OSError: it cannot be written.
    """
    if not conversation.turns:
        raise ValueError("there is no turn to save")
    if path.suffix == ".jsonl":
        append_json_line(path, conversation.as_row())
        return
    if path.exists():
        raise ValueError(f"{path} is there already: name another file")
    marks = {"system": "System", "user": "User", "assistant": "Assistant"}
    messages = conversation.as_row()["messages"]
    text = "\n\n".join(f"{marks[m['role']]}: {m['content']}" for m in messages)
    path.write_text(text + "\n", encoding="utf-8")
