"""The flow of ``fsdpq quantize``, and the ranks that write a quantized base.

The ranks get a run directory of their own, which is thrown away when they are done and kept where
they fail: the message names the logs in it.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fsdpq.errors import EnvironmentProblemError, LaunchError, RunStoppedError, UsageError
from fsdpq.fetch.drafts import draft_of, remove_drafts
from fsdpq.fetch.local import copy_model_files
from fsdpq.launch.inputs.fetched import fetch_base_model
from fsdpq.launch.machine.devices import check_bf16, list_gpus
from fsdpq.launch.machine.resolve import resolve_launch
from fsdpq.launch.ranks.failure import count_oom_kills, explain_failure
from fsdpq.launch.ranks.processes import TRUST_FLAG
from fsdpq.launch.ranks.torchrun import check_endpoint, run_torchrun
from fsdpq.launch.runs.lock_file import describe_run
from fsdpq.launch.runs.run_dir import create_run_dir
from fsdpq.launch.screen import Screen
from fsdpq.recipe.checks.facts import told_dtype
from fsdpq.recipe.load import LoadedRecipe, load_recipe
from fsdpq.recipe.root import Recipe
from fsdpq.recipe.stored_quantization import read_stored_quantization
from fsdpq.registry import check_packages
from fsdpq.run_files.writing import sync
from fsdpq.tensor_files.base_manifest import (
    Key,
    base_key,
    is_base,
    key_differences,
    read_manifest,
)

QUANTIZER = ("-m", "fsdpq.worker", "quantize")

FORMATS = ("fsdpq", "bnb")
"""What can be written: fsdpq's own base, or a 4-bit model of bitsandbytes for transformers."""


@dataclass(frozen=True)
class QuantizeJob:
    """What the ranks quantize.

    Attributes:
        loaded: the recipe as given.
        recipe: the same, resolved.
        gpus: the GPUs that the ranks may use.
        model: the base model as `fsdpq.launch.inputs.fetched` describes it.
        trust_remote_code: let the ranks run Python code that the model brings.
        worker: arguments of torchrun that name the worker.
        output: one of `FORMATS`.
    """

    loaded: LoadedRecipe
    recipe: Recipe
    gpus: Sequence[str]
    model: dict[str, Any]
    trust_remote_code: bool = False
    worker: Sequence[str] = QUANTIZER
    output: str = "fsdpq"

    @property
    def key(self) -> Key:
        """All that the bytes of the base depend on."""
        recipe = self.recipe
        return base_key(
            model=self.model,
            quantization=recipe.quantization.model_dump(mode="json"),
            dtype=recipe.model.dtype,
            device=recipe.launch.device,
        )


def quantize(
    recipe_path: Path,
    overrides: Sequence[str],
    *,
    out: Path,
    screen: Screen,
    trust_remote_code: bool = False,
    worker: Sequence[str] = QUANTIZER,
    output: str = "fsdpq",
) -> Path:
    """Writes the recipe's quantized base to ``out``, a model directory by itself; returns it.

    It is there whole or not at all. Where a base of fsdpq's own is there already nothing is done.

    Args:
        recipe_path: the recipe's file.
        overrides: from the command line.
        out: a directory that does not exist, or is empty.
        screen: shows what happens.
        trust_remote_code: let the ranks run Python code that the model brings.
        worker: arguments of torchrun that name the worker.
        output: one of `FORMATS`.

    Raises:
        UsageError: ``out`` holds something else, or the quantizer has no such format.
        FsdpqError: one message for whatever went wrong, with its exit code.
    """
    loaded = load_recipe(recipe_path, overrides)
    for notice in loaded.notices:
        screen.report(f"note: {notice}")
    check_out(out, output)
    check_output(loaded.recipe, output)
    gpus = list_gpus()
    recipe = resolve_launch(loaded.recipe, num_gpus=len(gpus))
    check_packages(recipe, trains=False)
    if recipe.launch.device == "cuda":
        check_bf16(told_dtype(recipe), gpus)
    check_endpoint(recipe.launch)
    model = fetch_base_model(loaded, screen=screen, trust_remote_code=trust_remote_code)
    job = QuantizeJob(loaded, recipe, gpus, model, trust_remote_code, worker, output)
    if output == "fsdpq" and is_base(out):
        _check_same(out, job.key)
        screen.report(f"`{out}` holds this base already")
        return out
    with _explained_disk_errors(out):
        final = out.absolute()
        final.parent.mkdir(parents=True, exist_ok=True)
        remove_drafts(final)
        with draft_of(final) as draft:
            run_quantizer(job, draft, screen=screen)
            copy_model_files(Path(model["directory"]), draft, with_code=trust_remote_code)
            for path in draft.iterdir():
                sync(path)
    return out


def check_out(out: Path, output: str = "fsdpq") -> None:
    """Checks that ``output`` may be written to ``out``: it is new, empty, or such a base.

    Raises:
        UsageError: it is not.
    """
    if out.exists() and not out.is_dir():
        raise UsageError(f"`{out}` is a file", hint="name a new directory with `--out`")
    is_wanted = output == "fsdpq" and is_base(out)
    if out.is_dir() and any(out.iterdir()) and not is_wanted:
        message = f"the directory `{out}` exists and holds something that is no quantized base"
        if output != "fsdpq":
            message = f"the directory `{out}` exists and is not empty"
        raise UsageError(message, hint="name a new directory with `--out`")


def check_output(recipe: Recipe, output: str) -> None:
    """Checks that the recipe's quantizer has the format ``output``.

    Raises:
        UsageError: it has not.
    """
    if output == "bnb" and recipe.quantization.kind != "bnb":
        message = "`--format bnb` writes weights of bitsandbytes, and `quantization.kind` is "
        message += f"`{recipe.quantization.kind}`"
        raise UsageError(message, hint="leave `--format` out, or use `quantization: {kind: bnb}`")


def run_quantizer(job: QuantizeJob, directory: Path, *, screen: Screen) -> None:
    """Lets the ranks write the base into ``directory``, which is empty.

    Raises:
        RunStoppedError: a signal stopped them.
        FsdpqError: whatever they report.
    """
    inputs: dict[str, Any] = {"model": job.model}
    lock = describe_run(
        job.loaded, job.recipe, gpus=job.gpus, inputs=inputs,
        trust_remote_code=job.trust_remote_code,
    )  # fmt: skip
    # The ranks replace the directory of a model as a whole; the draft itself is held, and stays.
    target = directory if job.output == "fsdpq" else directory / "model"
    flags = ["--out", str(target), *([TRUST_FLAG] if job.trust_remote_code else [])]
    flags += [] if job.output == "fsdpq" else ["--format", job.output]
    root = Path(tempfile.mkdtemp(prefix="fsdpq-quantize-"))
    files = create_run_dir(job.recipe, raw=job.loaded.raw, lock=lock, run_dir=root)
    oom_kills = count_oom_kills()
    try:
        code, stopped_by = run_torchrun(
            files, job.recipe.launch, on_row=screen.show_row, worker=(*job.worker, *flags)
        )
    finally:
        screen.close()
    if code != 0 and not stopped_by:
        raise explain_failure(files, exit_code=code, oom_kills_before=oom_kills)
    if target != directory and target.is_dir():
        for path in target.iterdir():
            path.rename(directory / path.name)
        target.rmdir()
    if not stopped_by and not _is_written(directory, job.output):
        message = "the ranks ended without a quantized base"
        raise LaunchError(message, hint=f"the logs are in `{files.logs}`")
    shutil.rmtree(root, ignore_errors=True)
    if stopped_by:
        raise RunStoppedError(f"stopped by {stopped_by} while quantizing; nothing is left of it")


def _is_written(directory: Path, output: str) -> bool:
    if output == "fsdpq":
        return is_base(directory)
    return read_stored_quantization(directory) is not None and any(directory.glob("*.safetensors"))


def _check_same(out: Path, key: Key) -> None:
    differences = key_differences(read_manifest(out).key, key)
    if differences:
        message = f"`{out}` holds another base: {'; '.join(differences)}"
        raise UsageError(message, hint="name a new directory with `--out`, or delete this one")


@contextmanager
def _explained_disk_errors(out: Path) -> Generator[None, None, None]:
    try:
        yield
    except OSError as error:
        message = f"the base cannot be written to `{out}`: {error.strerror or error}"
        hint = "choose a place with more room that you can write to: `--out DIR`"
        raise EnvironmentProblemError(message, hint=hint) from None
