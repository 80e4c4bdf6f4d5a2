"""Answers one prompt with the base and adapter of a finished run, as a single rank."""

from __future__ import annotations

import sys

from fsdpq import dist
from fsdpq.checkpoint.peft import import_adapter
from fsdpq.recipe.load import load_resolved
from fsdpq.run_files import RunFiles
from fsdpq.worker.answerer import Answerer
from fsdpq.worker.assemble import assemble_model, load_tokenizer, read_inputs, stop_ids


def generate(
    files: RunFiles,
    *,
    prompt: str,
    max_new_tokens: int,
    temperature: float,
    device_type: str,
    use_adapter: bool,
) -> None:
    """Writes the answer to stdout.

    Args:
        files: of a finished run.
        prompt: the user's message.
        max_new_tokens: longest answer.
        temperature: 0 is greedy.
        device_type: ``cuda`` or ``cpu``.
        use_adapter: False answers with the quantized base alone.
    """
    recipe, inputs = load_resolved(files.resolved), read_inputs(files)
    device = dist.start_process_group(device_type)
    dist.seed_everything(recipe.training.seed)
    tokenizer = load_tokenizer(inputs.model_dir)
    assembled = assemble_model(
        recipe, inputs.model_dir, device=device, report_load=lambda _done, _total: None
    )
    if use_adapter:
        import_adapter(assembled.adapted_layers, files.adapter)
    stops = stop_ids(inputs.model_dir, tokenizer)
    answerer = Answerer(
        assembled, tokenizer, data_format=recipe.data.format, stop_ids=stops, device=device
    )
    answer = answerer.answer(prompt, max_new_tokens=max_new_tokens, temperature=temperature)
    sys.stdout.write(answer + "\n")
