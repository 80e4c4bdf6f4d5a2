"""A sweep as JUnit's XML, which CI servers show: a test case a trial, and one a check.

The elements are those that Jenkins, GitLab and GitHub's actions read
(https://github.com/testmoapp/junitxml). A trial that failed or did not end is a failure, one that
does not fit or was ended early is skipped.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from xml.etree import ElementTree

from fsdpq.run_files.sweep_paths import SweepFiles
from fsdpq.sweep.results.measures import format_measure
from fsdpq.sweep.results.results import Results, TrialResult
from fsdpq.sweep.results.verdict import Check, Verdict

_NOT_XML = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")

SKIPPED = ("skipped", "hopeless")


def render_junit(files: SweepFiles, results: Results, verdict: Verdict) -> bytes:
    """Returns the XML of a sweep.

    Args:
        files: the sweep directory, where logs lie.
        results: of the sweep.
        verdict: on what was asked of it.
    """
    root = ElementTree.Element("testsuites", name="fsdpq sweep")
    name = _text(results.name)
    suites = [_suite(root, name, [_trial_case(name, t, files) for t in results.trials])]
    if verdict.checks:
        cases = [_check_case(name, check) for check in verdict.checks]
        suites.append(_suite(root, f"{name}: checks", cases))
    for field in ("tests", "failures", "errors", "skipped"):
        root.set(field, str(sum(int(suite.get(field, "0")) for suite in suites)))
    ElementTree.indent(root)
    return ElementTree.tostring(root, encoding="utf-8", xml_declaration=True) + b"\n"


def _suite(
    root: ElementTree.Element, name: str, cases: Sequence[ElementTree.Element]
) -> ElementTree.Element:
    suite = ElementTree.SubElement(root, "testsuite", name=name, tests=str(len(cases)))
    for field, tag in (("failures", "failure"), ("errors", "error"), ("skipped", "skipped")):
        suite.set(field, str(sum(case.find(tag) is not None for case in cases)))
    suite.set("time", f"{sum(float(case.get('time', '0')) for case in cases):.3f}")
    suite.extend(cases)
    return suite


def _trial_case(sweep: str, trial: TrialResult, files: SweepFiles) -> ElementTree.Element:
    title = f"{trial.id} {trial.label}".strip()
    seconds = f"{trial.measures.get('wall_s', 0.0):.3f}"
    case = ElementTree.Element("testcase", classname=sweep, name=_text(title), time=seconds)
    reason = _text(trial.reason or trial.status)
    if trial.status in SKIPPED:
        ElementTree.SubElement(case, "skipped", message=reason)
    elif not trial.finished:
        failure = ElementTree.SubElement(case, "failure", message=reason, type=trial.status)
        failure.text = f"{reason}\nlog: {_text(str(files.log(trial.id)))}"
    numbers = [f"{name}: {format_measure(name, value)}" for name, value in trial.measures.items()]
    if numbers:
        ElementTree.SubElement(case, "system-out").text = "\n".join(numbers)
    return case


def _check_case(sweep: str, check: Check) -> ElementTree.Element:
    attributes = {"classname": f"{sweep}: checks", "name": _text(check.name), "time": "0"}
    case = ElementTree.Element("testcase", attributes)
    if not check.passed:
        message = check.broken[0] if len(check.broken) == 1 else f"{len(check.broken)} broken"
        failure = ElementTree.SubElement(case, "failure", message=_text(message), type="check")
        failure.text = _text("\n".join(check.broken))
    return case


def _text(text: str) -> str:
    """Returns ``text`` without the characters that XML does not have."""
    return _NOT_XML.sub("\N{REPLACEMENT CHARACTER}", text)
