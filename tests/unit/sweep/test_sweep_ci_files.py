"""What CI servers read holds what was judged, whatever recipes and errors contain."""

from __future__ import annotations

from pathlib import Path
from xml.etree import ElementTree

import pytest
from support.sweeps import losses, make_results, make_trial

from fsdpq.run_files.sweep_paths import SweepFiles
from fsdpq.sweep.results.baseline import Tolerances
from fsdpq.sweep.results.conditions import parse_condition
from fsdpq.sweep.results.junit import render_junit
from fsdpq.sweep.results.summary import render_summary
from fsdpq.sweep.results.verdict import Verdict, Wanted, judge

HOSTILE = "<b>|`x`</b> \x00\x1b[31m & \ud800 | [a](http://x) ![i](y)\n# h"


@pytest.fixture
def results():
    return make_results(
        make_trial(0, eval_loss=2.0, wall_s=3.25), make_trial(1, eval_loss=2.5, wall_s=4.0),
        make_trial(2, status="failed", reason="rank 1: out of memory", wall_s=1.0),
        make_trial(3, status="skipped", reason="needs 26.1 GiB"),
        make_trial(4, status="hopeless", reason="3.9 after step 3"),
        make_trial(5, status="interrupted"),
    )  # fmt: skip


@pytest.fixture
def verdict(results):
    conditions = (parse_condition("eval_loss>2.1"), parse_condition("best.eval_loss>2.1"))
    then = make_results(*losses(1.5, 2.5), make_trial(9, eval_loss=1.0))
    return judge(results, Wanted(conditions, then, "old.json", Tolerances()))


def junit(results, verdict, root=Path("/sweep")):
    return ElementTree.fromstring(render_junit(SweepFiles(root), results, verdict))


def test_junit_has_a_case_a_trial_and_one_a_check(results, verdict, tmp_path):
    root = junit(results, verdict, tmp_path)
    assert root.tag == "testsuites"
    assert root.attrib == {
        "name": "fsdpq sweep", "tests": "9", "failures": "4", "errors": "0", "skipped": "2",
    }  # fmt: skip
    trials, checks = root
    assert (trials.get("name"), trials.get("tests"), trials.get("time")) == ("demo", "6", "8.250")
    found = {case.get("name", "")[:8]: case for case in trials}
    assert [child.tag for child in found["00000000"]] == ["system-out"]
    assert "eval_loss: 2.0000" in (found["00000000"].findtext("system-out") or "")
    failure = found["00000002"].find("failure")
    assert failure is not None
    assert failure.attrib == {"message": "rank 1: out of memory", "type": "failed"}
    assert str(tmp_path / "logs" / "00000002.log") in (failure.text or "")
    assert found["00000003"].find("skipped").attrib == {"message": "needs 26.1 GiB"}
    assert found["00000004"].find("skipped") is not None
    assert found["00000005"].find("failure").get("type") == "interrupted"
    assert [(case.get("name"), len(case)) for case in checks] == [
        ("eval_loss>2.1", 1), ("best.eval_loss>2.1", 0), ("baseline old.json", 1),
    ]  # fmt: skip
    assert "was 1.5000, is 2.0000" in (checks[2].findtext("failure") or "")


def test_junit_has_only_what_its_readers_know(results, verdict):
    """Elements and attributes of https://github.com/testmoapp/junitxml, and their order."""
    known = {
        "testsuites": ({"name", "tests", "failures", "errors", "skipped"}, {"testsuite"}),
        "testsuite": ({"name", "tests", "failures", "errors", "skipped", "time"}, {"testcase"}),
        "testcase": ({"classname", "name", "time"}, {"failure", "skipped", "system-out"}),
        "failure": ({"message", "type"}, set()),
        "skipped": ({"message"}, set()),
        "system-out": (set(), set()),
    }
    for element in junit(results, verdict).iter():
        attributes, children = known[element.tag]
        assert set(element.attrib) <= attributes
        assert {child.tag for child in element} <= children
        if element.tag == "testsuite":
            cases = list(element)
            assert element.get("tests") == str(len(cases))
            assert element.get("failures") == str(sum(c.find("failure") is not None for c in cases))


def test_junit_without_checks_has_one_suite(results):
    assert len(junit(results, Verdict())) == 1


def test_junit_of_anything_is_xml():
    trial = make_trial(0, status="failed", reason=HOSTILE, settings={HOSTILE: HOSTILE})
    results = make_results(trial, name=HOSTILE)
    root = junit(results, Verdict())
    message = root[0][0].find("failure").get("message") or ""
    assert "<b>|`x`</b>" in message
    assert "\x1b" not in message


def test_summary_tells_the_verdict_first(results, verdict):
    lines = render_summary(results, verdict).splitlines()
    assert lines[0] == "## Sweep demo: failed"
    text = "\n".join(lines)
    for expected in (
        "6 trials: 2 finished, 1 hopeless, 1 interrupted, 1 failed, 1 skipped",
        "- **failed** eval\\_loss\\>2.1",
        "  - 00000001 (adapter.rank=16) has eval\\_loss 2.5000",
        "- **passed** best.eval\\_loss\\>2.1",
        "| 00000000 (adapter.rank=8) | eval\\_loss | 1.5000 | 2.0000 | +33.33 % | **worse** |",
        "- not in this sweep: 00000009 (adapter.rank=80)",
        "| 1 | 00000000 | finished | 8 | 2.0000 |",
        "- **skipped** 00000003 (adapter.rank=32): needs 26.1 GiB",
    ):
        assert expected in text, expected
    assert render_summary(make_results(*losses(1.0)), Verdict()).startswith(
        "## Sweep demo: passed\n"
    )


def test_summary_of_anything_is_a_table():
    trials = [
        make_trial(i, eval_loss=float(i), settings={"data.path": f"{HOSTILE}{i}"}) for i in range(2)
    ]
    results = make_results(*trials, make_trial(2, status="failed", reason=HOSTILE), name=HOSTILE)
    text = render_summary(results, Verdict())
    rows = [line for line in text.splitlines() if line.startswith("|")]
    unescaped = [row.replace("\\|", "").count("|") for row in rows]
    assert len(set(unescaped)) == 1
    assert "<b>" not in text.replace("\\<b", "")
    assert "\x1b" not in text


def test_summary_is_small_enough_for_a_job_page():
    """GitHub takes 1 MiB."""
    trials = [
        make_trial(i, eval_loss=float(i + 1), settings={"data.path": f"{i}" * 50})
        for i in range(1000)
    ]
    then = make_results(*(make_trial(i, eval_loss=0.5) for i in range(1000)))
    results = make_results(*trials)
    wanted = Wanted((parse_condition("eval_loss>0"),), then, "old.json", Tolerances())
    assert len(render_summary(results, judge(results, wanted)).encode()) < 100_000
