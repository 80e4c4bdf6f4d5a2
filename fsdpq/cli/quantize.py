"""``fsdpq quantize``: the quantized base of a recipe, written once."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from fsdpq.cli.options import recipe_arguments, trust_option, warn_of_code


@click.command("quantize")
@recipe_arguments
@click.option(
    "--out", required=True, metavar="DIR", type=click.Path(path_type=Path),
    help="Where the base goes: a new directory.",
)  # fmt: skip
@click.option(
    "--format", "output", type=click.Choice(("fsdpq", "bnb")), default="fsdpq", show_default=True,
    help="What is written: a base that fsdpq loads and maps, or a 4-bit model of bitsandbytes that "
    "transformers loads.",
)  # fmt: skip
@trust_option
def quantize_command(
    recipe: Path, *, overrides: tuple[str, ...], out: Path, output: str, trust_remote_code: bool
) -> None:
    """Write the quantized base model of RECIPE to DIR.

    DIR is a model by itself: name it as `model.name_or_path` of a recipe with the same
    quantization. Any number of GPUs loads it. The data is not looked at. DIR is printed on stdout.
    """
    from fsdpq.cli.screen import open_screen
    from fsdpq.launch.quantize import quantize

    warn_of_code(trust_remote_code)
    written = quantize(
        recipe,
        overrides,
        out=out,
        screen=open_screen(sys.stderr),
        trust_remote_code=trust_remote_code,
        output=output,
    )
    click.echo(written)
