"""``fsdpq bench``: the project's benchmarks on this machine, beside the stock libraries."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from fsdpq.cli.answers import echo_json, json_option
from fsdpq.cli.options import say
from fsdpq.cli.render import clean, render_notice, wants_color

if TYPE_CHECKING:
    from fsdpq.run_files.bench_record import BenchResult, Cell, Column, Ratio, Table


@click.command("bench")
@click.argument("names", nargs=-1, metavar="[NAME]...")
@click.option(
    "--compare", type=click.Choice(["transformers"]),
    help="Run the reference beside, in turns: transformers + PEFT + bitsandbytes; for data TRL.",
)  # fmt: skip
@click.option(
    "--device", type=click.Choice(["cuda", "cpu"]), help="Default: the GPU where there is one."
)
@click.option("--quick", is_flag=True, help="Smaller sizes and fewer repeats: a minute each.")
@click.option(
    "--set", "changes", multiple=True, metavar="NAME.KEY=VALUE",
    help="Change a setting, `step.shape=7b`; `--list` shows all.",
)  # fmt: skip
@click.option(
    "--out", type=click.Path(path_type=Path), metavar="DIR",
    help="Where bench.json and the pictures go; default: a new directory in runs/.",
)  # fmt: skip
@click.option("--list", "lists", is_flag=True, help="List the benchmarks and their settings.")
@json_option
def bench_command(
    names: tuple[str, ...],
    *,
    compare: str | None,
    device: str | None,
    quick: bool,
    changes: tuple[str, ...],
    out: Path | None,
    lists: bool,
    as_json: bool,
) -> None:
    """Measure this machine: load, step, memory, data, cli; all of them without a NAME.

    Prints tables; writes bench.json, and pictures where matplotlib is installed.
    """
    if lists:
        _list_benchmarks(as_json=as_json)
        return
    from fsdpq.launch.bench import BenchOptions, run_benchmarks
    from fsdpq.launch.bench_plots import INSTALL_HINT, can_draw, draw_plots
    from fsdpq.run_files.bench_record import BenchResult

    def show(name: str, result: BenchResult) -> None:
        if not as_json:
            _echo(render_result(name, result))

    options = BenchOptions(names, device, compare is not None, quick, changes, out)
    directory, record = run_benchmarks(options, report=lambda t: say(clean(t)), on_result=show)
    if can_draw():
        for content in record["benchmarks"].values():
            draw_plots(BenchResult.from_json(content).plots, directory)
    else:
        say(render_notice(INSTALL_HINT))
    say(f"written to {directory}")
    if as_json:
        echo_json(record)


def _list_benchmarks(*, as_json: bool) -> None:
    from fsdpq.run_files.benchmarks import BENCHMARKS

    if as_json:
        rows = [
            {
                "name": b.name,
                "summary": b.summary,
                "minutes": b.minutes[0],
                "settings": dict(b.settings),
                "reference": b.reference,
            }
            for b in BENCHMARKS
        ]
        echo_json(rows)
        return
    for row in BENCHMARKS:
        click.echo(f"{row.name:<7} {row.summary}")
        click.echo(f"        beside: {row.reference}; about {row.minutes[0]:g} min on two cores")
        settings = ", ".join(f"{row.name}.{key}={value}" for key, value in row.settings.items())
        click.echo(f"        {settings}")


def render_result(name: str, result: BenchResult) -> Iterator[str]:
    """Yields tables, ratios and notes of one benchmark, as Markdown."""
    for table in result.tables:
        yield click.style(f"{name}: {clean(table.title)}", bold=True)
        yield ""
        yield from render_table(table)
        yield ""
    if result.ratios:
        yield from _grid([["ratio", "", "pairs", "aim"]] + [_ratio_cells(r) for r in result.ratios])
        yield ""
    for note in result.notes:
        yield f"- {clean(note)}"
    yield from [""] * bool(result.notes)


def render_table(table: Table) -> Iterator[str]:
    """Yields the lines of one table."""
    rows = [[column.heading for column in table.columns]]
    rows += [[_cell_text(row.get(c.key), c) for c in table.columns] for row in table.rows]
    yield from _grid(rows)


def _ratio_cells(ratio: Ratio) -> list[str]:
    pairs = f"{ratio.low:.2f} to {ratio.high:.2f}" if ratio.low != ratio.high else ""
    if ratio.target is None:
        return [ratio.name, f"{ratio.value:.2f}", pairs, ""]
    word = "at least" if ratio.better == "higher" else "at most"
    aim = f"{word} {ratio.target:g}{': missed' * ratio.missed}"
    return [ratio.name, f"{ratio.value:.2f}", pairs, aim]


def _cell_text(cell: Cell, column: Column) -> str:
    if cell is None:
        return ""
    if isinstance(cell, str):
        return cell
    if isinstance(cell, (int, float)):
        return f"{cell:,.{column.digits}f}"
    text = f"{cell.median:,.{column.digits}f}"
    low, high = f"{cell.low:,.{column.digits}f}", f"{cell.high:,.{column.digits}f}"
    return text if low == high else f"{text} ({low} to {high})"


def _grid(rows: Sequence[Sequence[str]]) -> Iterator[str]:
    """Yields a Markdown table whose columns line up; the first row is its heading."""
    texts = [[clean(text) for text in row] for row in rows]
    widths = [max(3, *(len(text) for text in column)) for column in zip(*texts, strict=True)]
    for index, row in enumerate(texts):
        cells = (text.ljust(width) for text, width in zip(row, widths, strict=True))
        yield f"| {' | '.join(cells)} |"
        if index == 0:
            yield f"| {' | '.join('-' * width for width in widths)} |"


def _echo(lines: Iterator[str]) -> None:
    for line in lines:
        click.echo(line, color=wants_color(sys.stdout))
