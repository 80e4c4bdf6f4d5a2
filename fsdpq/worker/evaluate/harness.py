"""lm-evaluation-harness over a sharded model; the only module that imports ``lm_eval``.

What is a token of the context and what of the answer, what is cut where a text is too long, and how
an answer ends are the harness's own rules: its code is called for them, as its model for
transformers (``lm_eval.models.huggingface.HFLM``) calls it, and a test compares the two.
https://github.com/EleutherAI/lm-evaluation-harness
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from lm_eval import utils
from lm_eval.api.model import TemplateLM
from lm_eval.evaluator import simple_evaluate
from lm_eval.models.utils import (
    _add_special_kwargs,  # pyright: ignore[reportPrivateUsage]
    handle_stop_sequences,
    has_bos_prefix,
    normalize_gen_kwargs,
    postprocess_generated_text,
    resolve_max_length,
)
from lm_eval.tasks import TaskManager
from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from fsdpq.errors import Problem, RecipeError
from fsdpq.recipe.sections.evaluation import EvaluationOptions
from fsdpq.worker.evaluate.answers import SAMPLING, Scored
from fsdpq.worker.evaluate.waves import Waves

MAX_GENERATED = 256
"""Longest answer of a task that does not say, as in the harness."""

_ALLOWED = {*SAMPLING, "do_sample"}


@dataclass(frozen=True)
class LoadedTasks:
    """Tasks whose questions are on this machine.

    Attributes:
        manager: knows the tasks.
        names: those that were asked for.
        num_questions: single task -> its questions.
    """

    manager: TaskManager
    names: tuple[str, ...]
    num_questions: dict[str, int]


def load_tasks(names: Sequence[str], include_path: Path | None = None) -> LoadedTasks:
    """Loads tasks by their names, and with them their questions.

    Args:
        names: of tasks, groups or tags; never a path.
        include_path: folder of more tasks, whose code runs; None for none.

    Raises:
        RecipeError: the harness has no such task, or one cannot be loaded.
    """
    manager = _find_manager(names, include_path)
    known = set(manager.all_tasks)
    unknown = [name for name in names if name not in known]
    if unknown:
        raise RecipeError([_unknown(name, known) for name in unknown])
    try:
        tasks: dict[str, Any] = manager.load(list(names))["tasks"]
    except Exception as error:  # whatever a task's file, its data or a download may raise
        message = f"the tasks {', '.join(names)} cannot be loaded: {_one_line(error)}"
        hint = "check the network, and that the task's data set is still on the hub"
        raise RecipeError([Problem(message, "evaluation.tasks", None, hint)]) from error
    unsafe = [name for name, task in tasks.items() if getattr(task, "UNSAFE_CODE", False)]
    if unsafe:
        message = f"the task `{unsafe[0]}` runs code that the model writes"
        hint = "run it with lm_eval itself, in a container, over the exported model"
        raise RecipeError([Problem(message, "evaluation.tasks", None, hint)])
    counts = {name: len(task.eval_docs) for name, task in tasks.items()}
    return LoadedTasks(manager, tuple(names), counts)


def _find_manager(names: Sequence[str], include_path: Path | None) -> TaskManager:
    """Returns what knows the tasks: the folder's own ones, else the harness's too.

    The harness reads some ten thousand files to know its own, which takes seconds.
    """
    if include_path is None:
        return TaskManager()
    local = TaskManager(include_path=str(include_path), include_defaults=False)
    if {*names} <= {*local.all_subtasks}:
        return local
    return TaskManager(include_path=str(include_path))


def _unknown(name: str, known: set[str]) -> Problem:
    import difflib

    close = difflib.get_close_matches(name, known, n=1)
    hint = f"did you mean `{close[0]}`?" if close else "`lm_eval ls tasks` lists the tasks"
    message = f"lm-evaluation-harness has no task `{name}`"
    return Problem(message, "evaluation.tasks", None, hint)


def _one_line(error: Exception) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:300]}"


def evaluate_tasks(
    model: HarnessModel, loaded: LoadedTasks, options: EvaluationOptions
) -> dict[str, dict[str, float]]:
    """Returns the metrics of each task and group, as the harness names them.

    Ranks: 0 only, while the others serve its waves.
    """
    logging.getLogger("lm_eval").setLevel(logging.WARNING)
    results: Any = simple_evaluate(
        model=model,
        tasks=list(loaded.names),
        num_fewshot=options.num_fewshot,
        limit=options.limit,
        apply_chat_template=options.apply_chat_template,
        task_manager=loaded.manager,
        log_samples=False,
    )
    if results is None:
        raise RuntimeError("the harness gave no results")
    return {task: _numbers(metrics) for task, metrics in results["results"].items()}


def _numbers(metrics: dict[str, Any]) -> dict[str, float]:
    """Returns what is a metric or its error: names, counts and ``N/A`` are none."""
    return {
        key: float(value)
        for key, value in metrics.items()
        if "," in key and isinstance(value, int | float | np.number)
    }


class HarnessModel(TemplateLM):
    """A sharded model as the harness sees it, on rank 0.

    Args:
        waves: computes on all ranks: ``score`` for `Scored` rows, ``continue`` for prompts.
        tokenizer: of the base.
        config: of the transformers model.
    """

    def __init__(
        self, waves: Waves, tokenizer: PreTrainedTokenizerBase, config: PreTrainedConfig
    ) -> None:
        super().__init__()
        self.waves = waves
        self.tokenizer: Any = tokenizer
        self.max_length = resolve_max_length(config, tokenizer)

    @property
    def eot_token_id(self) -> int:
        """The token that ends a text."""
        return int(self.tokenizer.eos_token_id)

    @property
    def prefix_token_id(self) -> int:
        """What stands before a text without context."""
        bos = self.tokenizer.bos_token_id
        return int(bos) if bos is not None else self.eot_token_id

    @property
    def tokenizer_name(self) -> str:
        """Part of the key of the harness's cache of requests."""
        return str(self.tokenizer.name_or_path).replace("/", "__")

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **_options: Any
    ) -> list[int]:
        """Returns the token ids of a text; one that begins with the begin mark gets no second."""
        special = _add_special_kwargs(add_special_tokens)
        prefix = self.tokenizer.decode(self.prefix_token_id)
        if add_special_tokens is None and has_bos_prefix(string, prefix):
            special["add_special_tokens"] = False
        return list(self.tokenizer.encode(string, **special))

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """Returns a conversation as one text."""
        return str(
            self.tokenizer.apply_chat_template(
                chat_history,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=not add_generation_prompt,
            )
        )

    def _loglikelihood_tokens(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, requests: Sequence[tuple[Any, list[int], list[int]]], **_options: Any
    ) -> list[tuple[float, bool]]:
        """Returns the log-probability of each answer after its context, and whether it is greedy.

        Requests that read the same tokens are one row: the choices of a question that are one token
        each cost one.
        """
        rows: dict[tuple[int, ...], dict[tuple[int, ...], None]] = {}
        keys: list[tuple[tuple[int, ...], tuple[int, ...]]] = []
        for _, context, ending in requests:
            # Cut at the left where it is too long; the last token is never read.
            read = tuple((context + ending)[-(self.max_length + 1) :][:-1])
            if len(ending) > len(read):
                raise _too_long(len(ending), self.max_length)
            rows.setdefault(read, {})[tuple(ending)] = None
            keys.append((read, tuple(ending)))
        order = sorted(rows, key=lambda read: (-len(read), read))
        asked = [Scored(np.array(read, dtype=np.int32), tuple(rows[read])) for read in order]
        found = self.waves.ask("score", asked)
        scores = {
            (read, ending): score
            for read, answers in zip(order, found, strict=True)
            for ending, score in zip(rows[read], answers, strict=True)
        }
        return [scores[key] for key in keys]

    def loglikelihood_rolling(
        self,
        requests: list[Any],
        disable_tqdm: bool = False,  # noqa: ARG002 - the harness's name
    ) -> list[float]:
        """Returns the log-probability of each whole text, cut into windows as the harness does."""
        windows: list[tuple[None, list[int], list[int]]] = []
        counts: list[int] = []
        for request in requests:
            cut = [
                utils.make_disjoint_window(pair)
                for pair in utils.get_rolling_token_windows(
                    token_list=self.tok_encode(request.args[0]),
                    prefix_token=self.prefix_token_id,
                    max_seq_len=self.max_length,
                    context_len=1,
                )
            ]
            windows += [(None, *pair) for pair in cut]
            counts.append(len(cut))
        scores = iter(self._loglikelihood_tokens(windows))
        return [sum(next(scores)[0] for _ in range(count)) for count in counts]

    def generate_until(
        self,
        requests: list[Any],
        disable_tqdm: bool = False,  # noqa: ARG002 - the harness's name
    ) -> list[str]:
        """Returns what follows each context, up to the first of its stops."""
        found: dict[int, str] = {}
        groups: dict[str, list[int]] = {}
        for index, request in enumerate(requests):
            groups.setdefault(repr(request.args[1]), []).append(index)
        for members in groups.values():
            settings: Any = normalize_gen_kwargs(requests[members[0]].args[1], MAX_GENERATED)
            contexts = [requests[index].args[0] for index in members]
            texts = self._continue(contexts, settings)
            found |= dict(zip(members, texts, strict=True))
        return [found[index] for index in range(len(requests))]

    def _continue(self, contexts: list[str], settings: dict[str, Any]) -> list[str]:
        eos = self.tokenizer.decode(self.eot_token_id, skip_special_tokens=False)
        stops = handle_stop_sequences(settings.pop("until", None), eos=eos)
        max_new_tokens = int(settings.pop("max_gen_toks"))
        room = self.max_length - max_new_tokens
        if room <= 0:
            raise _too_long(max_new_tokens, self.max_length)
        sampling = _sampling(settings)
        prompts = [
            (self.tok_encode(context) or [self.prefix_token_id])[-room:] for context in contexts
        ]
        order = sorted(range(len(prompts)), key=lambda index: -len(prompts[index]))
        options = {"max_new_tokens": max_new_tokens, "stops": stops, "sampling": sampling}
        answers = self.waves.ask("continue", [prompts[index] for index in order], options)
        texts = [""] * len(prompts)
        for index, answer in zip(order, answers, strict=True):
            text = str(self.tokenizer.decode(answer, skip_special_tokens=True))
            texts[index] = postprocess_generated_text(text, stops, None)
        return texts


def _sampling(settings: dict[str, Any]) -> dict[str, float]:
    """Returns how tokens are drawn; empty for the likeliest.

    Raises:
        RecipeError: a task asks for another way of generating.
    """
    unknown = sorted({*settings} - _ALLOWED)
    if unknown:
        message = f"a task generates with `{unknown[0]}`, which fsdpq does not do"
        hint = "leave the task out, or run it with lm_eval over the exported model"
        raise RecipeError([Problem(message, "evaluation.tasks", None, hint)])
    if not settings.get("do_sample"):
        return {}
    return {name: float(settings[name]) for name in SAMPLING if settings.get(name) is not None} | {
        "temperature": float(settings.get("temperature") or 1.0)
    }


def _too_long(num_tokens: int, max_length: int) -> RecipeError:
    message = f"a task has an answer of {num_tokens} tokens, and the model's context is "
    message += f"{max_length}"
    hint = "leave the task out, or use a model of a longer context"
    return RecipeError([Problem(message, "evaluation.tasks", None, hint)])
