"""The flow of ``fsdpq reproduce``: what changed since a run, the run again, its losses compared.

The inputs are fetched at the revisions of the lock and hashed before anything else happens; rows
that were prepared anew, and a base that was quantized anew, are compared once they are there, and
before any rank starts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from fsdpq.errors import FsdpqError, RecipeError, UsageError
from fsdpq.launch.inputs.fetched import fetch_base_model
from fsdpq.launch.machine.devices import list_gpus
from fsdpq.launch.machine.resolve import resolve_launch
from fsdpq.launch.ranks.torchrun import WORKER, Row
from fsdpq.launch.runs.drift import Drift, DriftReport, compare_inputs, compare_locks
from fsdpq.launch.runs.lock_file import as_list, as_mapping, describe_run
from fsdpq.launch.runs.recorded import RecordedRun, open_recorded
from fsdpq.launch.runs.run_dir import check_run_dir
from fsdpq.launch.screen import Screen
from fsdpq.launch.train import train_loaded
from fsdpq.recipe.load import LoadedRecipe
from fsdpq.run_files.paths import RunFiles
from fsdpq.run_files.writing import read_json_lines


@dataclass(frozen=True)
class LossComparison:
    """How the losses of two runs compare, those of steps and of evaluations.

    Attributes:
        num_compared: losses that both runs logged.
        num_missing: losses that one of them logged and the other did not.
        largest: the largest absolute difference, 0.0 for losses that are bit for bit the same.
        step: where that is.
        then: the recorded loss there.
        now: the new one.
    """

    num_compared: int
    num_missing: int = 0
    largest: float = 0.0
    step: int = 0
    then: float = 0.0
    now: float = 0.0

    @property
    def identical(self) -> bool:
        """Whether every loss is bit for bit the same."""
        return self.largest == 0.0 and self.num_missing == 0


@dataclass(frozen=True)
class Reproduction:
    """What came of doing a run again.

    Attributes:
        drift: what had changed.
        files: the new run directory, None where only the drift was wanted.
        losses: None where there is nothing to compare with.
    """

    drift: DriftReport
    files: RunFiles | None = None
    losses: LossComparison | None = None

    def as_json(self) -> dict[str, Any]:
        """Returns it as plain data."""
        return {
            "drift": [asdict(row) for row in self.drift.rows],
            "num_same": self.drift.num_same,
            "num_unknown": self.drift.num_unknown,
            "matters": self.drift.matters,
            "run_dir": None if self.files is None else str(self.files.root),
            "losses": None
            if self.losses is None
            else asdict(self.losses) | {"identical": self.losses.identical},
        }


@dataclass(frozen=True)
class ReproduceOptions:
    """What the command line says.

    Attributes:
        check: report what changed, and do nothing.
        force: run with other data or another base too.
        run_dir: where the run goes; None is a new directory in ``runs/``.
        base_dir: what relative paths start from; None is what they started from.
        trust_remote_code: let the ranks run Python code that the model brings.
    """

    check: bool = False
    force: bool = False
    run_dir: Path | None = None
    base_dir: Path | None = None
    trust_remote_code: bool = False


def reproduce(
    target: Path,
    options: ReproduceOptions,
    *,
    screen: Screen,
    on_drift: Callable[[DriftReport], None],
    worker: Sequence[str] = WORKER,
) -> Reproduction:
    """Does the run of a lock again, and compares.

    Args:
        target: the lock, or the run directory that it is in.
        options: of the command line.
        screen: shows what happens.
        on_drift: is told what changed before anything runs.
        worker: arguments of torchrun that name the worker.

    Raises:
        UsageError: there is no such lock; or the data or the base is another one, without
            ``force``.
        FsdpqError: one message for whatever went wrong in the run, with its exit code.
    """
    trust = options.trust_remote_code
    recorded = open_recorded(target, base_dir=options.base_dir, trust_remote_code=trust)
    if options.run_dir is not None and not options.check:
        check_run_dir(options.run_dir)
    quiet = _Once(screen)
    loaded = _load_for(recorded, num_gpus=len(list_gpus()))
    drift, errors = find_drift(recorded, loaded, screen=quiet, trust_remote_code=trust)
    on_drift(drift)
    if options.check:
        return Reproduction(drift)
    _refuse(drift.at("inputs"), options)
    if errors:
        raise errors[0]

    def check_inputs(inputs: dict[str, Any]) -> None:
        rows = compare_inputs(recorded.inputs, inputs)
        new = [row for row in rows if row not in drift.rows]
        if new:
            on_drift(DriftReport(tuple(new), 0))
        _refuse(new, options)

    files = train_loaded(
        loaded,
        run_dir=options.run_dir,
        screen=quiet,
        trust_remote_code=trust,
        worker=worker,
        check_inputs=check_inputs,
    )
    return Reproduction(drift, files, compare_losses(recorded.beside, files))


def find_drift(
    recorded: RecordedRun, loaded: LoadedRecipe, *, screen: Screen, trust_remote_code: bool = False
) -> tuple[DriftReport, list[FsdpqError]]:
    """Returns what changed since a run, and why inputs cannot be had, if any cannot.

    Args:
        recorded: the run.
        loaded: its recipe, as it would run here.
        screen: told what is fetched.
        trust_remote_code: the model's code is part of it.
    """
    gpus = list_gpus()
    inputs: dict[str, Any] = {}
    missing: list[Drift] = []
    errors: list[FsdpqError] = []
    fetchers: dict[str, Callable[[], dict[str, Any]]] = {
        "data": lambda: _fetch_data(loaded, screen),
        "model": lambda: fetch_base_model(
            loaded, screen=screen, trust_remote_code=trust_remote_code
        ),
    }
    for name, fetch in fetchers.items():
        try:
            inputs[name] = fetch()
        except FsdpqError as error:
            missing.append(Drift(name, _described(recorded, name), _words(error), "inputs"))
            errors.append(error)
    now = describe_run(
        loaded,
        resolve_launch(loaded.recipe, num_gpus=len(gpus)),
        gpus=gpus,
        inputs=inputs,
        trust_remote_code=trust_remote_code,
    )
    # Prepared rows and a quantized base follow from these, and are made only for a run.
    fetched = {name: recorded.inputs.get(name) for name in fetchers}
    return compare_locks({**recorded.lock, "inputs": fetched}, now).with_rows(missing), errors


def compare_losses(original: RunFiles, again: RunFiles) -> LossComparison | None:
    """Returns how the losses of two runs compare, None where one of them logged none.

    Of a step that was logged twice, because a run was resumed before it, the last row counts.
    """
    then, now = _losses(original), _losses(again)
    both = [key for key in then if key in now]
    if not both:
        return None
    missing = len(then) + len(now) - 2 * len(both)
    key = max(both, key=lambda key: abs(then[key] - now[key]))
    largest = abs(then[key] - now[key])
    return LossComparison(len(both), missing, largest, key[1], then[key], now[key])


def _losses(files: RunFiles) -> dict[tuple[str, int], float]:
    rows = (row for row in read_json_lines(files.metrics) if row.get("event") in ("step", "eval"))
    return {(row["event"], row["step"]): row["loss"] for row in rows}


def _load_for(recorded: RecordedRun, *, num_gpus: int) -> LoadedRecipe:
    """Returns the recipe for as many of its ranks as there are GPUs for; the batch stays."""
    loaded = recorded.load()
    launch = loaded.recipe.launch
    ranks = launch.nproc_per_node
    if launch.device != "cuda" or not isinstance(ranks, int) or not 0 < num_gpus < ranks:
        return loaded
    for fewer in range(num_gpus, 1, -1):
        try:
            return recorded.load([f"launch.nproc_per_node={fewer}"])
        except RecipeError:
            continue  # the batch does not divide by so many
    return recorded.load(["launch.nproc_per_node=1"])


def _fetch_data(loaded: LoadedRecipe, screen: Screen) -> dict[str, Any]:
    from fsdpq.fetch.data import fetch_data

    found = fetch_data(
        loaded.recipe.data,
        base_dir=loaded.base_dir,
        report=screen.report,
        marks=loaded.marks,
        check_rows=False,  # the run checks them; here only their hashes are wanted
    )
    return found.as_json()


def _described(recorded: RecordedRun, name: str) -> str:
    """Returns in words what a run had as its data or its model."""
    found = as_mapping(recorded.inputs.get(name))
    if name == "model":
        return str(found.get("source"))
    return ", ".join(str(as_mapping(source).get("name")) for source in as_list(found.get("train")))


def _words(error: FsdpqError) -> str:
    if isinstance(error, RecipeError):
        return "; ".join(problem.message for problem in error.problems[:3])
    return error.message


def _refuse(rows: Sequence[Drift], options: ReproduceOptions) -> None:
    if rows and not options.force:
        names = ", ".join(f"`{row.what}`" for row in rows[:3])
        message = f"the run had other inputs: {names}"
        hint = (
            "bring them back as they were (`--base-dir` says where relative paths start), or run "
        )
        raise UsageError(message, hint=f"{hint}with what is there: `--force`")


class _Once:
    """A screen that says the same line once: inputs are fetched to be compared, and to be used."""

    def __init__(self, screen: Screen) -> None:
        self._screen = screen
        self._told: set[str] = set()

    def report(self, message: str) -> None:
        """Shows a line that was not shown yet."""
        if message not in self._told:
            self._told.add(message)
            self._screen.report(message)

    def open_run(self, files: RunFiles) -> None:
        """See `Screen`."""
        self._screen.open_run(files)

    def show_row(self, row: Row) -> None:
        """See `Screen`."""
        self._screen.show_row(row)

    def close(self) -> None:
        """See `Screen`."""
        self._screen.close()
