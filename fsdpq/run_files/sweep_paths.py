"""Where everything of one sweep lies."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from fsdpq.run_files.paths import RunFiles


@dataclass(frozen=True)
class SweepFiles:
    """The paths inside one sweep directory; nothing is created by naming them."""

    root: Path

    @property
    def spec(self) -> Path:
        """The sweep, complete: ``fsdpq sweep`` runs it again from this file."""
        return self.root / "sweep.yaml"

    @property
    def trials(self) -> Path:
        """The trials in order, as JSON (`fsdpq.sweep.frozen`); only ever grows."""
        return self.root / "trials.json"

    def recipe(self, trial_id: str) -> Path:
        """The frozen recipe of a trial, every default spelled out."""
        return self.root / "recipes" / f"{trial_id}.yaml"

    def run(self, trial_id: str) -> RunFiles:
        """The run directory of a trial."""
        return RunFiles(self.root / "runs" / trial_id)

    def outcome(self, trial_id: str) -> Path:
        """What became of a trial, as JSON (`fsdpq.sweep.outcome`)."""
        return self.root / "outcomes" / f"{trial_id}.json"

    def log(self, trial_id: str) -> Path:
        """What the trial's own ``fsdpq train`` printed."""
        return self.root / "logs" / f"{trial_id}.log"

    @property
    def results_csv(self) -> Path:
        """One row a trial, for spreadsheets."""
        return self.root / "results.csv"

    @property
    def results_json(self) -> Path:
        """The same for scripts, and what a later sweep is compared with (``--baseline``)."""
        return self.root / "results.json"

    @property
    def page(self) -> Path:
        """The report for people."""
        return self.root / "report.html"

    @property
    def best_recipe(self) -> Path:
        """The recipe of the best trial, ready to copy."""
        return self.root / "best.yaml"

    @property
    def junit(self) -> Path:
        """Trials and checks for CI servers, as JUnit's XML (``--ci``)."""
        return self.root / "junit.xml"

    @property
    def summary(self) -> Path:
        """The results as Markdown, for people who read CI (``--ci``)."""
        return self.root / "summary.md"
