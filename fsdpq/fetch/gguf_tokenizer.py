"""Builds ``tokenizer.json`` and ``tokenizer_config.json`` from the vocabulary inside a GGUF.

``tokenizer.ggml.pre`` names the pre-tokenizer. ``smollm`` splits digits one by one before the
byte-level BPE; without that about a quarter of ordinary texts tokenise differently, and the model's
own loss gets worse. ``tokenizer_class`` must stay the plain fast tokenizer: transformers 5 rebuilds
the pre-tokenizer of a named class (GPT2Tokenizer) and would lose the digits.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fsdpq.errors import FetchError

CONTROL_TOKEN_TYPE = 3
"""``gguf.TokenType.CONTROL``: a special token."""

CHATML_TEMPLATE = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face"
    "<|im_end|>\n' }}{% endif %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + "
    "'<|im_end|>' + '\n'}}{% endfor %}{% if add_generation_prompt %}"
    "{{ '<|im_start|>assistant\n' }}{% endif %}"
)
"""SmolLM2's chat template, for a GGUF that carries none."""


@dataclass(frozen=True)
class SpecialIds:
    """Token ids with a role; ``pad`` may equal ``eos``."""

    bos: int
    eos: int
    pad: int
    unk: int

    @classmethod
    def from_fields(cls, fields: dict[str, Any]) -> SpecialIds:
        """Returns the ids that the GGUF metadata ``fields`` name; pad falls back to eos."""
        eos = int(fields.get("tokenizer.ggml.eos_token_id", 2))
        return cls(
            bos=int(fields.get("tokenizer.ggml.bos_token_id", 1)),
            eos=eos,
            pad=int(fields.get("tokenizer.ggml.padding_token_id", eos)),
            unk=int(fields.get("tokenizer.ggml.unknown_token_id", 0)),
        )


def write_tokenizer(
    fields: dict[str, Any], ids: SpecialIds, *, context_length: int, directory: Path
) -> None:
    """Writes ``tokenizer.json`` and ``tokenizer_config.json`` to ``directory``.

    Args:
        fields: GGUF metadata, key -> plain value.
        ids: the special tokens.
        context_length: longest sequence in tokens.
        directory: an existing directory.

    Raises:
        FetchError: the GGUF's tokenizer is of another kind than byte-level BPE with ``smollm``.
    """
    model, pre = fields.get("tokenizer.ggml.model"), fields.get("tokenizer.ggml.pre")
    if (model, pre) != ("gpt2", "smollm"):
        raise FetchError(
            f"cannot convert the GGUF's tokenizer `{model}` with pre-tokenizer `{pre}`",
            hint="use a safetensors checkpoint with its own tokenizer.json",
        )
    tokens: list[str] = fields["tokenizer.ggml.tokens"]
    types: list[int] = fields["tokenizer.ggml.token_type"]
    special = [t for t, kind in zip(tokens, types, strict=True) if kind == CONTROL_TOKEN_TYPE]
    tokenizer = _build_tokenizer(tokens, fields["tokenizer.ggml.merges"], special)
    tokenizer.save(str(directory / "tokenizer.json"), pretty=False)
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "add_prefix_space": False,
        "bos_token": tokens[ids.bos],
        "eos_token": tokens[ids.eos],
        "pad_token": tokens[ids.pad],
        "unk_token": tokens[ids.unk],
        "chat_template": fields.get("tokenizer.chat_template", CHATML_TEMPLATE),
        "clean_up_tokenization_spaces": False,
        "model_max_length": context_length,
    }
    path = directory / "tokenizer_config.json"
    path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _build_tokenizer(tokens: list[str], merges: list[str], special: list[str]) -> Any:
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    pairs = [tuple(merge.split(" ")) for merge in merges]
    vocab = {token: index for index, token in enumerate(tokens)}
    tokenizer: Any = Tokenizer(models.BPE(vocab=vocab, merges=pairs))  # pyright: ignore
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(
        [AddedToken(token, special=True, normalized=False) for token in special]
    )
    return tokenizer
