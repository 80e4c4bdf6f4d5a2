"""What ``generate`` and ``chat`` share: options, the line while a model loads, shown text."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TextIO, TypeVar

import click

from fsdpq.cli.visible import encodable, visible

Function = TypeVar("Function", bound=Callable[..., Any])

TAB = "    "

_LOADING = (
    click.option("--base", is_flag=True, help="Answer as the model did before training."),
    click.option(
        "--checkpoint", metavar="STEP|newest|best",
        help="Answer with a checkpoint of the run, finished or not, instead of what it exported.",
    ),
    click.option(
        "--device", type=click.Choice(["auto", "cpu", "cuda"]), default="auto", show_default=True,
        help="auto is the GPU where the run had one and there still is one.",
    ),
    click.option(
        "--dequantize", type=click.Choice(["auto", "always", "never"]), default="auto",
        show_default=True,
        help="Unpack the 4-bit weights once instead of for every token: the same answers, sooner, "
        "in more memory; auto takes half of what is free.",
    ),
)  # fmt: skip

_CHOOSING = (
    click.option(
        "--top-p", type=click.FloatRange(min=0, max=1, min_open=True), default=1.0,
        show_default=True, help="Sample among the likeliest tokens of so much probability.",
    ),
    click.option(
        "--top-k", type=click.IntRange(min=0), default=0, show_default=True,
        help="Sample among so many of the likeliest tokens; 0 is all.",
    ),
    click.option(
        "--repetition-penalty", type=click.FloatRange(min=0, min_open=True), default=1.0,
        show_default=True, help="Above 1, tokens that were there already become less likely.",
    ),
    click.option("--seed", type=click.IntRange(min=0), help="Default: the run's."),
)  # fmt: skip


def answering_options(function: Function) -> Function:
    """Adds what loads a model, and what chooses tokens, to a verb."""
    for option in reversed((*_CHOOSING, *_LOADING)):
        function = option(function)
    return function


def shown(text: str, stream: TextIO) -> str:
    """Returns a model's text for a terminal: its line ends stay, and nothing moves the cursor."""
    lines = (TAB.join(visible(part) for part in line.split("\t")) for line in text.split("\n"))
    return encodable("\n".join(lines), stream)


class LoadLine:
    """A line on a terminal that says how far loading is; silent elsewhere.

    Args:
        stream: standard error.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._is_terminal = stream.isatty()
        self._text = ""

    def start(self) -> None:
        """Says that something happens, before anything is known."""
        self._write("loading")

    def take(self, done: int, total: int) -> None:
        """Shows how much is loaded."""
        self._write(f"loading {100 * done // max(1, total)} %")

    def clear(self) -> None:
        """Takes the line away."""
        self._write("")

    def _write(self, text: str) -> None:
        if self._is_terminal and text != self._text:
            self._stream.write("\r" + text.ljust(len(self._text)) + ("" if text else "\r"))
            self._stream.flush()
            self._text = text
