"""The README of a merged model: what it is, and what the receipt says."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from fsdpq.run_files.paths import MERGE_RECEIPT

MODEL_WORDS = {
    "trained": "trained: adapter beside its base",
    "base": "base before training",
    "merged": "merged",
    "requantized": "merged and quantized again",
}


def write_card(directory: Path, receipt: Mapping[str, Any]) -> None:
    """Writes ``README.md`` with the receipt's tables into ``directory``."""
    text = "\n".join(_lines(receipt)) + "\n"
    (directory / "README.md").write_text(text, encoding="utf-8")


def _lines(receipt: Mapping[str, Any]) -> Iterator[str]:
    revision = f" at revision `{receipt['base_revision']}`" if receipt["base_revision"] else ""
    yield from ("---", f"base_model: {receipt['base_model']}", "library_name: transformers")
    yield from ("pipeline_tag: text-generation", "---", "")
    yield f"# {Path(receipt['run']).name}, merged"
    yield ""
    yield f"`{receipt['base_model']}`{revision} with a finetuned change ({receipt['adapter']})"
    how = f", quantized again as {receipt['requantize']}" if receipt["requantize"] else ""
    yield f"in its weights, written by fsdpq {receipt['fsdpq']}: merged onto the"
    yield f"{receipt['onto']} weights in {receipt['dtype']}{how}."
    if receipt["requantize"] == "hqq":
        yield ""
        yield "The weights are fsdpq's own quantized base: name this directory in"
        yield "`model.name_or_path` of a recipe. transformers does not load it."
    yield from ("", "## Is it the trained model?", "")
    for sentence in receipt["verdict"]:
        yield f"- {sentence}"
    if receipt["likeness"] is not None:
        yield from _likeness_lines(receipt["likeness"])
    yield from _survival_lines(receipt)
    yield ""
    yield f"`{MERGE_RECEIPT}` has the same for every weight."


def _likeness_lines(likeness: Mapping[str, Any]) -> Iterator[str]:
    yield ""
    yield f"On {likeness['tokens']} tokens of {likeness['text']}, computed in fp32."
    yield f"The divergence is {likeness['divergence']}."
    yield ""
    yield "| model | loss, nats a token | mean divergence | largest divergence |"
    yield "| --- | --- | --- | --- |"
    for name, one in likeness["models"].items():
        numbers = f"{one['loss']:.4f} | {one['mean_kl']:.3g} | {one['max_kl']:.3g}"
        yield f"| {MODEL_WORDS[name]} | {numbers} |"


def _survival_lines(receipt: Mapping[str, Any]) -> Iterator[str]:
    again = receipt["requantized"]
    yield from ("", "## What is left of the change", "")
    yield "D is what training added to a weight W, D' what the stored weight differs from W by."
    yield ""
    more = " relative error, quantized again |" if again else ""
    yield f"| weights | norm of W | norm of D | kept | relative error |{more}"
    yield "| --- | --- | --- | --- | --- |" + (" --- |" if again else "")
    for kind, one in {**receipt["merged"]["kinds"], "all": receipt["merged"]["all"]}.items():
        cells = [kind, f"{one['base_norm']:.4g}", f"{one['change_norm']:.4g}"]
        cells += [_ratio(one["kept"]), _ratio(one["relative_error"])]
        if again:
            other = again["all"] if kind == "all" else again["kinds"][kind]
            cells.append(_ratio(other["relative_error"]))
        yield f"| {' | '.join(cells)} |"


def _ratio(value: float | None) -> str:
    return "-" if value is None else f"{value:.2%}"
