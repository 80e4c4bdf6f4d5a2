"""A run on a terminal: a line for loading and for training that moves."""

from __future__ import annotations

from typing import TextIO

from fsdpq.cli.run_texts import step_parts
from fsdpq.cli.screens.bar import BottomLine, Part, bar_text
from fsdpq.cli.screens.plain import PlainScreen
from fsdpq.launch.ranks.torchrun import Row


class LiveScreen(PlainScreen):
    """Shows a run with a moving bar for loading and for training."""

    def __init__(self, stream: TextIO) -> None:
        super().__init__(stream)
        self._line: BottomLine | None = None
        self._line_name = ""
        self._saved = ""

    def close(self) -> None:
        """Leaves the moving line where it is."""
        if self._line is not None:
            self._line.end()
            self._line = None

    def _print(self, text: str) -> None:
        if self._line is None:
            super()._print(text)
            return
        self._line.clear()
        super()._print(text)
        self._line.redraw()

    def _show_phase(self, row: Row) -> None:
        if row["name"] not in ("load", "train"):
            self.close()
        super()._show_phase(row)

    def _show_load(self, row: Row) -> None:
        self._load_clock.take(row)
        done, total = row["done_bytes"], row["total_bytes"]
        texts = self._load_clock.parts()  # how much, how fast, how long still
        amounts = [Part(text, need) for text, need in zip(texts, (1, 3, 2), strict=False)]
        bar = Part(bar_text(done, total, self._stream), 4, True)
        self._move("load", [Part("load", 0), bar, *amounts], is_last=done >= total)

    def _show_setup(self, row: Row) -> None:
        self.close()  # the base is loaded
        super()._show_setup(row)

    def _show_step(self, row: Row) -> None:
        self._clock.take(row)
        done, total = row["step"], row["total_steps"]
        loss, rate, speed, memory = step_parts(row)
        parts = [
            Part(f"step {done}/{total}", 0),
            Part(bar_text(done, total, self._stream), 4, True),
            Part(loss, 1),
            Part(rate, 6),
            Part(speed, 3),
            Part(memory, 7),
            Part(f"eta {self._clock.eta(row)}", 2),
            *([Part(self._saved, 5)] if self._saved else []),
        ]
        self._move("step", parts, is_last=done == total)

    def _show_checkpoint(self, row: Row) -> None:
        """The newest one stands beside the step: a line for each would scroll all else away."""
        self._saved = f"saved {row['step']}"

    def _show_resume(self, row: Row) -> None:
        self.close()
        self._saved = f"saved {row['step']}"
        super()._show_resume(row)

    def _move(self, name: str, parts: list[Part], *, is_last: bool) -> None:
        if self._line is None or self._line_name != name:
            self.close()
            self._line = BottomLine(self._stream)
            self._line_name = name
        self._line.draw(parts, is_last=is_last)
