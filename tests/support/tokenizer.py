"""Tiny tokenizers of three kinds, trained on the spot; byte-level BPE has a chat template."""

from __future__ import annotations

from pathlib import Path

from tokenizers import (
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SPECIAL_TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
TEXTS = [
    "What is the capital of France? The capital of France is Paris.",
    "user assistant system hello there general greetings how are you I am fine",
    "red green blue one two three four five six seven eight nine ten",
]


def build_tokenizer(
    *,
    template: str = CHATML,
    texts: list[str] | None = None,
    vocab_size: int = 331,
    split: bool = True,
) -> PreTrainedTokenizerBase:
    """Returns a tokenizer; without ``split`` merges may cross words and turns."""
    tokenizer = Tokenizer(models.BPE())
    if split:
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts or TEXTS, trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|im_end|>"
    )
    fast.chat_template = template
    return fast


def save_tokenizer(directory: Path) -> Path:
    """Saves the ChatML tokenizer beside a tiny model."""
    build_tokenizer().save_pretrained(directory)
    return directory


def build_metaspace_tokenizer(texts: list[str] | None = None) -> PreTrainedTokenizerBase:
    """Returns a sentencepiece-like Unigram tokenizer that adds ``<s>``, without chat template.

    Every word of ``texts`` is one token, with and without the space before it.
    """
    words = " ".join(texts or TEXTS).split()
    likely = {piece for word in words for piece in (word, f"▁{word}")}
    letters = {letter for text in [*words, _LETTERS, "▁"] for letter in text} - likely
    pieces = [("<unk>", 0.0), ("<s>", 0.0), ("</s>", 0.0)]
    pieces += [(piece, -1.0) for piece in sorted(likely)]
    pieces += [(letter, -9.0) for letter in sorted(letters)]
    tokenizer = Tokenizer(models.Unigram(pieces, unk_id=0, byte_fallback=False))
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="first")
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", tokenizer.token_to_id("<s>"))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


def build_wordpiece_tokenizer(texts: list[str] | None = None) -> PreTrainedTokenizerBase:
    """Returns a WordPiece tokenizer that lowercases and drops white space, no chat template."""
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    trainer = trainers.WordPieceTrainer(
        vocab_size=400, special_tokens=["[UNK]", "[EOS]"], show_progress=False
    )
    tokenizer.train_from_iterator((texts or TEXTS) + [_LETTERS], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]", eos_token="[EOS]")


_LETTERS = " ".join("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789.,:#?!\n")
