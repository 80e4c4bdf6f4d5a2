"""Which modules a piece of code imports, in a process of its own; modules that are scripts."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).parents[2]


def imported_by(code: str, names: Sequence[str]) -> list[str]:
    """Returns those of ``names`` that are imported once ``code`` has run."""
    code += f"\nimport sys\nprint(*(name for name in {list(names)!r} if name in sys.modules))"
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    return done.stdout.split()


def load_script(name: str) -> ModuleType:
    """Returns ``scripts/NAME.py`` as a module."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "scripts" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module
