"""Which screen a run gets.

| where | what |
| --- | --- |
| a terminal | a line that moves (`fsdpq.cli.screens.live`) |
| a pipe, a file, CI, ``TERM=dumb`` | plain lines, a step every few seconds (`screens.plain`) |
| ``--quiet`` | nothing (`screens.quiet`) |
"""

from __future__ import annotations

import os
from typing import TextIO

from fsdpq.cli.screens.live import LiveScreen
from fsdpq.cli.screens.plain import PlainScreen
from fsdpq.cli.screens.quiet import QuietScreen


def open_screen(stream: TextIO, *, quiet: bool = False) -> PlainScreen:
    """Returns the screen for ``stream``.

    Args:
        stream: where it draws.
        quiet: draw nothing.
    """
    if quiet:
        return QuietScreen(stream)
    if stream.isatty() and os.environ.get("TERM") not in ("dumb", "unknown"):
        return PlainScreen(stream) if os.environ.get("CI") else LiveScreen(stream)
    return PlainScreen(stream)
