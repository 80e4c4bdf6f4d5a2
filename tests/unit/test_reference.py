"""The generated reference pages say what the program says, and the docs' links lead somewhere."""

import importlib.util
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "scripts" / "make_reference.py"
DOCS = sorted((ROOT / "docs").rglob("*.md"))
HEAVY = ("torch", "transformers", "peft", "bitsandbytes", "datasets", "accelerate")


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("make_reference", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


PAGES = ["recipe.md", "rules.md", "command-line.md", "importing.md", "sweep.md"]


@pytest.mark.parametrize("name", PAGES)
def test_committed_page_is_fresh(script: ModuleType, name: str) -> None:
    [path] = [path for path in script.pages() if path.name == name]
    committed = path.read_text(encoding="utf-8")
    assert committed == script.pages()[path], "run `python scripts/make_reference.py`"
    assert "generated" in committed


def test_script_never_imports_torch() -> None:
    code = (
        f"import runpy, sys; runpy.run_path({str(SCRIPT)!r})['pages']()\n"
        f"print(sorted(set({HEAVY!r}) & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert (done.stdout, done.returncode) == ("[]\n", 0), done.stderr


@pytest.mark.parametrize("page", DOCS, ids=[str(page.relative_to(ROOT)) for page in DOCS])
def test_relative_links_lead_to_files(page: Path) -> None:
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    targets = [target.partition("#")[0] for target in re.findall(r"\]\(([^)\s]+)\)", text)]
    local = [target for target in targets if target and "://" not in target]
    assert [target for target in local if not (page.parent / target).exists()] == []
