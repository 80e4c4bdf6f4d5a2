"""One run at Weights & Biases; the only module that imports wandb.

It is imported in the tracker's process only (`fsdpq.launch.tracking.wandb_process`): wandb starts a
service, hooks the interpreter's exit and retries for minutes, none of which a rank should meet.
Settings: https://docs.wandb.ai/models/ref/python/experiments/settings (wandb 0.31).
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import wandb as _wandb

from fsdpq.recipe.root import Recipe
from fsdpq.recipe.sections.output import WandbOptions
from fsdpq.reports.run_record import Row, RunRecord
from fsdpq.run_files.paths import RunFiles
from fsdpq.run_files.scalars import scalars
from fsdpq.run_files.tracking import OUTCOME_CODES, first_line

wandb: Any = _wandb

PRIVATE = {
    "console": "off",
    "disable_code": True,
    "disable_git": True,
    "save_code": False,
    "x_disable_machine_info": True,
    "x_disable_meta": True,
    "x_disable_stats": True,
    "x_save_requirements": False,
}
"""What wandb would collect by itself and is not asked for: prints, code, git, host, packages."""

SUMMARY = (
    "steps", "train_s", "tokens", "trained_tokens", "eval_loss_before", "eval_loss_after",
)  # fmt: skip
"""Fields of `fsdpq.run_files.rows.RunSummary` that go into the summary as they are."""


class WandbRun:
    """A run that takes rows.

    Args:
        files: the run directory.
        recipe: resolved.
        run_id: by which a resumed run goes on where the first was.
        mode: ``online`` or ``offline``.

    Attributes:
        mode: as given.
        url: where it can be seen, empty offline.
        directory: wandb's files of it.
        step: no row of an earlier step is taken: the service has it, or would refuse it.
    """

    def __init__(self, files: RunFiles, recipe: Recipe, *, run_id: str, mode: str) -> None:
        options = recipe.metrics.wandb
        self._files, self._recipe = files, recipe
        self.mode, self._run_id = mode, run_id
        settings = {
            **PRIVATE,
            "quiet": True,  # else an `init` that fails takes ten seconds more (0.31)
            "finish_timeout": options.finish_timeout_s,
            "finish_timeout_raises": True,
        }
        try:
            self._run: Any = self._init(options, settings)
        except Exception:
            wandb.teardown()  # its service holds the id of a run that it could not open
            raise
        self.url = str(self._run.url or "") if mode == "online" else ""
        self.directory = Path(self._run.dir).parent
        self.step = int(self._run.step)
        self._remove_others()

    def _init(self, options: WandbOptions, settings: dict[str, Any]) -> Any:
        known: Any = wandb.Settings.model_fields  # older versions have fewer
        return wandb.init(
            project=options.project,
            entity=options.entity,
            group=options.group,
            job_type=options.job_type,
            name=options.name or self._files.root.name,
            tags=list(options.tags),
            notes=self._recipe.description or None,
            mode=self.mode,
            dir=str(self._files.root),
            config=self._recipe.model_dump(mode="json"),
            id=self._run_id,
            resume="allow" if self.mode == "online" else None,
            settings=wandb.Settings(**{key: settings[key] for key in settings if key in known}),
        )

    def log(self, row: Row) -> None:
        """Takes one row of ``metrics.jsonl``, of `step` or a later one."""
        if numbers := scalars(row):
            self.step = int(row.get("step", 0))
            self._run.log(numbers, step=self.step)

    def end(self, record: RunRecord, outcome: str) -> str:
        """Adds samples, a summary and what was exported, and sends what is left.

        Args:
            record: of the run directory.
            outcome: a key of `OUTCOME_CODES`.

        Returns:
            What could not be added, for the user; empty where all was.

        Raises:
            TimeoutError: not everything was sent in ``metrics.wandb.finish_timeout_s``.
        """
        problem = ""
        try:
            self._add_results(record, outcome)
        except Exception as error:  # the rest is to be sent all the same
            problem = f"wandb did not take the results ({first_line(error)})"
        if outcome == "stopped":
            self._run.mark_preempting()
        self._run.finish(exit_code=OUTCOME_CODES[outcome])
        return problem

    def discard(self) -> None:
        """Ends it and removes its files: another one is about to hold the rows."""
        self._run.finish(exit_code=0)
        shutil.rmtree(self.directory, ignore_errors=True)

    def _add_results(self, record: RunRecord, outcome: str) -> None:
        self._run.summary.update(summarize(record))
        if record.samples:
            names = ["prompt", "before", "after"]
            data = [[sample[name] or "" for name in names] for sample in record.samples]
            self._run.log({"samples": wandb.Table(columns=names, data=data)}, step=self.step)
        if self._recipe.metrics.wandb.log_adapter and outcome == "finished":
            self._log_exported(record)

    def _log_exported(self, record: RunRecord) -> None:
        """Uploads what was exported, from where it lies: no copy of it is made."""
        directory = self._files.exported(self._recipe.export.format)
        if not record.export or not directory.is_dir():
            return
        artifact = wandb.Artifact(
            name=f"run-{self._run_id}-{directory.name}",
            type="model",
            description=self._recipe.description or None,
            metadata=describe_export(record),
        )
        artifact.add_dir(str(directory), policy="immutable")
        self._run.log_artifact(artifact, aliases=["latest", f"step-{self.step}"])

    def _remove_others(self) -> None:
        """Removes the files of earlier starts: this run is given all rows that are not sent yet.

        ``wandb sync`` would replace the rows of one start by those of the next (wandb#3841).
        """
        for path in self.directory.parent.glob(f"*run-*-{self._run_id}"):
            if path != self.directory and not path.is_symlink():
                shutil.rmtree(path, ignore_errors=True)


def summarize(record: RunRecord) -> dict[str, float]:
    """Returns the final numbers of a run, what it has of them."""
    found = {key: record.summary[key] for key in SUMMARY if record.summary.get(key) is not None}
    for key in ("peak_memory_bytes", "peak_host_bytes"):
        if record.summary.get(key):
            found[key] = max(record.summary[key])
    losses = [row["loss"] for row in record.evals if row.get("loss") is not None]
    if losses:
        found |= {"best_eval_loss": min(losses), "eval_loss": losses[-1]}
    if record.setup.get("num_trainable") is not None:
        found["num_trainable"] = record.setup["num_trainable"]
    return found


def describe_export(record: RunRecord) -> dict[str, Any]:
    """Returns the metadata of what was exported: no path of this machine is in it."""
    model = record.environment.get("inputs", {}).get("model", {})
    keys = ("format", "num_bytes", "verified", "max_difference")
    name = str(record.settings["model"]["name_or_path"])
    return {
        "fsdpq": record.environment.get("fsdpq"),
        "base_model": name if model.get("revision") else Path(name).name,
        "base_revision": model.get("revision"),
        "base_sha256": model.get("sha256"),
        "quantization": record.settings["quantization"],
        "adapter": record.settings["adapter"],
        "export": {key: record.export.get(key) for key in keys},
        "results": summarize(record),
    }


def end_service() -> None:
    """Ends the process that wandb started."""
    wandb.teardown()
