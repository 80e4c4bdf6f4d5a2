"""Answers one prompt with what a finished run trained, as a single rank."""

from __future__ import annotations

import sys

from fsdpq import dist
from fsdpq.recipe.load import load_resolved
from fsdpq.run_files import RunFiles
from fsdpq.worker.answerer import Answerer, build_asker
from fsdpq.worker.assemble import (
    assemble_model,
    read_inputs,
    stop_ids,
    without_gpu_kernels,
)
from fsdpq.worker.export.formats import FORMATS
from fsdpq.worker.tokenizer import load_tokenizer


def generate(
    files: RunFiles,
    *,
    prompt: str,
    max_new_tokens: int,
    temperature: float,
    device_type: str,
    use_adapter: bool,
    trust_remote_code: bool = False,
) -> None:
    """Writes the answer to stdout.

    Args:
        files: of a finished run.
        prompt: the user's message.
        max_new_tokens: longest answer.
        temperature: 0 is greedy.
        device_type: ``cuda`` or ``cpu``.
        use_adapter: False answers with the base as it was before training.
        trust_remote_code: run code that the model brings.
    """
    recipe = load_resolved(files.resolved)
    if device_type == "cpu":
        recipe = without_gpu_kernels(recipe)
    inputs = read_inputs(files, trust_remote_code=trust_remote_code)
    device = dist.start_process_group(device_type)
    dist.seed_everything(recipe.training.seed)
    tokenizer = load_tokenizer(inputs.model_dir, trust_remote_code=trust_remote_code)
    assembled = assemble_model(
        recipe,
        inputs.model_dir,
        device=device,
        report_load=lambda _done, _total: None,
        base=inputs.base,
        trust_remote_code=trust_remote_code,
    )
    if use_adapter:
        exported = files.exported(recipe.export.format)
        FORMATS[recipe.export.format].load(assembled, exported)
    stops = stop_ids(inputs.model_dir, tokenizer)
    asks = build_asker(recipe, inputs.data, tokenizer)
    answerer = Answerer(assembled, tokenizer, asks=asks, stop_ids=stops, device=device)
    answer = answerer.answer(prompt, max_new_tokens=max_new_tokens, temperature=temperature)
    sys.stdout.write(answer + "\n")
