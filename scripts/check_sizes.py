"""Fails when a file of the package has over 400 lines or a function over 40 (60 for a step)."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

MAX_FILE_LINES = 400
MAX_FUNCTION_LINES = 40
LONGER_FUNCTIONS = {"train_step": 60, "run": 60, "train": 60}
"""The training step and the two loops around it may be longer."""


def function_sizes(tree: ast.Module) -> Iterator[tuple[str, int, int]]:
    """Yields name, first line and number of lines of every function, docstring left out."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            lines = (node.end_lineno or node.lineno) - node.lineno + 1
            if ast.get_docstring(node) is not None:
                docstring = node.body[0]
                lines -= (docstring.end_lineno or docstring.lineno) - docstring.lineno + 1
            yield node.name, node.lineno, lines


def main() -> int:
    """Prints every offence as ``path:line: text``; returns how many there are."""
    offences: list[str] = []
    for path in sorted(Path("fsdpq").rglob("*.py")):
        text = path.read_text(encoding="utf-8")
        num_lines = text.count("\n")
        if num_lines > MAX_FILE_LINES:
            offences.append(f"{path}:1: {num_lines} lines, at most {MAX_FILE_LINES}")
        for name, line, lines in function_sizes(ast.parse(text)):
            limit = LONGER_FUNCTIONS.get(name, MAX_FUNCTION_LINES)
            if lines > limit:
                offences.append(f"{path}:{line}: {name} has {lines} lines, at most {limit}")
    sys.stdout.write("".join(f"{offence}\n" for offence in offences))
    return min(len(offences), 1)


if __name__ == "__main__":
    sys.exit(main())
