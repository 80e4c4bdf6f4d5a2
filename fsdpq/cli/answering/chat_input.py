"""Reads the messages of a chat: lines of a terminal, with editing, or of a pipe."""

from __future__ import annotations

from contextlib import suppress
from typing import TextIO

import click

from fsdpq.cli.options import say
from fsdpq.cli.render import wants_color

GOES_ON = "... "
QUOTES = '"""'
_INVISIBLE = "\001{}\002"
"""What readline takes as of no width."""


class ChatInput:
    r"""Reads messages until the input ends; a line that ends in ``\`` goes on, ``\"\"\"`` quotes.

    Args:
        lines: where they come from.
        output: a prompt goes here where it is a terminal, and so is ``lines``.
        errors: a prompt goes here else.
    """

    def __init__(self, lines: TextIO, output: TextIO, errors: TextIO) -> None:
        self._lines, self._output, self._errors = lines, output, errors
        self.is_terminal = lines.isatty()
        self._edits = self.is_terminal and output.isatty()
        if self._edits:
            with suppress(ImportError):
                import readline  # gives `input` its line editing

                readline.set_auto_history(True)

    def read(self, prompt: str) -> str | None:
        """Returns the next message, None at the end.

        On a terminal Ctrl-C throws away what was typed, and a second one in a row is the end.
        """
        is_warned = False
        while True:
            try:
                return self._read_message(prompt)
            except EOFError:
                if self.is_terminal:
                    say("")
                return None
            except KeyboardInterrupt:
                if not self.is_terminal:
                    raise
                say("")
                if is_warned:
                    return None
                is_warned = True
                say("(Ctrl-C again, Ctrl-D or /exit ends the chat)")

    def _read_message(self, prompt: str) -> str:
        line = self._read_line(prompt)
        if line.strip().startswith(QUOTES):
            return self._read_quoted(line.strip().removeprefix(QUOTES))
        parts: list[str] = []
        while line.endswith("\\"):
            parts.append(line[:-1])
            try:
                line = self._read_line(GOES_ON)
            except EOFError:
                line = ""
        return "\n".join([*parts, line])

    def _read_quoted(self, first: str) -> str:
        parts: list[str] = []
        line = first
        while not line.rstrip().endswith(QUOTES):
            parts.append(line)
            line = self._read_line(GOES_ON)
        parts.append(line.rstrip().removesuffix(QUOTES))
        return "\n".join(parts).strip("\n")

    def _read_line(self, prompt: str) -> str:
        if self._edits:
            return input(self._styled(prompt))
        if self.is_terminal:
            self._errors.write(prompt)
            self._errors.flush()
        line = self._lines.readline()
        if not line:
            raise EOFError
        return line.removesuffix("\n")

    def _styled(self, prompt: str) -> str:
        if not wants_color(self._output):
            return prompt
        before, after = click.style("\0", fg="green", bold=True).split("\0")
        return _INVISIBLE.format(before) + prompt + _INVISIBLE.format(after)
