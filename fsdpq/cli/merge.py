"""``fsdpq merge``: what a run trained, in the weights of its base, with a receipt."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import click

from fsdpq.cli.answers import echo_json, json_option
from fsdpq.cli.options import RunPath, say, trust_option, warn_of_code
from fsdpq.fetch.cache import format_bytes


@click.command("merge")
@click.argument("run", type=RunPath())
@click.option(
    "--out", required=True, metavar="DIR", type=click.Path(path_type=Path),
    help="Where the model goes: a new directory.",
)  # fmt: skip
@click.option(
    "--onto", type=click.Choice(("dequantized", "original")), default="dequantized",
    show_default=True,
    help="Which weights of the base: the quantized ones that were trained over, dequantized, or "
    "those of the checkpoint.",
)  # fmt: skip
@click.option(
    "--requantize", type=click.Choice(("nf4", "hqq")),
    help="Quantize the merged weights: as bitsandbytes' 4-bit model, which transformers loads, or "
    "as a base of fsdpq's own.",
)  # fmt: skip
@click.option(
    "--dtype", type=click.Choice(("bf16", "fp16", "fp32")),
    help="Of the weights that are written; default: that of the base.",
)  # fmt: skip
@click.option(
    "--compare-tokens", type=click.IntRange(min=0), metavar="N", default=1024, show_default=True,
    help="Compare the merged model with the trained one on so many tokens; 0 does not.",
)  # fmt: skip
@json_option
@trust_option
def merge_command(
    run: Path, *, out: Path, as_json: bool, trust_remote_code: bool, **chosen: Any
) -> None:
    """Merge what the finished RUN trained into its base model, and write that to DIR.

    A few rows are in memory at a time, whatever the size of the model. `merge.json` in DIR says how
    much of the change survived and how like the trained model it answers. DIR is printed on stdout.
    """
    from fsdpq.cli.screen import open_screen
    from fsdpq.launch.merge import MergeChoices, merge

    warn_of_code(trust_remote_code)
    choices = MergeChoices(**chosen, trust_remote_code=trust_remote_code)
    receipt = merge(run, out, choices, screen=open_screen(sys.stderr))
    for line in receipt_lines(receipt):
        say(line)
    if as_json:
        echo_json(receipt)
    else:
        click.echo(out)


MODEL_WORDS = {
    "trained": "trained: adapter beside its base",
    "base": "base before training",
    "merged": "merged",
    "requantized": "quantized again",
}


def receipt_lines(receipt: Mapping[str, Any]) -> Iterator[str]:
    """Yields what the terminal shows of a receipt."""
    how = f", quantized again as {receipt['requantize']}" if receipt["requantize"] else ""
    count = len(receipt["files"])
    yield (
        f"merged onto the {receipt['onto']} weights in {receipt['dtype']}{how}: "
        f"{format_bytes(receipt['num_bytes'])} in {count} file{'' if count == 1 else 's'}"
    )
    yield from _survival_lines(receipt)
    if receipt["likeness"] is not None:
        yield from _likeness_lines(receipt["likeness"])
    for sentence in (*receipt["notices"], *receipt["verdict"]):
        yield from ("", sentence)


def _survival_lines(receipt: Mapping[str, Any]) -> Iterator[str]:
    again = receipt["requantized"]
    merged = {**receipt["merged"]["kinds"], "all": receipt["merged"]["all"]}
    width = max(len(kind) for kind in merged)
    yield ""
    last = "  quantized again" if again else ""
    yield f"  {'change of':<{width}}  {'size':>8}  {'of base':>8}  {'kept':>7}  {'error':>7}{last}"
    for kind, one in merged.items():
        share = one["change_norm"] / one["base_norm"] if one["base_norm"] else None
        cells = f"{one['change_norm']:>8.3g}  {_percent(share):>8}  {_percent(one['kept']):>7}"
        line = f"  {kind:<{width}}  {cells}  {_percent(one['relative_error']):>7}"
        if again:
            other = again["all"] if kind == "all" else again["kinds"][kind]
            line += f"  {_percent(other['relative_error']):>15}"
        yield line


def _likeness_lines(likeness: Mapping[str, Any]) -> Iterator[str]:
    yield ""
    yield f"  on {likeness['tokens']} tokens of {likeness['text']}"
    width = max(len(MODEL_WORDS[name]) for name in likeness["models"])
    yield f"  {'':<{width}}  {'loss':>7}  {'mean KL':>9}  {'max KL':>9}  nats a token"
    for name, one in likeness["models"].items():
        numbers = f"{one['loss']:>7.4f}  {one['mean_kl']:>9.3g}  {one['max_kl']:>9.3g}"
        yield f"  {MODEL_WORDS[name]:<{width}}  {numbers}"


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.2%}"
