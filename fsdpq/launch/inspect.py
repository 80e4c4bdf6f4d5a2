"""The flow of ``fsdpq data inspect``: rows and a tokenizer are fetched, one worker counts."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fsdpq.errors import UsageError
from fsdpq.fetch.data import fetch_data
from fsdpq.fetch.tokenizer import fetch_tokenizer
from fsdpq.launch.machine.devices import count_cores
from fsdpq.launch.ranks.processes import TRUST_FLAG
from fsdpq.launch.ranks.single_worker import RowProgress, WorkerFiles, run_single_worker
from fsdpq.launch.screen import Screen
from fsdpq.recipe.load import LoadedRecipe, dump_recipe, load_recipe
from fsdpq.rows.source import DataSources
from fsdpq.run_files.paths import RunFiles

INSPECTOR = ("-m", "fsdpq.worker", "inspect")


@dataclass(frozen=True)
class Wanted:
    """What to show of single rows.

    Attributes:
        num_samples: rows drawn to be shown.
        row: one row, ``K`` or ``FILE:K``: its number in its file, from 1; empty for none.
    """

    num_samples: int = 3
    row: str = ""


def inspect_data(
    recipe_path: Path,
    overrides: Sequence[str],
    wanted: Wanted,
    *,
    screen: Screen,
    trust_remote_code: bool = False,
    worker: Sequence[str] = INSPECTOR,
) -> dict[str, Any]:
    """Returns what there is to see of a recipe's rows, as plain data (docs/guides/data/inspect.md).

    Bad rows are counted in it, not raised. Weights of the model are not fetched, unless they are in
    one file with its tokenizer.

    Raises:
        UsageError: the recipe makes up its rows, or there is no such row.
        FsdpqError: the rows or the tokenizer cannot be had.
    """
    loaded = load_recipe(recipe_path, overrides)
    for notice in loaded.notices:
        screen.report(f"note: {notice}")
    if loaded.recipe.data.format == "dummy":
        hint = "name rows with `data.path` or `data.dataset`"
        raise UsageError("there is nothing to look at: `data.format: dummy` makes up rows", hint)
    data = fetch_data(
        loaded.recipe.data,
        base_dir=loaded.base_dir,
        report=screen.report,
        marks=loaded.marks,
        check_rows=False,
    )
    file, row = find_wanted_row(data, wanted.row)
    inputs = _inputs(loaded, data, screen=screen, trust_remote_code=trust_remote_code)
    with tempfile.TemporaryDirectory(prefix="fsdpq-inspect-") as root:
        files = RunFiles(Path(root))
        files.logs.mkdir()
        files.resolved.write_text(dump_recipe(loaded.recipe), encoding="utf-8")
        files.lock.write_text(json.dumps({"inputs": inputs}), encoding="utf-8")
        output = Path(root) / "inspection.json"
        arguments = [
            *worker, root, f"--samples={wanted.num_samples}", f"--file={file}", f"--row={row}",
            f"--out={output}", f"--processes={count_cores()}",
            *([TRUST_FLAG] if trust_remote_code else []),
        ]  # fmt: skip
        logs = WorkerFiles(files.logs / "out", files.rank_log(0), files.rank_error(0))
        run_single_worker(arguments, logs, on_line=RowProgress(screen.report, "looked at").take)
        return json.loads(output.read_text(encoding="utf-8"))


def find_wanted_row(data: DataSources, wanted: str) -> tuple[str, int]:
    """Returns the file and the number of the row that ``wanted`` names; no file for no row.

    Raises:
        UsageError: it is no row number, or does not say of which file.
    """
    if not wanted:
        return "", 0
    name, _, number = wanted.rpartition(":")
    if not number.isdecimal() or int(number) < 1:
        raise UsageError(f"`--row {wanted}` is no row", "give its number, from 1, or `FILE:NUMBER`")
    paths = list(dict.fromkeys(str(file.path) for source in data.every for file in source.files))
    found = [path for path in paths if not name or _ends_in(Path(path), Path(name))]
    if len(found) == 1:
        return found[0], int(number)
    listed = ", ".join(f"`{Path(path).name}`" for path in paths[:8])
    listed += f" and {len(paths) - 8} more" if len(paths) > 8 else ""
    message = "several files fit it" if found else f"no file is called `{name}`"
    raise UsageError(f"`--row {wanted}`: {message}", f"give `FILE:NUMBER`; the files are {listed}")


def _ends_in(path: Path, name: Path) -> bool:
    return path.parts[-len(name.parts) :] == name.parts


def _inputs(
    loaded: LoadedRecipe, data: DataSources, *, screen: Screen, trust_remote_code: bool
) -> dict[str, Any]:
    directory = fetch_tokenizer(
        loaded.recipe.model.name_or_path,
        revision=loaded.recipe.model.revision,
        base_dir=loaded.base_dir,
        report=screen.report,
        with_code=trust_remote_code,
    )
    inputs = {"directory": str(directory.absolute()), "revision": None}
    return {"model": inputs, "data": data.as_json()}
