"""Answers prompts with the model as it is now."""

from __future__ import annotations

import torch
from transformers import PreTrainedTokenizerBase
from transformers.cache_utils import DynamicCache

from fsdpq.data.templates.choose import choose_template
from fsdpq.data.text.tokenize import RowTokenizer
from fsdpq.protocols import MetricSink
from fsdpq.recipe.root import Recipe
from fsdpq.recipe.sections.output import MetricsOptions
from fsdpq.rows.source import DataSources
from fsdpq.training.sample import generate_ids
from fsdpq.worker.assemble import Assembled


def build_asker(
    recipe: Recipe, sources: DataSources | None, tokenizer: PreTrainedTokenizerBase
) -> RowTokenizer:
    """Returns what asks prompts as the rows of the run's first source do.

    Args:
        recipe: of the run.
        sources: its rows, as the launcher found them.
        tokenizer: of the base model.
    """
    if sources is None:
        raise RuntimeError("this run directory names no data")
    options = recipe.data
    template = choose_template(tokenizer, options.chat_template, sources.chat_template)
    return RowTokenizer(tokenizer, options, sources.train[0].format, template=template)


class Answerer:
    """Answers prompts, asked as the training rows are.

    Args:
        assembled: the model.
        tokenizer: of the base model.
        asks: renders prompts as the training rows.
        stop_ids: tokens that end an answer, beside those that end one of the rows.
        device: this rank's device.
    """

    def __init__(
        self,
        assembled: Assembled,
        tokenizer: PreTrainedTokenizerBase,
        *,
        asks: RowTokenizer,
        stop_ids: set[int],
        device: torch.device,
    ) -> None:
        self.model = assembled.model
        self.tokenizer = tokenizer
        self.asks = asks
        self.stop_ids = stop_ids | asks.end_ids()
        self.device = device

    def answer(self, prompt: str, *, max_new_tokens: int, temperature: float = 0.0) -> str:
        """Returns the answer to one prompt.

        Ranks: all (collective).
        """
        was_training = self.model.training
        self.model.eval()
        answer = generate_ids(
            self.model.next_token_logits,
            self.asks.prompt_ids(prompt),
            cache=DynamicCache(config=self.model.hf.config),
            max_new_tokens=max_new_tokens,
            stop_ids=self.stop_ids,
            device=self.device,
            temperature=temperature,
        )
        self.model.train(was_training)
        return str(self.tokenizer.decode(answer, skip_special_tokens=True)).strip()

    def write_samples(self, options: MetricsOptions, when: str, events: MetricSink) -> None:
        """Answers the recipe's prompts and tells the screen.

        Ranks: all (collective).
        """
        for prompt in options.sample_prompts:
            answer = self.answer(prompt, max_new_tokens=options.sample_max_new_tokens)
            events.write({"event": "sample", "when": when, "prompt": prompt, "answer": answer})
