"""Tasks of lm-evaluation-harness over a sharded model: rank 0 runs them, all ranks compute."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fsdpq import dist
from fsdpq.protocols import MetricSink
from fsdpq.worker.assemble import stop_ids
from fsdpq.worker.evaluate.answers import Scored, continue_rows, score_rows, text_is_over
from fsdpq.worker.evaluate.subject import Subject
from fsdpq.worker.evaluate.waves import Waves


def run_tasks(subject: Subject, events: MetricSink) -> dict[str, dict[str, float]]:
    """Returns the metrics of the recipe's tasks on rank 0, nothing elsewhere.

    Ranks: all (collective).
    """
    model = subject.assembled.model
    was_training = model.training
    model.eval()
    try:
        waves = open_waves(subject, events)
        if dist.rank() != 0:
            waves.serve()
            return {}
        return _lead(subject, waves)
    finally:
        model.train(was_training)


def _lead(subject: Subject, waves: Waves) -> dict[str, dict[str, float]]:
    from fsdpq.worker.evaluate.harness import HarnessModel, evaluate_tasks, load_tasks

    options = subject.recipe.evaluation
    try:
        loaded = load_tasks(options.tasks, subject.include_path)
        model = HarnessModel(waves, subject.tokenizer, subject.assembled.model.hf.config)
        return evaluate_tasks(model, loaded, options)
    finally:
        waves.dismiss()


def open_waves(subject: Subject, events: MetricSink) -> Waves:
    """Returns what computes the harness's questions on this rank, and counts them on rank 0."""
    model, tokenizer, device = subject.assembled.model, subject.tokenizer, subject.device
    stops = stop_ids(subject.model_dir, tokenizer)
    done = 0

    def score(rows: Sequence[Scored], _options: Mapping[str, Any]) -> list[Any]:
        return score_rows(model, rows, device)

    def go_on(prompts: Sequence[list[int]], options: Mapping[str, Any]) -> list[Any]:
        return continue_rows(
            model,
            prompts,
            max_new_tokens=options["max_new_tokens"],
            stop_ids=stops,
            is_over=text_is_over(tokenizer, options["stops"]),
            sampling=options["sampling"],
            device=device,
        )

    def count(num_questions: int) -> None:
        nonlocal done
        done += num_questions
        events.write({"event": "requests", "done": done})

    batch_size = subject.recipe.evaluation.batch_size or subject.recipe.training.micro_batch_size
    return Waves({"score": score, "continue": go_on}, batch_size=batch_size, on_wave=count)


def fetch_tasks(names: Sequence[str], include_path: Path | None) -> None:
    """Loads tasks with the network, so that their questions are in the cache of `datasets`.

    Prints one line about them.
    """
    from fsdpq.worker.evaluate.harness import load_tasks

    counts = load_tasks(names, include_path).num_questions
    total = f"{sum(counts.values()):,} questions"
    tasks = f"{len(counts)} task{'' if len(counts) == 1 else 's'}"
    sys.stdout.write(f"{tasks} of lm-evaluation-harness, {total}\n")
