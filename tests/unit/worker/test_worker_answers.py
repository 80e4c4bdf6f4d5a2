"""What answers in one process: the same tokens as stock libraries, and no more work than needed."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from support import reference
from support.families import FAMILIES, MORE_FAMILIES, ONLY_EAGER
from support.tiny import save_tiny_llama, tiny_recipe
from support.tokenizer import build_tokenizer
from torch import Tensor, nn
from transformers.cache_utils import Cache, DynamicCache

from fsdpq.data.templates.choose import choose_template
from fsdpq.data.text.tokenize import RowTokenizer
from fsdpq.errors import UsageError
from fsdpq.recipe.sections.data import DataOptions
from fsdpq.training.sample import GREEDY
from fsdpq.worker.answering import answers
from fsdpq.worker.answering import model as answering_model
from fsdpq.worker.answering.answerer import Answer, ChatAnswerer
from fsdpq.worker.answering.model import (
    TrainedSwitch,
    answering_recipe,
    assemble_for_answers,
    cast_trained,
    keep_matrices,
)
from fsdpq.worker.assemble import Assembled, Inputs
from fsdpq.worker.export.formats import save_peft

CPU = torch.device("cpu")
NONE = {"kind": "none"}
WINDOWED = {"gemma2": 4, "mistral": 4, "gpt_oss": 4}
LINEAR = "qwen3_next"


def assemble(directory: Path, **sections: dict[str, Any]) -> Assembled:
    recipe = answering_recipe(tiny_recipe(**sections), "cpu")
    inputs = Inputs(directory, None, None)
    return assemble_for_answers(recipe, inputs, device=CPU, report_load=lambda _d, _t: None)


def train_a_bit(assembled: Assembled) -> None:
    """Gives what is trained other values, so that they matter."""
    generator = torch.Generator().manual_seed(5)
    for parameter in assembled.trainable:
        noise = torch.randn(parameter.shape, generator=generator) * 0.1
        parameter.data += noise.to(parameter.dtype)


def make_answerer(assembled: Assembled, *, template: str | None = "chatml") -> ChatAnswerer:
    tokenizer = build_tokenizer()
    own = choose_template(tokenizer, None)
    asks = RowTokenizer(tokenizer, DataOptions(), "messages", template=own if template else None)
    answerer = ChatAnswerer(assembled, tokenizer, asks=asks, stop_ids=set(), device=CPU)
    answerer.stop_ids = set()
    return answerer


def reply(answerer: ChatAnswerer, ids: list[int], num_tokens: int = 6) -> tuple[Answer, list[int]]:
    """Returns an answer, and its tokens but the last."""
    answer = answerer.reply(
        ids, max_new_tokens=num_tokens, sampling=GREEDY, on_text=lambda _text: None,
        is_stopped=lambda: False,
    )  # fmt: skip
    return answer, answerer.prefix._ids[len(ids) :]


@contextmanager
def counted(answerer: ChatAnswerer) -> Iterator[list[int]]:
    """Counts the tokens of every forward."""
    counts: list[int] = []
    forward: Callable[[Tensor, Cache], Tensor] = answerer.model.next_token_logits

    def next_token_logits(input_ids: Tensor, cache: Cache) -> Tensor:
        counts.append(input_ids.shape[1])
        return forward(input_ids, cache)

    answerer.model.next_token_logits = next_token_logits  # pyright: ignore
    yield counts
    answerer.model.next_token_logits = forward  # pyright: ignore


def stock_tokens(model: nn.Module, ids: list[int], num_tokens: int = 6) -> list[int]:
    output = model.generate(  # pyright: ignore
        input_ids=torch.tensor([ids]), max_new_tokens=num_tokens, do_sample=False, eos_token_id=None
    )
    return output[0, len(ids) : -1].tolist()


@pytest.mark.parametrize("family", ["llama", "gemma2", "mistral", "gpt_oss", "qwen3_moe", LINEAR])
def test_turns_are_answered_as_transformers_and_peft_do_and_computed_once(
    tmp_path: Path, family: str
) -> None:
    changes = (FAMILIES | MORE_FAMILIES)[family]
    directory = save_tiny_llama(tmp_path / "model", tied=False, family=family, **changes)
    target = {"target_modules": ["q_proj", "v_proj"]}
    attention = {"attn_implementation": "eager" if family in ONLY_EAGER else "sdpa"}
    sections = {"quantization": NONE, "adapter": target, "model": attention}
    assembled = assemble(directory, **sections)
    train_a_bit(assembled)
    save_peft(
        tiny_recipe(**sections), Inputs(directory, None, None), assembled, tmp_path / "adapter"
    )
    base = reference.load_plain(directory, **attention)
    stock = PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    answerer = make_answerer(assembled)

    first = [5, 17, 230, 44, 9]
    _, tokens = reply(answerer, first)
    assert tokens == stock_tokens(stock, first)

    second = [*first, *tokens, 101, 77]
    with counted(answerer) as counts:
        answer, tokens = reply(answerer, second)
    assert tokens == stock_tokens(stock, second)
    num_known = 0 if family == LINEAR else len(second) - 2
    assert answer.num_cached_tokens == num_known
    assert counts == [len(second) - num_known, 1, 1, 1, 1, 1]

    # The same once more, another end, and another beginning.
    for ids in (second, [*second[:-1], 300], [8, *second]):
        answer, tokens = reply(answerer, ids)
        assert tokens == stock_tokens(stock, ids)
        if family in WINDOWED:
            assert answer.num_cached_tokens == 0, "a window that moved on cannot move back"
        elif family != LINEAR:
            assert answer.num_cached_tokens == (0 if ids[0] == 8 else len(ids) - 1)


def logits(model: Any, ids: tuple[int, ...] = (5, 17, 230, 44, 9)) -> Tensor:
    return model.eval().next_token_logits(torch.tensor([ids]), DynamicCache(config=model.hf.config))


@pytest.mark.parametrize(
    ("family", "sections"),
    [
        ("llama", {}),
        ("llama", {"model": {"dtype": "bf16"}, "adapter": {"kind": "dora", "rank": 4}}),
        ("qwen2", {"fsdp": {"precision": "bf16_autocast"}}),  # biases
        ("llama", {"quantization": {"kind": "hqq", "nbits": 3}}),
        ("qwen3_moe", {}),
        ("gpt_oss", {"model": {"attn_implementation": "eager"}}),  # transposed experts
    ],
)
def test_kept_matrices_and_casts_change_no_bit(
    tmp_path: Path, family: str, sections: dict[str, Any]
) -> None:
    directory = save_tiny_llama(tmp_path, family=family, **FAMILIES[family])
    recipe = answering_recipe(tiny_recipe(**sections), "cpu")
    assembled = assemble(directory, **sections)
    train_a_bit(assembled)
    before = logits(assembled.model)
    cast_trained(assembled, recipe)
    assert torch.equal(logits(assembled.model), before)
    assert keep_matrices(assembled, recipe, "never", CPU) == 0
    assert keep_matrices(assembled, recipe, "always", CPU) == 1
    for module in assembled.model.modules():  # forward must not look at the packed bytes again
        for name in getattr(module, "packed_names", ()):
            getattr(module, name).data.zero_()
    assert torch.equal(logits(assembled.model), before)


def test_only_what_fits_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assembled = assemble(save_tiny_llama(tmp_path))
    recipe = tiny_recipe()
    monkeypatch.setattr(answering_model, "free_bytes", lambda _device: 2 * 3 * 192 * 320 * 4)
    assert 0 < keep_matrices(assembled, recipe, "auto", CPU) < 0.5


@pytest.mark.parametrize("adapter", [{}, {"kind": "none"}])
def test_what_was_trained_goes_out_and_comes_back(tmp_path: Path, adapter: dict[str, Any]) -> None:
    directory = save_tiny_llama(tmp_path)
    sections = {"adapter": adapter, "quantization": NONE, "model": {"dtype": "bf16"}}
    base = logits(reference_like(directory, sections).model)
    assembled = assemble(directory, **sections)
    switch = TrainedSwitch(assembled, CPU)
    train_a_bit(assembled)
    cast_trained(assembled, answering_recipe(tiny_recipe(**sections), "cpu"))
    trained = logits(assembled.model)
    assert not torch.equal(trained, base)
    for _ in range(2):
        assert switch.put(False)
        assert not switch.put(False)
        assert torch.equal(logits(assembled.model), base)
        assert switch.put(True)
        assert torch.equal(logits(assembled.model), trained)


def reference_like(directory: Path, sections: dict[str, Any]) -> Assembled:
    """The base alone, of a run that has loaded nothing that was trained."""
    assembled = assemble(directory, **sections)
    cast_trained(assembled, answering_recipe(tiny_recipe(**sections), "cpu"))
    return assembled


@pytest.fixture(scope="module")
def answerer(tmp_path_factory: pytest.TempPathFactory) -> ChatAnswerer:
    assembled = assemble(save_tiny_llama(tmp_path_factory.mktemp("model")), quantization=NONE)
    return make_answerer(assembled)


def turns(num_turns: int) -> list[dict[str, str]]:
    messages = [{"role": "system", "content": "be brief"}]
    for number in range(num_turns):
        messages += [
            {"role": "user", "content": f"question {number}"},
            {"role": "assistant", "content": f"answer {number}"},
        ]
    return [*messages, {"role": "user", "content": "last"}]


def test_the_oldest_turns_make_room_and_the_system_prompt_stays(answerer: ChatAnswerer) -> None:
    assert answerer.context == 256
    messages = turns(30)
    ids, dropped = answerer.fit(messages, 40)
    assert len(ids) <= 256 - 40
    assert dropped == messages[1 : 1 + len(dropped)]
    assert len(dropped) % 2 == 0
    text = answerer.tokenizer.decode(ids)
    kept = len(dropped) // 2
    assert "be brief" in text
    assert "last" in text
    assert f"question {kept}<" in text
    assert f"question {kept - 1}<" not in text
    # One turn more would not have fitted.
    more = answerer.asks.message_ids([messages[0], *messages[1 + len(dropped) - 2 :]])
    assert len(more) > 256 - 40
    assert answerer.fit(turns(1), 40)[1] == []


class Told(list[dict[str, Any]]):
    """The events of a server, answers without their times."""

    def of(self, number: int) -> list[dict[str, Any]]:
        return [event for event in self if event["id"] == number]


def request(number: int, content: str = "hello", **changes: Any) -> str:
    messages = changes.pop("messages", [{"role": "user", "content": content}])
    asked = {
        "request": "ask", "id": number, "messages": messages, "max_new_tokens": 8,
        "temperature": 0.0, "top_k": 0, "top_p": 1.0, "repetition_penalty": 1.0, "seed": None,
        "trained": True,
    }  # fmt: skip
    return json.dumps(asked | changes)


def serve(answerer: ChatAnswerer, lines: Iterator[str]) -> Told:
    told = Told()
    server = answers.AnswerServer(answerer, None, told.append)
    server.serve(lines)
    return told


def test_requests_are_answered_in_order_until_they_end(answerer: ChatAnswerer) -> None:
    told = Told()

    def lines() -> Iterator[str]:
        """The input ends once all is answered."""
        yield request(1)
        yield request(2, temperature=1.0, seed=4)
        yield request(3, temperature=1.0, seed=4)
        yield request(4, "word " * 300)
        yield request(5, messages=[{"role": "user", "content": "a", "tool_calls": 3}])
        while not told.of(5):
            pass

    answers.AnswerServer(answerer, None, told.append).serve(lines())
    for number in (1, 2, 3):
        *pieces, done = told.of(number)
        assert done["event"] == "done"
        assert done["answer"] == "".join(piece["text"] for piece in pieces)
        assert (done["stop"], done["num_tokens"], done["dropped"]) == ("length", 8, 0)
    assert told.of(2)[-1]["answer"] == told.of(3)[-1]["answer"] != told.of(1)[-1]["answer"]
    [refused] = told.of(4)
    assert refused["event"] == "refused"
    assert "the model's context is 256" in refused["message"]


def test_an_answer_stops_when_it_is_told_to_and_is_kept_for_the_next(
    answerer: ChatAnswerer,
) -> None:
    told = Told()

    def lines() -> Iterator[str]:
        yield request(1, max_new_tokens=200)
        while not told:
            pass
        yield json.dumps({"request": "stop", "id": 1})
        yield request(2, "hello")
        while not any(event["event"] == "done" for event in told.of(2)):
            pass

    answers.AnswerServer(answerer, None, told.append).serve(lines())
    stopped, after = told.of(1)[-1], told.of(2)[-1]
    assert stopped["stop"] == "stopped"
    assert 0 < stopped["num_tokens"] < 200
    assert after["stop"] == "length"
    assert after["num_cached_tokens"] == after["num_prompt_tokens"] - 1


def test_the_end_of_the_input_ends_an_answer(answerer: ChatAnswerer) -> None:
    told = serve(answerer, iter([request(1, max_new_tokens=10**6, messages=turns(1))]))
    assert told[-1]["stop"] == "stopped"


def test_memory_that_runs_out_is_told_and_the_process_goes_on(
    answerer: ChatAnswerer, monkeypatch: pytest.MonkeyPatch
) -> None:
    told = Told()
    forward = answerer.model.next_token_logits

    def once(*_arguments: Any) -> Tensor:
        monkeypatch.setattr(answerer.model, "next_token_logits", forward)
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(answerer.model, "next_token_logits", once)

    def lines() -> Iterator[str]:
        yield request(1)
        yield request(2)
        while not any(event["event"] == "done" for event in told.of(2)):
            pass

    answers.AnswerServer(answerer, None, told.append).serve(lines())
    assert told.of(1) == [
        {
            "event": "refused",
            "id": 1,
            "message": "the memory of the GPU ran out",
            "hint": "ask a shorter conversation, or use `--dequantize never` or `--device cpu`",
        }
    ]
    assert told.of(2)[-1]["num_cached_tokens"] == 0


def test_plain_texts_are_talked_to_by_the_template_only_where_there_is_one(tmp_path: Path) -> None:
    recipe = tiny_recipe(data={"format": "text"})
    inputs = Inputs(tmp_path, None, None)
    tokenizer = build_tokenizer()
    assert answers.take_turns(recipe, inputs, tokenizer).renderer.asks == "conversation"
    tokenizer.chat_template = None
    with pytest.raises(UsageError, match="nobody to talk to"):
        answers.take_turns(recipe, inputs, tokenizer)
