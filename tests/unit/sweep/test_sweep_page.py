"""The page of a sweep shows every trial, draws what was measured, and runs nothing."""

from __future__ import annotations

import re

import pytest
from support.run_dirs import Tags
from support.sweeps import losses, make_results, make_trial, write_sweep

from fsdpq.sweep.results.curves import NUM_GRADES, draw_curves, grade_trials
from fsdpq.sweep.results.effects import Effect, list_effects
from fsdpq.sweep.results.page import render_page, write_page
from fsdpq.sweep.results.parallel import build_parallel

HOSTILE = "</style></div><script>alert('x')</script><img src=http://evil.example/x.png>"


class Page(Tags):
    """Finds tags by their class."""

    def with_class(self, name: str) -> list[dict[str, str | None]]:
        return [a for _, a in self.found if name in (a.get("class") or "").split()]


def settings(rank, lr, base="bnb"):
    return {"adapter.rank": rank, "optimizer.lr": lr, "quantization": base}


@pytest.fixture(scope="module")
def results():
    return make_results(
        make_trial(0, settings=settings(8, 1e-4), eval_loss=2.5, wall_s=30.0),
        make_trial(1, settings=settings(16, 1e-3, "hqq"), eval_loss=1.5, wall_s=30.0),
        make_trial(2, settings=settings(32, 3e-4), eval_loss=2.0, wall_s=60.0),
        make_trial(3, settings=settings(8, 3e-4), status="failed", reason="out of memory"),
        make_trial(4, settings=settings(16, 1e-4), status="skipped", reason="needs 26.1 GiB"),
        make_trial(5, settings=settings(32, 1e-4), status="hopeless", reason="3.9 after step 3",
                   eval_loss=3.9),
        name="ranks", environment={"fsdpq": "0.9", "packages": {"torch": "2.13.0"}},
    )  # fmt: skip


@pytest.fixture(scope="module")
def page(results, tmp_path_factory):
    files = write_sweep(tmp_path_factory.mktemp("sweep"), results)
    write_page(files, results)
    return Page(files.page.read_text())


def test_page_says_what_came_of_the_sweep(page):
    text = re.sub(r"\s", "", page.text)
    for expected in (
        "sweep of 6 trials: 3 finished, 1 hopeless, 1 failed, 1 skipped · goal: lower eval_loss",
        "best eval_loss1.5000", "median eval_loss2.0000", "time of all trials2 min 00 s",
        "adapter.rank=16, optimizer.lr=0.001, quantization=hqq",
        "fsdpq train recipe.yaml adapter.rank=16 optimizer.lr=0.001 quantization=hqq",
        "name: trial 00000001",  # best.yaml, ready to copy
        "1 00000001 16 0.001 hqq 1.5000", "failed: 00000003", "out of memory", "needs 26.1 GiB",
        "torch2.13.0",
    ):  # fmt: skip
        assert expected.replace(" ", "") in text, expected


def test_every_trial_has_a_row_and_links_to_its_report(page):
    rows = [
        attrs for tag, attrs in page.found if tag == "tr" and "t-" in (attrs.get("class") or "")
    ]
    assert [(row["class"] or "").split()[0] for row in rows] == [f"t-{i}" for i in range(6)]
    links = {attrs["href"] for tag, attrs in page.found if tag == "a"}
    assert links == {"results.csv", *(f"runs/{i:08x}/report.html" for i in range(3))}


def test_curves_are_of_every_trial_that_ran_and_the_best_stands_out(page):
    charts = [a["aria-label"] for t, a in page.found if t == "svg"]
    assert charts == [
        "Held-out loss by step", "Training loss by step",
        "Settings of each trial and its eval_loss",
    ]  # fmt: skip
    strong = page.with_class("strong")
    assert len(strong) == 3  # one in each chart
    assert all("t-0" in (attrs["class"] or "").split() for attrs in strong)
    # of the two that ran and have no rank, one in each of the charts of losses, and legends
    assert len([a for a in page.with_class("unranked") if "t-" in (a["class"] or "")]) == 4


def test_page_loads_and_runs_nothing(page):
    policy = next(a for _, a in page.found if a.get("http-equiv") == "Content-Security-Policy")
    assert policy["content"] == "default-src 'none'; style-src 'unsafe-inline'"
    assert not {"script", "img", "link", "iframe", "object"} & {tag for tag, _ in page.found}
    assert not [a for _, a in page.found for name in a if name.startswith("on")]


def test_what_recipes_and_errors_say_stays_text(tmp_path):
    trials = [
        make_trial(i, settings={HOSTILE: f"{HOSTILE}{i}"}, eval_loss=1.0 + i) for i in range(2)
    ]
    failed = make_trial(2, settings={HOSTILE: HOSTILE}, status="failed", reason=HOSTILE)
    results = make_results(*trials, failed, name=HOSTILE, environment={HOSTILE: HOSTILE})
    html = render_page(write_sweep(tmp_path, results), results)
    assert "<script" not in html
    assert "<img" not in html
    assert html.count("</style>") == 1


@pytest.mark.parametrize(
    "trials",
    [[], [make_trial(0, status="waiting")], [make_trial(0, status="failed")], losses(1.5)],
    ids=["none", "waiting", "failed", "one"],
)
def test_page_of_a_sweep_that_shows_little(tmp_path, trials):
    results = make_results(*trials)
    page = Page(render_page(write_sweep(tmp_path, results), results))
    if not any(trial.finished for trial in trials):
        assert "no trial has finished with eval_loss" in page.text
    assert not page.with_class("parallel")


def test_smoke_runs_are_called_so(tmp_path):
    results = make_results(*losses(1.0, 2.0), smoke=True)
    assert "Smoke runs" in render_page(write_sweep(tmp_path, results), results)


def test_loss_that_runs_away_does_not_flatten_the_others(tmp_path):
    results = make_results(*losses(2.0, 1e6))
    curves = draw_curves(write_sweep(tmp_path, results), results)
    assert curves.ceilings.keys() == {"Held-out loss", "Training loss"}
    assert curves.ceilings["Held-out loss"] == pytest.approx(4.4)  # 1.1 times where they started
    tops = [tick.label for tick in curves.charts[0].y_ticks]
    assert float(tops[-1]) <= 5


def test_more_trials_than_can_be_drawn(tmp_path, monkeypatch):
    monkeypatch.setattr("fsdpq.sweep.results.curves.MOST_CURVES", 20)
    trials = [make_trial(i, settings=settings(8, i), eval_loss=1.0 + i) for i in range(30)]
    results = make_results(*trials)
    files = write_sweep(tmp_path, results)
    curves = draw_curves(files, results)
    assert (curves.num_drawn, curves.num_left_out) == (20, 10)
    page = render_page(files, results)
    assert "The 20 best are drawn, 10 are not." in page
    assert "5 more</summary>" in page  # rows of the table that one has to ask for
    assert len(page.encode()) < 5000 * len(trials)


def test_colours_go_from_the_best_to_the_worst():
    grades = grade_trials(make_results(*losses(*range(1, 22)), make_trial(99, status="failed")))
    assert list(grades.values()) == sorted(grades.values())
    assert set(grades.values()) == set(range(NUM_GRADES))
    assert len(grades) == 21


def heights(parallel, axis):
    """Returns where the lines cross an axis, percent from the top, the best trial first."""
    return [float(line.path[1:].split("L")[axis].split()[1]) for line in parallel.lines]


def test_axes_are_what_varies_and_the_goal(results):
    parallel = build_parallel(results)
    assert [(axis.title, axis.position, axis.is_goal) for axis in parallel.axes] == [
        ("rank", 0, False), ("lr", pytest.approx(100 / 3), False),
        ("quantization", pytest.approx(200 / 3), False), ("eval_loss", 100, True),
    ]  # fmt: skip
    assert [line.trial.id[-1] for line in parallel.lines] == ["1", "2", "0"]
    assert [tick.label for tick in parallel.axes[0].ticks] == ["8", "16", "32"]
    assert heights(parallel, 0) == [50, 4, 96]  # 16, 32, 8: few numbers are spread evenly
    assert heights(parallel, 3) == [100, 50, 0]  # 1.5, 2.0, 2.5 on an axis from 1.5 to 2.5


def test_numbers_that_were_drawn_stand_where_they_are():
    rates = [10 ** (-5 + i / 4) for i in range(9)]  # 1e-5 to 1e-3
    trials = [
        make_trial(i, settings={"optimizer.lr": lr}, eval_loss=1.0 + i)
        for i, lr in enumerate(rates)
    ]
    parallel = build_parallel(make_results(*trials))
    axis = parallel.axes[0]
    assert axis.is_log
    assert {"1e-5", "1e-4", "0.001"} <= {tick.label for tick in axis.ticks}
    assert heights(parallel, 0) == pytest.approx([100 - 12.5 * i for i in range(9)], abs=0.01)


def test_settings_that_a_trial_lacks_are_a_value_of_their_own():
    trials = [
        make_trial(
            0, settings={"quantization": "bnb", "quantization.block_size": 64}, eval_loss=1.0
        ),
        make_trial(1, settings={"quantization": "none"}, eval_loss=2.0),
    ]
    labels = [
        [tick.label for tick in axis.ticks] for axis in build_parallel(make_results(*trials)).axes
    ]
    assert labels[:2] == [["bnb", "none"], ["64", "none"]]


def test_effects_of_values(results):
    effects = list_effects(results)
    assert effects["adapter.rank"] == [
        Effect("8", 1, 2.5, 2.5, False), Effect("16", 1, 1.5, 1.5, True),
        Effect("32", 1, 2.0, 2.0, False),
    ]  # fmt: skip
    assert effects["quantization"] == [
        Effect("hqq", 1, 1.5, 1.5, True), Effect("bnb", 2, 2.0, 2.25, False),
    ]  # fmt: skip


def test_many_numbers_are_told_in_ranges():
    trials = [
        make_trial(i, settings={"optimizer.lr": (i + 1) * 1e-5}, eval_loss=2.0 - i / 10)
        for i in range(9)
    ]
    found = list_effects(make_results(*trials))["optimizer.lr"]
    assert [(e.value, e.num_trials, e.is_best) for e in found] == [
        ("1e-5 to 3e-5", 3, False), ("4e-5 to 6e-5", 3, False), ("7e-5 to 9e-5", 3, True),
    ]  # fmt: skip
    assert found[2].best == pytest.approx(1.2)
    assert found[2].median == pytest.approx(1.3)


def test_more_is_better_in_effects_too():
    trials = [make_trial(i, tokens_per_s=10.0 * (i + 1)) for i in range(2)]
    found = list_effects(make_results(*trials, goal="tokens_per_s"))["adapter.rank"]
    assert [effect.is_best for effect in found] == [False, True]
