"""The model card of an export: ``README.md`` and ``loss.svg``, as a hub shows them.

A card is public: no path of this machine, no row of the data, no prompt and no name of an account
is in it. What is local is called by its last name and its sha256.
https://huggingface.co/docs/hub/model-cards
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping
from pathlib import Path, PurePath
from typing import Any

import yaml

from fsdpq.reports.loss_plot import draw_losses
from fsdpq.reports.report import format_bytes, format_duration
from fsdpq.reports.run_record import Row, RunRecord, read_record
from fsdpq.run_files.paths import RunFiles
from fsdpq.run_files.rows import RunSummary
from fsdpq.run_files.writing import write_whole
from fsdpq.worker.export.verify import Verified

CARD_NAME = "README.md"
PLOT_NAME = "loss.svg"

PRIVATE_SECTIONS = ("metrics", "launch", "checkpoint")
"""Of a recipe, what says nothing about the weights, and may name accounts, machines or prompts."""

PATH_KEYS = ("path", "chat_template")
"""Keys of a recipe whose values are files of this machine."""

METHODS = {
    "lora": "LoRA adapter",
    "dora": "DoRA adapter",
    "llama_pro": "model with new layers (LLaMA Pro)",
    "none": "fully finetuned model",
}

PACKAGES = ("torch", "transformers", "peft", "bitsandbytes", "hqq")

_SPDX = re.compile(r"[A-Za-z0-9.+-]+")


def write_card(
    files: RunFiles, directory: Path, *, summary: RunSummary, verified: Verified | None
) -> None:
    """Writes the card of a run's export into ``directory``.

    Ranks: 0 only.

    Args:
        files: the run directory.
        directory: what was exported.
        summary: of the run.
        verified: how close stock libraries come, None where nobody looked.
    """
    record = read_record(files)
    record.summary = dataclasses.asdict(summary)
    plot = draw_losses(record.steps, record.evals)
    if plot:
        write_whole(directory / PLOT_NAME, plot.encode())
    text = render_card(record, verified, has_plot=bool(plot))
    write_whole(directory / CARD_NAME, text.encode())


def render_card(record: RunRecord, verified: Verified | None, *, has_plot: bool) -> str:
    """Returns the text of the card.

    Args:
        record: what the run directory says, with the summary.
        verified: as for `write_card`.
        has_plot: whether there is a picture beside it.
    """
    settings = record.settings
    parts = [
        "---",
        yaml.safe_dump(_front_matter(record), sort_keys=False, allow_unicode=True).rstrip(),
        "---",
        "",
        f"# {settings['name']}",
        "",
        *([_plain(settings["description"]), ""] if settings.get("description") else []),
        _opening(record),
        "",
        *_section("Load it", _loading(record)),
        *_section("Results", _results(record, has_plot)),
        *_section("Data", _data(record)),
        *_section("Training", _training(record, verified)),
        *_section("Recipe", _recipe(record)),
    ]
    return "\n".join(parts).rstrip() + "\n"


def _section(title: str, lines: list[str]) -> list[str]:
    return [f"## {title}", "", *lines, ""] if lines else []


def _front_matter(record: RunRecord) -> dict[str, Any]:
    """Returns the card's metadata; what only this machine knows is left out."""
    settings, model = record.settings, record.environment.get("inputs", {}).get("model", {})
    is_adapter = settings["export"]["format"] == "peft"
    kind = settings["adapter"]["kind"]
    found: dict[str, Any] = {
        "library_name": "peft" if is_adapter else "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["fsdpq", kind if kind != "none" else "full-finetuning"],
    }
    if model.get("revision"):
        found["base_model"] = settings["model"]["name_or_path"]
        found["base_model_relation"] = "adapter" if is_adapter else "finetune"
    known = str(model.get("license", ""))
    if _SPDX.fullmatch(known):
        found["license"] = known.lower()
    datasets = [name for name in map(_hub_dataset, _sources(record)) if name]
    if datasets:
        found["datasets"] = list(dict.fromkeys(datasets))
    return found


def _opening(record: RunRecord) -> str:
    settings = record.settings
    adapter = settings["adapter"]
    kind = METHODS[adapter["kind"]]
    rank = f" of rank {adapter['rank']}" if "rank" in adapter else ""
    quantization = _quantization_words(settings["quantization"])
    return (
        f"A {kind}{rank}, trained with fsdpq {record.environment.get('fsdpq', '')} over "
        f"{_base_words(record)}{quantization}."
    )


def _base_words(record: RunRecord) -> str:
    """Returns what the base is: a hub's repository, or a name and the hash of its files."""
    model = record.environment.get("inputs", {}).get("model", {})
    name = str(record.settings["model"]["name_or_path"])
    if model.get("revision"):
        return f"[{name}](https://huggingface.co/{name}) at revision `{model['revision']}`"
    return f"`{public_name(name, None)}` (its files: sha256 `{model.get('sha256', 'unknown')}`)"


def _quantization_words(quantization: Row) -> str:
    if quantization["kind"] == "bnb":
        return f", held in {str(quantization['quant_type']).upper()} (bitsandbytes, 4 bits)"
    if quantization["kind"] == "hqq":
        return f", held in {quantization['nbits']} bits (HQQ)"
    return ""


def public_name(name: str, revision: str | None) -> str:
    """Returns a repository's name as it is, and of a path on this machine the last part."""
    return name if revision else PurePath(name).name


def _loading(record: RunRecord) -> list[str]:
    """Returns how to load it; ``BASE`` and ``THIS`` stand for what only the reader knows."""
    model = record.environment.get("inputs", {}).get("model", {})
    revision = model.get("revision")
    name = record.settings["model"]["name_or_path"] if revision else "BASE"
    pinned = f', revision="{revision}"' if revision else ""
    export_format = record.settings["export"]["format"]
    if export_format == "delta":
        return [
            "This is a delta: `delta.json` says which base it belongs to and how they go together."
        ]
    adapter = [
        "from peft import PeftModel",
        "from transformers import AutoModelForCausalLM",
        "",
        f'base = AutoModelForCausalLM.from_pretrained("{name}"{pinned})',
        'model = PeftModel.from_pretrained(base, "THIS")',
    ]
    whole = [
        "from transformers import AutoModelForCausalLM",
        "",
        'model = AutoModelForCausalLM.from_pretrained("THIS")',
    ]
    words = "`THIS` is this directory, or the name of this repository"
    if export_format == "peft" and not revision:
        words += "; `BASE` is a directory with the base model"
    code = adapter if export_format == "peft" else whole
    return ["```python", *code, "```", "", f"{words}."]


def _results(record: RunRecord, has_plot: bool) -> list[str]:
    before = record.summary.get("eval_loss_before")
    after = record.summary.get("eval_loss_after")
    lines: list[str] = []
    if before is not None and after is not None:
        lines += [
            "| | before | after |",
            "| --- | --- | --- |",
            f"| held-out loss | {before:.4f} | {after:.4f} |",
            f"| perplexity | {_perplexity(before)} | {_perplexity(after)} |",
            "",
        ]
    return [*lines, f"![Loss by step]({PLOT_NAME})"] if has_plot else lines


def _perplexity(loss: float) -> str:
    return f"{math.exp(loss):.2f}" if loss < 50 else "inf"


def _sources(record: RunRecord) -> list[Row]:
    data = record.environment.get("inputs", {}).get("data") or {}
    return [*data.get("train", []), *([data["eval"]] if data.get("eval") else [])]


def _hub_dataset(source: Row) -> str | None:
    """Returns the name of a source on the hub, None for another one."""
    return str(source["name"]) if source.get("revision") else None


def _data(record: RunRecord) -> list[str]:
    report = ((record.environment.get("inputs", {}).get("prepared") or {}).get("report")) or {}
    rows = ["| source | format | rows | version |", "| --- | --- | --- | --- |"]
    for source in _sources(record):
        hashes = [str(file.get("sha256")) for file in source.get("files", [])]
        version = source.get("revision") or (hashes[0] if len(hashes) == 1 else "")
        version = f"`{version}`" if version else f"{len(hashes)} files"
        name = public_name(str(source["name"]), source.get("revision"))
        rows.append(
            f"| {_plain(name)} | {source.get('format')} | {source.get('num_rows')} | {version} |"
        )
    if len(rows) == 2:
        return []
    if not report:
        return rows
    counts = f"{report['num_train_rows']:,} rows to train on, {report['num_held_out']:,} held out; "
    tokens = f"{report['num_tokens']:,} tokens an epoch, {report['num_trained']:,} of them carry"
    return [*rows, "", f"{counts}{tokens} loss."]


def _training(record: RunRecord, verified: Verified | None) -> list[str]:
    summary = record.summary
    versions = record.environment.get("packages", {})
    peaks = summary.get("peak_memory_bytes") or []
    rows = [
        ("steps", summary.get("steps")),
        ("tokens", f"{summary['tokens']:,}, {summary['trained_tokens']:,} of them carried loss"),
        ("time", format_duration(summary.get("train_s"))),
        *_set_up(record.setup),
        ("peak memory of a rank", format_bytes(max(peaks)) if peaks else ""),
        ("versions", ", ".join(f"{n} {versions[n]}" for n in PACKAGES if versions.get(n))),
        ("seed", record.environment.get("seed")),
    ]
    lines = ["| | |", "| --- | --- |", *(f"| {name} | {_plain(str(v))} |" for name, v in rows), ""]
    return [*lines, _verdict(verified)]


def _set_up(setup: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Rows about the start; none where the run directory was removed since."""
    if not setup:
        return []
    return [
        ("trained weights", f"{setup['num_trainable']:,} (base: {setup['num_parameters']:,})"),
        ("hardware", f"{setup['world_size']} x {setup['device']}, {setup['dtype']}"),
    ]


def _verdict(verified: Verified | None) -> str:
    if verified is None:
        return "Nobody compared what these files compute with the model that was trained."
    return (
        "Stock libraries loaded these files as the run ended, and answered fixed prompts: their "
        f"logits differ from the trained model's by at most {verified.max_difference:.1e} of the "
        f"largest ({verified.tolerance:g} was allowed)."
    )


def _recipe(record: RunRecord) -> list[str]:
    """Returns the resolved recipe without what is private, folded away."""
    kept = {key: value for key, value in record.settings.items() if key not in PRIVATE_SECTIONS}
    revision = record.environment.get("inputs", {}).get("model", {}).get("revision")
    name = public_name(str(kept["model"]["name_or_path"]), revision)
    kept["model"] = {**kept["model"], "name_or_path": name}
    text = yaml.safe_dump(_without_paths(kept), sort_keys=False, allow_unicode=True).rstrip()
    longest = max((len(run) for run in re.findall("`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    head = ["<details><summary>All settings</summary>", ""]
    return [*head, f"{fence}yaml", text, fence, "", "</details>"]


def _without_paths(value: Any, key: str = "") -> Any:
    """Returns settings with the last part of every path of this machine."""
    if isinstance(value, dict):
        return {name: _without_paths(item, name) for name, item in value.items()}
    if isinstance(value, list):
        return [_without_paths(item, key) for item in value]
    is_path = isinstance(value, str) and (key in PATH_KEYS or value.startswith(("/", "~", ".")))
    return PurePath(value).name if is_path else value


def _plain(text: str) -> str:
    """Returns text that Markdown shows as it is, in one line."""
    return re.sub(r"([\\`*_{}\[\]<>|#])", r"\\\1", " ".join(text.split()))
