"""The way in: a file or a command of another tool, and out comes an `ImportResult`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fsdpq.errors import UsageError
from fsdpq.importing import axolotl, fsdp_qlora, known_keys, llamafactory, torchtune, trl
from fsdpq.importing.accelerate import merge_accelerate
from fsdpq.importing.command_line import TAKEN_AS_MEANT, read_command_file, read_words
from fsdpq.importing.draft import Draft, Table
from fsdpq.importing.finish import finish
from fsdpq.importing.result import ImportResult
from fsdpq.recipe.source import Source, read_source


@dataclass(frozen=True)
class Tool:
    """One tool whose configs can be imported.

    Attributes:
        name: what ``--from`` takes.
        table: what becomes of its keys.
        assemble: fills what several keys say together.
        signature: keys by which a config of it is told from others.
    """

    name: str
    table: Table
    assemble: Callable[[Draft], None]
    signature: tuple[str, ...]


TOOLS: dict[str, Tool] = {
    tool.name: tool
    for tool in (
        Tool(
            axolotl.NAME, axolotl.TABLE, axolotl.assemble,
            ("base_model", "micro_batch_size", "sequence_len", "datasets", "num_epochs"),
        ),
        Tool(
            llamafactory.NAME, llamafactory.TABLE, llamafactory.assemble,
            ("finetuning_type", "stage", "template", "cutoff_len", "dataset", "lora_target"),
        ),
        Tool(
            torchtune.NAME, torchtune.TABLE, torchtune.assemble,
            ("model", "tokenizer", "checkpointer", "batch_size", "loss"),
        ),
        Tool(
            trl.NAME, trl.TABLE, trl.assemble,
            ("dataset_name", "use_peft", "max_length", "dataset_text_field", "load_in_4bit"),
        ),
        Tool(
            fsdp_qlora.NAME, fsdp_qlora.TABLE, fsdp_qlora.assemble,
            ("train_type", "context_length", "model_name", "use_cpu_offload"),
        ),
    )
}  # fmt: skip


def import_config(
    path: Path, *, tool: str = "auto", accelerate: Path | None = None, base_dir: Path | None = None
) -> ImportResult:
    """Returns the recipe that the config file ``path`` of ``tool`` makes.

    Args:
        path: a YAML file; for fsdp_qlora a file that holds the command.
        tool: one of `TOOLS`, or ``auto``.
        accelerate: an accelerate config that goes with a config of LLaMA-Factory or TRL.
        base_dir: where the recipe will lie; relative paths are looked up from there.

    Raises:
        UsageError: the file is missing, or no config of that tool.
        RecipeError: the file is no YAML.
    """
    if tool == fsdp_qlora.NAME or (
        tool == "auto" and path.suffix not in (".yml", ".yaml", ".json")
    ):
        source = read_command_file(path, known_keys.FSDP_QLORA)
        return _convert(TOOLS[fsdp_qlora.NAME], source, base_dir or path.parent)
    source = read_source(path, what="config")
    chosen = _choose(source, tool)
    if accelerate is not None:
        if chosen.name not in (llamafactory.NAME, trl.NAME):
            message = f"a config of {chosen.name} takes no accelerate config beside it"
            raise UsageError(message, hint="leave `--accelerate` out")
        extra = read_source(accelerate, what="config")
        return _convert(chosen, source, base_dir or path.parent, extra)
    return _convert(chosen, source, base_dir or path.parent)


def import_words(words: Sequence[str], *, base_dir: Path) -> ImportResult:
    """Returns the recipe that a command of fsdp_qlora makes, given as words.

    Raises:
        UsageError: it is no such command.
    """
    return _convert(TOOLS[fsdp_qlora.NAME], read_words(words, known_keys.FSDP_QLORA), base_dir)


def _convert(
    tool: Tool, source: Source, base_dir: Path, extra: Source | None = None
) -> ImportResult:
    directory = Path(source.path).parent
    draft = Draft(tool.name, source.data, source.marks, directory=directory)
    for problem in source.problems:
        is_meant = problem.hint == TAKEN_AS_MEANT
        draft.report_problem(problem, "assumed" if is_meant else "unusable")
    tool.table.apply(draft, "", source.data)
    if extra is not None:
        merge_accelerate(draft, extra)
    tool.assemble(draft)
    return finish(draft, str(source.path), base_dir=base_dir)


def _choose(source: Source, name: str) -> Tool:
    scores = {tool: _score(source.data, TOOLS[tool]) for tool in TOOLS if tool != fsdp_qlora.NAME}
    best = max(scores, key=lambda tool: scores[tool])
    if name == "auto" and scores[best] > 0:
        return TOOLS[best]
    if name != "auto" and scores[name] > 0 and scores[name] * 2 > scores[best]:
        return TOOLS[name]
    what_it_is, hint = _looks_like(source.data, best if scores[best] > 0 else "")
    what = "a config of any tool that is known here" if name == "auto" else f"a config of {name}"
    raise UsageError(f"`{source.path}` is not {what}: {what_it_is}", hint=hint)


def _score(data: dict[str, Any], tool: Tool) -> int:
    found = sum(key in data for key in tool.signature)
    if tool.name == torchtune.NAME:
        model: Any = data.get("model")
        has_component = isinstance(model, dict) and "_component_" in model
        return found + 3 if has_component and "optimizer" in data else 0
    return found


def _looks_like(data: dict[str, Any], best: str) -> tuple[str, str]:
    if data.get("version") == 1 and {"model", "data"} <= set(data):
        return "it looks like a recipe of fsdpq", "`fsdpq validate` checks it"
    if len(set(data) & known_keys.ACCELERATE) > 3 and "base_model" not in data:
        hint = "name the training config, and this one with `--accelerate`"
        return "it looks like an accelerate config", hint
    if best:
        return f"it looks like one of {best}", f"write `--from {best}`"
    keys = ", ".join(f"`{key}`" for key in list(data)[:3])
    return f"its keys are {keys}", f"the tools are {', '.join(TOOLS)}"
