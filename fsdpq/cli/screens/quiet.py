"""A run that is not to be seen: errors are printed by the command line itself."""

from __future__ import annotations

from fsdpq.cli.screens.plain import PlainScreen


class QuietScreen(PlainScreen):
    """Shows nothing."""

    def _print(self, text: str) -> None:
        del text
