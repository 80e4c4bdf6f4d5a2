"""Our tokens and masks beside TRL's own preparation, and beside fsdp_qlora's rule for its rows.

TRL encodes the prompt alone and takes the tokens that it has in common with the whole row as the
prompt. fsdp_qlora encodes the prompt alone and masks as many tokens of the row as that gives. Both
agree with us where no token crosses the boundary; what differs is said in each test.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from support.templates import trained_pieces
from support.tokenizer import (
    build_metaspace_tokenizer,
    build_tokenizer,
    build_wordpiece_tokenizer,
)

from fsdpq.cards.chat_templates import BUILT_IN_TEMPLATES
from fsdpq.data.templates.choose import choose_template
from fsdpq.data.text.plain_texts import guanaco_turns
from fsdpq.data.text.tokenize import Row, RowTokenizer
from fsdpq.recipe.sections.data import DataOptions

IGNORED = -100


def _ours(rows: list[dict[str, Any]], tokenizer: Any, name: str, **options: Any) -> list[Row]:
    template = choose_template(tokenizer, None)
    tokenized = RowTokenizer(tokenizer, DataOptions(**options), name, template=template)
    found = [row for row in tokenized.tokenize(rows) if isinstance(row, Row)]
    assert len(found) == len(rows)
    return found


def _labels(row: Row) -> list[int]:
    """Returns labels as other libraries have them; the first token is never predicted."""
    pairs = zip(row.input_ids.tolist(), row.loss_mask.tolist(), strict=True)
    return [IGNORED, *(i if trained else IGNORED for i, trained in [*pairs][1:])]


@pytest.fixture(scope="module")
def prepare_by_trl() -> Any:
    """Returns TRL's preparation of rows: their ``input_ids`` and ``labels``."""
    pytest.importorskip("trl", reason="TRL needs Python 3.11")
    from datasets import Dataset, disable_progress_bars
    from trl.trainer.sft_trainer import SFTTrainer

    disable_progress_bars()

    def prepare(rows: list[dict[str, Any]], tokenizer: Any, *, assistant_only: bool) -> Any:
        trainer: Any = SimpleNamespace(
            _tokenizer=tokenizer, chat_template=None, completion_only_loss="prompt" in rows[0]
        )
        args: Any = SimpleNamespace(
            dataset_num_proc=None, dataset_text_field="text", assistant_only_loss=assistant_only,
            max_length=None, shuffle_dataset=False,
        )  # fmt: skip
        dataset = Dataset.from_list(rows)
        found = SFTTrainer._prepare_dataset(trainer, dataset, tokenizer, args, False, None, "train")
        return [(row["input_ids"], [IGNORED, *row["labels"][1:]]) for row in found]

    return prepare


CONVERSATIONS = [
    [
        {"role": "user", "content": "What is one?"},
        {"role": "assistant", "content": "two three"},
        {"role": "user", "content": "hello"},
        {"role": "assistant", "content": " I am fine 👍"},
    ],
    [{"role": "user", "content": ""}, {"role": "assistant", "content": "<|im_end|>\n\n"}],
    [{"role": "user", "content": "é\r\n"}, {"role": "assistant", "content": ""}],
]


def test_answers_of_conversations_are_those_of_trl(prepare_by_trl: Any) -> None:
    tokenizer = build_tokenizer(template=BUILT_IN_TEMPLATES["chatml"].source)
    rows = [{"messages": messages} for messages in CONVERSATIONS]
    theirs = prepare_by_trl(rows, tokenizer, assistant_only=True)
    for (ids, labels), row in zip(theirs, _ours(rows, tokenizer, "messages"), strict=True):
        assert row.input_ids.tolist() == ids
        assert _labels(row) == labels


def test_completions_of_messages_are_those_of_trl_but_for_the_line_break_behind(
    prepare_by_trl: Any,
) -> None:
    tokenizer: Any = build_tokenizer()
    rows = [{"prompt": chat[:-1], "completion": chat[-1:]} for chat in CONVERSATIONS]
    theirs = prepare_by_trl(rows, tokenizer, assistant_only=False)
    [line_break] = tokenizer("\n", add_special_tokens=False)["input_ids"]
    for (ids, labels), row in zip(theirs, _ours(rows, tokenizer, "prompt_completion"), strict=True):
        assert row.input_ids.tolist() == ids
        # TRL trains everything behind the prompt, so what follows the end of the turn too.
        assert labels[-1] == line_break
        assert _labels(row) == [*labels[:-1], IGNORED]


PAIRS = [("Question: ", "one two"), ("hello", " fine"), ("a\n", "\nb"), ("é:", "👍 yes"), ("x", "")]


@pytest.mark.parametrize("kind", ["bpe", "metaspace", "wordpiece"])
def test_plain_prompts_and_completions_are_those_of_trl(prepare_by_trl: Any, kind: str) -> None:
    builders: dict[str, Any] = {
        "bpe": build_tokenizer,
        "metaspace": build_metaspace_tokenizer,
        "wordpiece": build_wordpiece_tokenizer,
    }
    tokenizer: Any = builders[kind]()
    tokenizer.chat_template = None
    rows = [{"prompt": prompt, "completion": completion} for prompt, completion in PAIRS]
    theirs = prepare_by_trl(rows, tokenizer, assistant_only=False)
    for (ids, labels), row in zip(theirs, _ours(rows, tokenizer, "prompt_completion"), strict=True):
        assert row.input_ids.tolist() == ids
        ours = _labels(row)
        # White space at the start of a completion that its own tokenizer merges is not trained.
        assert all(a in (b, IGNORED) for a, b in zip(ours, labels, strict=True))
        crossing = sum(a != b for a, b in zip(ours, labels, strict=True))
        assert crossing <= 1
        assert ours[-1] == tokenizer.eos_token_id


def test_plain_text_is_that_of_trl(prepare_by_trl: Any) -> None:
    tokenizer: Any = build_tokenizer()
    rows = [{"text": "hello there"}, {"text": "ended<|im_end|>"}]
    theirs = prepare_by_trl([dict(row) for row in rows], tokenizer, assistant_only=False)
    for (ids, labels), row in zip(theirs, _ours(rows, tokenizer, "text"), strict=True):
        assert row.input_ids.tolist() == ids
        assert _labels(row) == labels


# fsdp_qlora: https://github.com/AnswerDotAI/fsdp_qlora, `InstructionDataset`

ALPACA_HEAD = "Below is an instruction that describes a task"
ALPACA_TAIL = "Write a response that appropriately completes the request.\n\n"


def _seed_prompt(name: str, row: dict[str, str]) -> tuple[str, str]:
    """Returns prompt and whole text of a row by the seed's rule."""
    if name == "guanaco":
        return row["text"].split("### Assistant: ")[0], row["text"]
    if name == "alpaca":
        extra = ", paired with an input that provides further context. " if row["input"] else ". "
        shown = f"### Input:\n{row['input']}\n\n" if row["input"] else ""
        prompt = (
            f"{ALPACA_HEAD}{extra}{ALPACA_TAIL}### Instruction:\n{row['instruction']}\n\n{shown}"
        )
        return f"{prompt}### Response:", f"{prompt}### Response:{row['output']}"
    context = f"###Context:\n{row['context']}\n" if name == "qna" else ""
    prompt = f"{context}###Question:\n{row['question']}\n###Answer:\n"
    return prompt, prompt + row["answer"]


def _seed_row(name: str, row: dict[str, str], tokenizer: Any) -> tuple[list[int], list[int]]:
    """Returns ids and labels by the seed's rule: as many masked as the prompt alone has tokens."""
    prompt, whole = _seed_prompt(name, row)
    masked = len(tokenizer.encode(prompt))
    ids = [*tokenizer.encode(whole), tokenizer.eos_token_id]
    return ids, [IGNORED] * masked + ids[masked:]


SEED_ROWS: list[tuple[str, dict[str, str]]] = [
    ("alpaca", {"instruction": "Count.", "input": "", "output": "one two"}),
    ("alpaca", {"instruction": "Count é.", "input": "three", "output": "four\nfive"}),
    ("alpaca", {"instruction": "instruction", "input": "input", "output": "output" * 50}),
    ("qna", {"question": "How many?", "context": "CREATE TABLE a (b)", "answer": "SELECT 4"}),
    ("qna_no_ctx", {"question": "1 + 2?", "answer": "It is 3."}),
    ("guanaco", {"text": "### Human: hello### Assistant: fine"}),
]


@pytest.mark.parametrize("kind", ["bpe", "metaspace"])
@pytest.mark.parametrize(("name", "row"), SEED_ROWS)
def test_rows_of_the_seeds_datasets_have_its_tokens(
    kind: str, name: str, row: dict[str, str]
) -> None:
    tokenizer: Any = build_tokenizer() if kind == "bpe" else build_metaspace_tokenizer()
    tokenizer.chat_template = None
    ids, labels = _seed_row(name, row, tokenizer)
    [ours] = _ours([row], tokenizer, name)
    assert ours.input_ids.tolist() == ids
    if name == "guanaco":  # the seed trains the mark before the answer too
        mark = len(tokenizer.encode("### Human: hello### Assistant:"))
        labels = [IGNORED] * mark + labels[mark:]
    assert _labels(ours) == labels


def test_the_seed_trains_humans_of_later_turns_and_ends_the_last_answer_only() -> None:
    tokenizer: Any = build_tokenizer()
    tokenizer.chat_template = None
    text = "### Human: hello### Assistant: fine### Human: and you?### Assistant: one two"
    ids, labels = _seed_row("guanaco", {"text": text}, tokenizer)
    [ours] = _ours([{"text": text}], tokenizer, "guanaco")
    eos = tokenizer.eos_token_id
    inner = [i for i in ours.input_ids.tolist()[:-1] if i != eos]
    assert [*inner, eos] == ids, "the ends of inner answers are all that is added"
    theirs = tokenizer.decode([i for i in labels if i != IGNORED])
    assert "### Human: and you?" in theirs
    answers = [turn for role, turn in guanaco_turns(text) if role == "assistant"]
    assert trained_pieces(ours, tokenizer) == [f"{answer}<|im_end|>" for answer in answers]


def test_the_seeds_prompt_encoding_shifts_the_mask_where_a_token_crosses() -> None:
    row = {"question": "q", "answer": "\n\nabc"}
    texts = ["###Answer:\n\n\nabc"] * 50
    tokenizer: Any = build_tokenizer(texts=texts, vocab_size=290, split=False)
    tokenizer.chat_template = None
    prompt, whole = _seed_prompt("qna_no_ctx", row)
    encoded = tokenizer(whole, return_offsets_mapping=True)
    assert any(s < len(prompt) < e for s, e in encoded["offset_mapping"]), "a token must cross"
    ids, labels = _seed_row("qna_no_ctx", row, tokenizer)
    [ours] = _ours([row], tokenizer, "qna_no_ctx")
    assert ours.input_ids.tolist() == ids, "the same tokens"
    theirs = [place for place, label in enumerate(labels) if label != IGNORED]
    right = [place for place, (s, _) in enumerate(encoded["offset_mapping"]) if s >= len(prompt)]
    assert [*ours.loss_mask.nonzero()[0]] == [*right, len(ids) - 1]
    assert theirs != [*right, len(ids) - 1], "the seed masks answer tokens, or trains the prompt"
