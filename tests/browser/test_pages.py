"""All pages in a real browser: quiet, alone, drawn, readable, in light and dark and on a phone.

Wanted: Chromium (`scripts/install_test_tools.sh`); without one these tests are skipped.
"""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from support.browser import Page, find_browser, open_browser
from support.run_dirs import HOSTILE, fail_run, write_full_run, write_run
from support.sweeps import make_results, make_trial, write_sweep

from fsdpq.launch.runs.compared import compare_environments, read_runs
from fsdpq.pages.inspection import render_inspection_page
from fsdpq.reports.comparison import comparison_content
from fsdpq.reports.comparison_page import render_comparison
from fsdpq.reports.report import write_report
from fsdpq.run_files.writing import append_json_line
from fsdpq.sweep.results.page import write_page
from fsdpq.sweep.results.results import TrialResult

BROWSER = find_browser()
pytestmark = pytest.mark.skipif(
    BROWSER is None, reason="needs Chromium: scripts/install_test_tools.sh installs it as root"
)

INSPECTION = Path(__file__).parents[1] / "cli" / "inspection" / "content.json"
PHONE = 390


def finished(root: Path) -> Path:
    return _report(write_full_run(root / "finished"))


def failed(root: Path) -> Path:
    files = write_run(root / "failed", num_steps=2, num_evals=1, done=False)
    fail_run(files)
    return _report(files)


def mixture(root: Path) -> Path:
    """2,000 steps of a mixture of experts under fp16, one of them with a gradient that explodes."""
    files = write_run(root / "mixture", num_evals=0)
    for step in range(5, 2000):
        row: dict[str, Any] = {"event": "step", "step": step, "total_steps": 2000, "lr": 1e-5}
        row |= {"loss": 2 + 1 / step, "aux_loss": 1.5, "loss_scale": 65536.0, "time": 1.0}
        row |= {"grad_norm": 1e4 if step == 900 else 1.0, "tokens_per_s": 300.0}
        append_json_line(files.metrics, row)
    return _report(files)


def hostile(root: Path) -> Path:
    return _report(write_full_run(root / "hostile", text=HOSTILE + "word" * 100))


def empty(root: Path) -> Path:
    return _report(write_run(root / "empty", num_steps=0, num_evals=0, done=False))


def comparison(root: Path) -> Path:
    """More runs than there are colours, one of them failed."""
    paths = [root / "compared" / f"run-with-a-long-name-{index}" for index in range(10)]
    for index, path in enumerate(paths):
        settings = {"adapter": {"kind": "lora", "rank": 2**index}, "training": {"seed": index}}
        done = index != 3
        files = write_full_run(path, settings=settings, loss=3.0 + index, done=done)
        if not done:
            fail_run(files)
    runs = read_runs(paths)
    content = comparison_content(runs, compare_environments(runs))
    page = root / "comparison.html"
    page.write_text(render_comparison(content, runs, links=["x/report.html"] * len(runs)))
    return page


def inspection(root: Path) -> Path:
    page = root / "inspection.html"
    page.write_text(render_inspection_page(json.loads(INSPECTION.read_text())))
    return page


def sweep(root: Path) -> Path:
    """More trials than have dots, some without a rank, a loss that ran away, long values."""
    states = {3: "failed", 5: "skipped", 7: "hopeless", 9: "interrupted", 11: "waiting"}
    trials: list[TrialResult] = []
    for index in range(30):
        settings = {"adapter.rank": 8 * (1 + index % 4), "optimizer.lr": 1e-5 * 1.2**index}
        settings |= {"data.path": f"rows/{HOSTILE}{index % 3}", "quantization": "bnb"}
        loss = 1e4 if index == 20 else 1.5 + index / 50
        measures = {"eval_loss": loss, "peak_memory_bytes": 2.0**30 * (1 + index), "wall_s": 9.0}
        status = states.get(index, "finished")
        trials.append(
            make_trial(index, status=status, reason=HOSTILE, settings=settings, **measures)
        )
    results = make_results(*trials, smoke=True, environment={"packages": {"torch": "2.13.0"}})
    files = write_sweep(root / "sweep", results)
    write_page(files, results)
    return files.page


def _report(files: Any) -> Path:
    write_report(files)
    return files.report_html


PAGES: dict[str, Callable[[Path], Path]] = {
    made.__name__: made
    for made in (finished, failed, mixture, hostile, empty, comparison, sweep, inspection)
}

HERE = Path(__file__).parent
CURVES = (HERE / "curves.js").read_text()
TEXTS = (HERE / "texts.js").read_text()
PALETTE = """[...Array(8).keys()].map(
  i => getComputedStyle(document.documentElement).getPropertyValue('--c' + i))"""
STROKES = "[...document.querySelectorAll('.line')].map(line => getComputedStyle(line).stroke)"


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("pages")
    return {name: make(root) for name, make in PAGES.items()}


@pytest.fixture(scope="module")
def page() -> Iterator[Page]:
    assert BROWSER is not None
    with open_browser(BROWSER) as browser:
        yield browser.open_page()


@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("name", PAGES)
def test_page_is_quiet_and_alone_and_its_text_can_be_read(
    name: str, theme: str, page: Page, paths: dict[str, Path]
) -> None:
    page.emulate(theme=theme)
    page.show(paths[name])
    assert page.messages == []
    assert page.requests == []
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    texts = page.evaluate(TEXTS)
    assert len(texts) > 20
    assert [text for text in texts if text["contrast"] < 4.5] == [], "WCAG 2.2, 1.4.3, AA"
    ground = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (sum(map(int, ground[4:-1].split(", "))) < 200) == (theme == "dark")


@pytest.mark.parametrize("name", PAGES)
def test_page_fits_a_phone(name: str, page: Page, paths: dict[str, Path]) -> None:
    page.emulate(theme="light", width=PHONE, height=844)
    page.show(paths[name])
    assert page.evaluate("document.querySelectorAll('details').forEach(d => d.open = true)") is None
    # A phone zooms out where anything is too wide: its own width becomes larger then.
    assert page.evaluate("[innerWidth, document.documentElement.scrollWidth]") == [PHONE, PHONE]
    assert min(text["size"] for text in page.evaluate(TEXTS)) >= 11.5


@pytest.mark.parametrize(
    ("name", "least"), [("finished", 5), ("mixture", 6), ("comparison", 40), ("sweep", 70)]
)
def test_every_curve_is_drawn_where_it_belongs(
    name: str, least: int, page: Page, paths: dict[str, Path]
) -> None:
    page.emulate(theme="dark")
    page.show(paths[name])
    curves = page.evaluate(CURVES)
    assert len(curves) >= least
    assert [c for c in curves if c["length"] < 50 or c["seen"] < 0.4 or c["colour"] == "none"] == []


def test_curves_have_their_colours_on_the_screen(page: Page, paths: dict[str, Path]) -> None:
    page.emulate(theme="dark")
    page.show(paths["comparison"])
    picture = Image.open(io.BytesIO(page.screenshot())).convert("RGB")
    counts = {colour: count for count, colour in picture.getcolors(1 << 24) or ()}
    wanted = {tuple(map(int, line[4:-1].split(", "))) for line in page.evaluate(STROKES)}
    names = {"#" + bytes(colour).hex() for colour in wanted}
    assert names == set(page.evaluate(PALETTE))
    assert all(counts.get(colour, 0) > 50 for colour in wanted), "legends alone have 56 a chart"


def test_pointing_at_a_trial_lights_up_its_lines(page: Page, paths: dict[str, Path]) -> None:
    widths = (
        "[...document.querySelectorAll('.line')].map(line => "
        "[line.closest('g').classList.contains('t-4'), getComputedStyle(line).strokeWidth])"
    )
    row = "document.querySelector('tr.t-4 a')"
    page.emulate(theme="light")
    page.show(paths["sweep"])
    assert {width for own, width in page.evaluate(widths) if own} == {"1.1px"}
    page.evaluate(f"{row}.scrollIntoView({{behavior: 'instant'}})")
    x, y = page.evaluate(f"(b => [b.x + 5, b.y + 5])({row}.getBoundingClientRect())")
    page.call("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)
    found = page.evaluate(widths)
    assert [width for own, width in found if own] == ["3.6px"] * 3, "both losses and the settings"
    assert {width for own, width in found if not own} == {"1.1px", "3.2px"}


def test_hostile_text_stays_text(page: Page, paths: dict[str, Path]) -> None:
    page.emulate(theme="light")
    page.show(paths["hostile"])
    assert page.evaluate("document.scripts.length + document.images.length") == 0
    assert page.evaluate("document.body.innerText.includes(\"<script>alert('x')</script>\")")


def test_the_browser_would_notice(page: Page, tmp_path: Path) -> None:
    policy = "<meta http-equiv='Content-Security-Policy' content=\"default-src 'none'\">"
    body = "<img src='http://evil.example/x.png'><script>console.log('ran')</script>"
    wide = "<meta name=viewport content='width=device-width'><p style='width: 800px'>wide"
    (tmp_path / "free.html").write_text(f"<!DOCTYPE html>{body}{wide}")
    (tmp_path / "bound.html").write_text(f"<!DOCTYPE html>{policy}{body}")
    page.emulate(theme="light", width=PHONE)
    page.show(tmp_path / "free.html")
    assert page.requests == ["http://evil.example/x.png"]
    assert any("ran" in message for message in page.messages)
    assert page.evaluate("innerWidth") >= 800, "zoomed out"
    page.show(tmp_path / "bound.html")
    assert len(page.messages) == 2, page.messages
    assert all("Content Security Policy" in message for message in page.messages)
