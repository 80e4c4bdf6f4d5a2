"""Text of tokens that come one by one is the text of all of them."""

from __future__ import annotations

import random

import pytest
from support.templates import build_byte_tokenizer
from support.tokenizer import (
    build_metaspace_tokenizer,
    build_tokenizer,
    build_wordpiece_tokenizer,
)
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from fsdpq.data.text.token_texts import MAX_HELD, TokenTexts

TEXTS = [
    "the capital of France is Paris.",
    "Žluťoučký kůň 😀👩‍🚀 日本語 ñandú \n\n  indented\n",
    "  hello there  general   greetings  ",
]


def build_fallback_tokenizer() -> PreTrainedTokenizerBase:
    """Returns a tokenizer like Llama 2's: pieces with ``▁``, and bytes for what has no piece."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    pieces += ["▁", "▁the", "▁cat", "the", "cat"]
    model = models.BPE(
        vocab={p: i for i, p in enumerate(pieces)}, merges=[], unk_token="<unk>", byte_fallback=True
    )
    tokenizer = Tokenizer(model)
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>")


def stream(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> list[str]:
    texts = TokenTexts(tokenizer)
    pieces = [texts.add(token) for token in ids] + [texts.finish()]
    assert "".join(pieces) == texts.text
    return pieces


def whole(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> str:
    text = tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    return str(text).strip()


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize(
    "build", [build_byte_tokenizer, build_tokenizer, build_metaspace_tokenizer]
)
def test_pieces_together_are_the_answer(build, text: str) -> None:
    tokenizer = build()
    ids = tokenizer.encode(text, add_special_tokens=False)
    pieces = stream(tokenizer, ids)
    assert "".join(pieces) == whole(tokenizer, ids)
    assert sum(bool(piece) for piece in pieces) > 3, "it comes in pieces"


def test_no_piece_has_half_a_character() -> None:
    tokenizer = build_byte_tokenizer()  # a token is a byte
    ids = tokenizer.encode("a😀é日", add_special_tokens=False)
    assert len(ids) == 1 + 4 + 2 + 3
    assert stream(tokenizer, ids) == ["a", "", "", "", "😀", "", "é", "", "", "日", ""]


def test_spaces_of_sentencepiece_are_kept_and_bytes_wait_for_their_character() -> None:
    tokenizer = build_fallback_tokenizer()
    vocab = tokenizer.get_vocab()
    euro = [vocab[f"<0x{byte:02X}>"] for byte in "€".encode()]
    ids = [vocab["▁the"], vocab["▁cat"], vocab["▁"], *euro, vocab["▁the"], vocab["cat"]]
    assert stream(tokenizer, ids) == ["the", " cat", "", "", "", " €", " the", "cat", ""]


@pytest.mark.parametrize("build", [build_tokenizer, build_metaspace_tokenizer])
def test_any_tokens_give_the_text_of_all(build) -> None:
    tokenizer = build()
    draw = random.Random(3)
    words = [i for i in range(tokenizer.vocab_size) if "\ufffd" not in whole(tokenizer, [i])]
    for _ in range(50):
        ids = draw.choices(words, k=30)
        assert "".join(stream(tokenizer, ids)) == whole(tokenizer, ids)


def test_lowercasing_word_pieces_join() -> None:
    tokenizer = build_wordpiece_tokenizer()
    ids = tokenizer.encode("greetings seven you", add_special_tokens=False)
    assert "".join(stream(tokenizer, ids)) == whole(tokenizer, ids) == "greetings seven you"


def test_white_space_at_the_ends_and_special_tokens_are_left_out() -> None:
    tokenizer = build_tokenizer()
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    ids = [*tokenizer.encode(" \n hello", add_special_tokens=False), end]
    ids += tokenizer.encode(" there \n\n", add_special_tokens=False)
    assert "".join(stream(tokenizer, ids)) == "hello there"


def test_broken_bytes_do_not_hold_the_rest_back() -> None:
    tokenizer = build_byte_tokenizer()
    start = tokenizer.encode("€", add_special_tokens=False)[:1]
    pieces = stream(tokenizer, start * (MAX_HELD + 4))
    assert "\ufffd" in "".join(pieces[:-1])
    tail = stream(tokenizer, [*start, *tokenizer.encode("ok", add_special_tokens=False)])
    assert "".join(tail) == "\ufffdok"
