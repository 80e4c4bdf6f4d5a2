"""Makes a tiny random model of a given architecture family, with a tokenizer, for smoke runs.

Nothing is downloaded: the configuration is the family's default in transformers with sizes cut, the
weights are random, and the tokenizer is trained on a few sentences.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from fsdpq.data.text.plain_texts import ALPACA_INPUT, ALPACA_NO_INPUT, QNA
from fsdpq.errors import CheckpointError
from fsdpq.rows.formats import GUANACO_ASSISTANT, GUANACO_HUMAN

END_OF_TURN = "<|im_end|>"
SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", END_OF_TURN)
CHAT_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TEXTS = (
    ALPACA_INPUT, ALPACA_NO_INPUT, QNA, f"{GUANACO_HUMAN} {GUANACO_ASSISTANT}",
    "What is the capital of France? It is Paris. Add the numbers. What is 1 plus 2? It is 3.",
    "one two three four five six seven eight nine ten red green blue white black",
)  # fmt: skip
"""What the tokenizer is trained on: the texts of prompts become few tokens."""


def build_smoke_model(spec_path: Path, directory: Path) -> None:
    """Writes config, weights and tokenizer into ``directory``.

    Args:
        spec_path: JSON with ``model_type``; ``config``: sizes by transformers' names, those that
            the family does not have are left out; ``base_config``: fields of a ``config.json`` to
            start from, or null; ``chat_template``: whether the tokenizer has one; ``tokens``: that
            it has beside its own; ``seed``.
        directory: exists; files in it are replaced.

    Raises:
        CheckpointError: transformers does not know the family, or cannot build it that small.
    """
    spec = json.loads(spec_path.read_text(encoding="utf-8"))
    tokenizer = _build_tokenizer(chat=spec["chat_template"], more_tokens=spec["tokens"])
    torch.manual_seed(spec["seed"])
    try:
        config = _build_config(spec, vocab_size=len(tokenizer))
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"transformers cannot build a tiny `{spec['model_type']}`: {error}",
            hint="smoke another recipe of the same method, and tell us about this one",
        ) from error
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)


def _build_config(spec: dict[str, Any], *, vocab_size: int) -> Any:
    family = spec["model_type"]
    base: dict[str, Any] = spec["base_config"] or {}
    for field in ("layer_types", "quantization_config", "architectures", "auto_map", "model_type"):
        base.pop(field, None)
    default = AutoConfig.for_model(family)
    tokens = {"vocab_size": vocab_size, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    sizes = {
        field: value
        for field, value in (spec["config"] | tokens).items()
        if hasattr(default, field) and not _is_derived(default, field)
    }
    return AutoConfig.for_model(family, **(base | sizes))


def _is_derived(config: Any, field: str) -> bool:
    """Whether the family computes the field from others (Falcon's ``head_dim``)."""
    attribute = getattr(type(config), field, None)
    return isinstance(attribute, property) and attribute.fset is None


def _build_tokenizer(*, chat: bool, more_tokens: list[str]) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=768,
        special_tokens=list(dict.fromkeys([*SPECIAL_TOKENS, *more_tokens])),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXTS, trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=END_OF_TURN, pad_token=SPECIAL_TOKENS[0]
    )
    if chat:
        fast.chat_template = CHAT_TEMPLATE
    return fast
