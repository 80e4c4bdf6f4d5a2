"""Tasks of lm-evaluation-harness get what its own model for transformers and PEFT gets."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from support.harness_tasks import NAMES, save_harness_tasks
from support.ranks import RankPool
from support.sharded import CPU, assemble, train
from support.tiny import random_rows, save_tiny_llama, tiny_recipe
from support.tokenizer import save_tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

from fsdpq.checkpoint.peft import export_adapter, import_adapter
from fsdpq.dist import rank
from fsdpq.metrics.sinks import NoSink
from fsdpq.run_files.paths import RunFiles

pytest.importorskip("lm_eval", reason="lm-evaluation-harness is missing: pip install lm_eval")

from lm_eval.api.instance import Instance
from lm_eval.evaluator import simple_evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

from fsdpq.worker.evaluate.after_training import measure_tasks
from fsdpq.worker.evaluate.harness import HarnessModel
from fsdpq.worker.evaluate.subject import Subject
from fsdpq.worker.evaluate.tasks import open_waves, run_tasks

SECTIONS: dict[str, dict[str, Any]] = {
    # Unquantized, because the harness calls bitsandbytes in eval mode, where its 4-bit layers
    # multiply in bf16 on CPUs that have it.
    "quantization": {"kind": "none"},
    "adapter": {"rank": 4, "alpha": 16.0},
    "evaluation": {"tasks": NAMES, "batch_size": 2, "limit": 5},
}
PAIRS = [
    ("What is one?", " one"),
    ("What is one?", " two"),  # the same row again: its choices are one token each
    ("What is one?", " one two three"),
    ("", "What is the capital"),  # no context: the begin mark stands for it
    ("red green ", "blue"),  # the space belongs to the answer
    ("one two three four five " * 60, "six seven"),  # longer than the context: cut at the left
    ("<|im_end|>What", " is"),  # begins with the mark already
]
TEXTS = ["one two", "hello there", "What is the capital of France? " * 40]
PROMPTS = [
    ("What is one?", {"until": ["w", "?"], "max_gen_toks": 12}),
    ("red green", {"until": ["w", "?"], "max_gen_toks": 12}),
    ("one two three four five " * 60, {"until": ["w", "?"], "max_gen_toks": 12}),
    ("user", {"until": [], "max_gen_toks": 20, "do_sample": False}),
    ("What is two? What is two?", {"until": "x", "max_gen_toks": 20, "do_sample": False}),
]


def train_adapter(directory: Path, adapter: Path) -> None:
    """Trains four steps and exports the adapter.

    Ranks: all (collective).
    """
    assembled = assemble(directory, **SECTIONS)
    batches = [random_rows(4, seed=index) for index in range(4)]
    train(assembled, batches, micro_batch_size=2, lr=1e-2, max_norm=None)
    options: Any = tiny_recipe(**SECTIONS).adapter
    export_adapter(
        assembled.adapted_layers, adapter, options=options, base_model=str(directory),
        revision=None, hf_config=assembled.model.hf.config,
    )  # fmt: skip


def open_subject(directory: Path, adapter: Path, tasks: Path | None = None) -> Subject:
    """Returns the sharded model with its adapter.

    Ranks: all (collective).
    """
    assembled = assemble(directory, **SECTIONS)
    import_adapter(assembled.adapted_layers, adapter)
    tokenizer = AutoTokenizer.from_pretrained(directory)
    return Subject(tiny_recipe(**SECTIONS), assembled, tokenizer, directory, CPU, tasks)


def likeliest_pairs(lm: HFLM) -> list[tuple[str, str]]:
    """Returns contexts, each with the token that is likeliest after it."""
    pairs: list[tuple[str, str]] = []
    for context, _ in PAIRS[:1] + PAIRS[4:5]:
        ids = torch.tensor([lm.tok_encode(context.rstrip())])
        pairs.append((context.rstrip(), lm.tok_decode(lm.model(ids).logits[0, -1].argmax())))
    return pairs


def answer(directory: Path, adapter: Path, pairs: Sequence[tuple[str, str]]) -> list[Any] | None:
    """Returns our answers to the pairs, `TEXTS` and `PROMPTS` on rank 0.

    Ranks: all (collective).
    """
    subject = open_subject(directory, adapter)
    waves = open_waves(subject, NoSink())
    if rank() != 0:
        waves.serve()
        return None
    model = HarnessModel(waves, subject.tokenizer, subject.assembled.model.hf.config)
    answers = ask(model, pairs)
    waves.dismiss()
    return answers


def ask(model: Any, pairs: Sequence[tuple[str, str]]) -> list[Any]:
    """Returns what a model of the harness answers."""

    def requests(sort: Any, arguments: Sequence[tuple[Any, ...]]) -> list[Instance]:
        return [Instance(sort, {}, each, index) for index, each in enumerate(arguments)]

    return [
        model.loglikelihood(requests("loglikelihood", pairs)),
        model.loglikelihood_rolling(requests("loglikelihood_rolling", [(t,) for t in TEXTS])),
        model.generate_until(requests("generate_until", PROMPTS)),
    ]


def run(directory: Path, adapter: Path, tasks: Path, run_dir: Path) -> None:
    """Runs the tasks as the end of training does; rank 0 keeps what they give.

    Ranks: all (collective).
    """
    measure_tasks(open_subject(directory, adapter, tasks), RunFiles(run_dir), NoSink())


def run_stock(lm: HFLM, tasks: Path) -> dict[str, dict[str, Any]]:
    """Returns what the tasks give by the harness's own model."""
    manager = TaskManager(include_path=str(tasks), include_defaults=False)
    results: Any = simple_evaluate(
        model=lm, tasks=list(NAMES), task_manager=manager, bootstrap_iters=100, limit=5
    )
    return results["results"]


def test_answers_and_tasks_are_those_of_the_harness_over_transformers(
    ranks: RankPool, tmp_path: Path
) -> None:
    directory = save_tiny_llama(tmp_path / "base", eos_token_id=2)
    save_tokenizer(directory)
    adapter, tasks = tmp_path / "adapter", save_harness_tasks(tmp_path / "tasks")
    ranks.run(2, train_adapter, directory, adapter)
    base = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    lm = HFLM(
        pretrained=PeftModel.from_pretrained(base, adapter),  # pyright: ignore[reportArgumentType]
        tokenizer=AutoTokenizer.from_pretrained(directory),
        batch_size=3,
        device="cpu",
    )
    pairs = [*PAIRS, *likeliest_pairs(lm)]
    scores, whole, texts = ask(lm, pairs)
    assert len({round(score, 3) for score, _ in scores}) > len(scores) // 2
    assert any(greedy for _, greedy in scores)
    assert any(len(text) > 3 for text in texts)
    for world_size in (1, 2):
        mine, *others = ranks.run(world_size, answer, directory, adapter, pairs)
        assert others == [None] * (world_size - 1)
        # fp32 everywhere: only the order of sums differs.
        assert [score for score, _ in mine[0]] == pytest.approx([s for s, _ in scores], rel=1e-5)
        assert [greedy for _, greedy in mine[0]] == [greedy for _, greedy in scores]
        assert mine[1] == pytest.approx(whole, rel=1e-5)
        assert mine[2] == texts
    stock = run_stock(lm, tasks)
    ranks.run(2, run, directory, adapter, tasks, tmp_path)
    record = json.loads((RunFiles(tmp_path).evals / "after-training.json").read_text())
    found = record["models"]["trained"]["tasks"]
    assert list(found) == list(NAMES)
    for name, mine in found.items():
        metrics = {key: value for key, value in stock[name].items() if key in mine}
        assert len(metrics) == len(mine) > 1
        assert mine == pytest.approx(metrics, rel=1e-5)


def test_an_error_on_rank_0_lets_the_others_go(ranks: RankPool, tmp_path: Path) -> None:
    directory = save_tiny_llama(tmp_path / "base")
    save_tokenizer(directory)
    assert ranks.run(2, fail_on_rank_0, directory) == ["no task", "served"]


def fail_on_rank_0(directory: Path) -> str:
    """Returns what became of this rank where the tasks cannot be loaded.

    Ranks: all (collective).
    """

    def fail(*_arguments: Any) -> None:
        raise ValueError("no task")

    assembled = assemble(directory, **SECTIONS)
    tokenizer = AutoTokenizer.from_pretrained(directory)
    subject = Subject(tiny_recipe(**SECTIONS), assembled, tokenizer, directory, CPU)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fsdpq.worker.evaluate.harness.load_tasks", fail)
        try:
            run_tasks(subject, NoSink())
        except ValueError as error:
            return str(error)
    return "served"
