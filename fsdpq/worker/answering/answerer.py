"""Answers messages with the model as it is now."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from transformers import PreTrainedTokenizerBase
from transformers.cache_utils import DynamicCache

from fsdpq.data.templates.choose import choose_template
from fsdpq.data.templates.jinja_text import Message
from fsdpq.data.text.token_texts import TokenTexts
from fsdpq.data.text.tokenize import RowTokenizer
from fsdpq.protocols import MetricSink
from fsdpq.recipe.root import Recipe
from fsdpq.recipe.sections.output import MetricsOptions
from fsdpq.rows.source import DataSources
from fsdpq.training.sample import Sampling, generate_ids, iterate_ids
from fsdpq.worker.answering.prefix_cache import PrefixCache
from fsdpq.worker.assemble import Assembled


def build_asker(
    recipe: Recipe, sources: DataSources | None, tokenizer: PreTrainedTokenizerBase
) -> RowTokenizer:
    """Returns what asks prompts as the rows of the run's first source do.

    Args:
        recipe: of the run.
        sources: its rows, as the launcher found them; None where rows are made up.
        tokenizer: of the base model.
    """
    options = recipe.data
    file_text = None if sources is None else sources.chat_template
    template = choose_template(tokenizer, options.chat_template, file_text)
    format_name = options.format if sources is None else sources.train[0].format
    return RowTokenizer(tokenizer, options, format_name, template=template)


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

    def answer(self, prompt: str, *, max_new_tokens: int) -> str:
        """Returns the likeliest answer to one prompt.

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


@dataclass(frozen=True)
class Answer:
    """An answer and what it took.

    Attributes:
        answer: its text, stripped.
        stop: why it ends: ``end`` (the model ended it), ``length`` (``max_new_tokens``),
            ``context`` (the model's context is full) or ``stopped`` (it was told to).
        num_tokens: tokens that were chosen, the one that ends it included.
        num_prompt_tokens: tokens of the conversation before it.
        num_cached_tokens: those of them whose keys and values were there already.
        prompt_s: seconds until the first token.
        seconds: from the question to the end.
        tokens_per_s: of the tokens after the first one; of a single token, of the whole.
    """

    answer: str
    stop: str
    num_tokens: int
    num_prompt_tokens: int
    num_cached_tokens: int
    prompt_s: float
    seconds: float
    tokens_per_s: float


class ChatAnswerer(Answerer):
    """Answers conversations in one process, token by token.

    Args:
        assembled: the model.
        tokenizer: of the base model.
        asks: renders conversations as the training rows.
        stop_ids: tokens that end an answer, beside those that end one of the rows.
        device: of the model.
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
        super().__init__(assembled, tokenizer, asks=asks, stop_ids=stop_ids, device=device)
        config = self.model.hf.config
        self.context: int | None = getattr(
            config.get_text_config(), "max_position_embeddings", None
        )
        """Tokens that the model was made for, None where its config does not say."""
        self.prefix = PrefixCache(config)
        self.model.eval()

    def fit(
        self, messages: Sequence[Message], max_new_tokens: int
    ) -> tuple[list[int], list[Message]]:
        """Returns the tokens of a conversation, without its oldest turns where it is too long.

        A system prompt and the last message stay; room is left for the answer, or half of the
        context where it may take more.

        Returns:
            The token ids, and the messages that were left out.

        Raises:
            TemplateError: the conversation cannot be rendered.
        """
        ids = self.asks.message_ids(messages)
        if self.context is None:
            return ids, []
        room = self.context - min(max_new_tokens, self.context // 2)
        num_system = int(messages[0]["role"] == "system")
        first = num_system
        while len(ids) > room and first < len(messages) - 1:
            first += 1
            while first < len(messages) - 1 and messages[first]["role"] != "user":
                first += 1
            ids = self.asks.message_ids([*messages[:num_system], *messages[first:]])
        return ids, list(messages[num_system:first])

    def reply(
        self,
        ids: list[int],
        *,
        max_new_tokens: int,
        sampling: Sampling,
        on_text: Callable[[str], None],
        is_stopped: Callable[[], bool],
    ) -> Answer:
        """Returns the answer to ``ids``, of `fit` and fewer than the context has.

        Tells ``on_text`` what comes with a token, maybe an empty text; asks ``is_stopped`` then.
        """
        room = max_new_tokens if self.context is None else self.context - len(ids)
        num_cached = self.prefix.begin(ids)
        texts, chosen, stop = TokenTexts(self.tokenizer), list[int](), ""
        started = first_at = time.monotonic()
        tokens = iterate_ids(
            self.model.next_token_logits, ids, cache=self.prefix.cache, num_cached=num_cached,
            max_new_tokens=min(room, max_new_tokens), stop_ids=self.stop_ids, device=self.device,
            sampling=sampling,
        )  # fmt: skip
        with self.prefix.filled_by(ids, chosen):
            for token in tokens:
                first_at = first_at if chosen else time.monotonic()
                chosen.append(token)
                if token not in self.stop_ids:
                    on_text(texts.add(token))
                stop = "end" if token in self.stop_ids else "stopped" if is_stopped() else ""
                if stop:
                    break
        on_text(texts.finish())
        seconds = time.monotonic() - started
        return Answer(
            answer=texts.text,
            stop=stop or ("length" if max_new_tokens <= room else "context"),
            num_tokens=len(chosen),
            num_prompt_tokens=len(ids),
            num_cached_tokens=num_cached,
            prompt_s=first_at - started,
            seconds=seconds,
            tokens_per_s=_speed(len(chosen), seconds, first_at - started),
        )


def _speed(num_tokens: int, seconds: float, prompt_s: float) -> float:
    if num_tokens > 1:
        return (num_tokens - 1) / (seconds - prompt_s)
    return num_tokens / seconds
