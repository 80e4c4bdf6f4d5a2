"""Where everything of one run lies."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

MERGE_RECEIPT = "merge.json"
"""What says, in the directory of a merged model, how like the trained one it is."""


@dataclass(frozen=True)
class RunFiles:
    """The paths inside one run directory; nothing is created by naming them."""

    root: Path

    @property
    def recipe(self) -> Path:
        """The recipe as the user gave it, byte for byte."""
        return self.root / "recipe.yaml"

    @property
    def resolved(self) -> Path:
        """The recipe after overrides, defaults and ``auto``: all that a worker reads."""
        return self.root / "recipe.resolved.yaml"

    @property
    def lock(self) -> Path:
        """Versions, hashes and hardware of this run."""
        return self.root / "run.lock.json"

    @property
    def plan(self) -> Path:
        """What was planned before the ranks started (`fsdpq.plan.result.Plan`), as JSON."""
        return self.root / "plan.json"

    @property
    def metrics(self) -> Path:
        """One JSON line per logged step and per evaluation."""
        return self.root / "metrics.jsonl"

    @property
    def events(self) -> Path:
        """One JSON line per phase, notice, sample, and the end."""
        return self.root / "events.jsonl"

    @property
    def logs(self) -> Path:
        """Folder of the per-rank logs and of torchrun's own output."""
        return self.root / "logs"

    @property
    def torchrun_log(self) -> Path:
        """What torchrun itself printed."""
        return self.logs / "torchrun.log"

    def node_torchrun_log(self, node: int) -> Path:
        """What torchrun printed on machine ``node`` of several, counted from 0."""
        return self.torchrun_log if node == 0 else self.logs / f"node-{node}.torchrun.log"

    def node_inputs(self, node: int) -> Path:
        """Where model, rows and base lie on machine ``node``, as ``inputs`` of the lock says it."""
        return self.logs / f"node-{node}.inputs.json"

    def meeting(self, token: str) -> Path:
        """Shows other machines that they see this directory: a file that has ``token`` in it."""
        return self.logs / f"meeting-{token}"

    @property
    def launcher(self) -> Path:
        """Process and machine of the launcher that has, or had, this run, as JSON."""
        return self.logs / "launcher.json"

    def attempt(self, number: int) -> Path:
        """What start ``number`` of the ranks, counted from 1, left in `logs` when it ended early.

        Its errors and torchrun's log; the ranks' own logs go on.
        """
        return self.logs / f"attempt-{number}"

    def rank_log(self, rank: int) -> Path:
        """Everything that rank ``rank`` printed."""
        return self.logs / f"rank-{rank}.log"

    def rank_error(self, rank: int) -> Path:
        """The error that ended rank ``rank``, as JSON: see `RankError`."""
        return self.logs / f"rank-{rank}.error.json"

    @property
    def adapter(self) -> Path:
        """The trained adapter in PEFT's format."""
        return self.root / "adapter"

    @property
    def model(self) -> Path:
        """The trained model in transformers' format, where no adapter was trained."""
        return self.root / "model"

    @property
    def delta(self) -> Path:
        """The trained weights alone of a model with new layers."""
        return self.root / "delta"

    @property
    def merged(self) -> Path:
        """The base with the trained change in its weights (``export.merge``)."""
        return self.root / "merged"

    def exported(self, export_format: str) -> Path:
        """What the run leaves behind, by ``export.format``."""
        names = {"peft": self.adapter, "transformers": self.model, "delta": self.delta}
        return names[export_format]

    @property
    def checkpoints(self) -> Path:
        """Folder of the checkpoints, ``step-00000100`` and so on (`tensor_files`)."""
        return self.root / "checkpoints"

    @property
    def stop_request(self) -> Path:
        """Exists while the launcher wants the ranks to save and end; holds the signal's name."""
        return self.root / "stop"

    def heartbeat(self, rank: int) -> Path:
        """When and where rank ``rank`` was last alive: see `fsdpq.run_files.beats`."""
        return self.logs / f"rank-{rank}.heartbeat"

    def rank_stack(self, rank: int) -> Path:
        """Where the Python code of rank ``rank`` was when the launcher asked it by SIGUSR2."""
        return self.logs / f"rank-{rank}.stack"

    @property
    def tensorboard(self) -> Path:
        """TensorBoard's event files (`metrics.sinks`)."""
        return self.root / "tensorboard"

    @property
    def wandb(self) -> Path:
        """What became of sending the run to Weights & Biases (`fsdpq.run_files.tracking`)."""
        return self.root / "wandb.json"

    @property
    def wandb_log(self) -> Path:
        """What wandb printed, and the process that uses it."""
        return self.logs / "wandb.log"

    def profile(self, rank: int) -> Path:
        """The profiler's trace of rank ``rank`` (`metrics.profile`)."""
        return self.root / "profile" / f"rank-{rank}.json"

    @property
    def evals(self) -> Path:
        """Folder of what was evaluated after training (`evaluation_job.Record`)."""
        return self.root / "evals"

    @property
    def report_html(self) -> Path:
        """The report for people."""
        return self.root / "report.html"

    @property
    def report_json(self) -> Path:
        """The report for scripts."""
        return self.root / "report.json"
