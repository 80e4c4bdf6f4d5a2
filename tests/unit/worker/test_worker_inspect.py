"""Every count of an inspection, with rows that were planted for it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.rows import tokenize_rows
from support.tiny import tiny_recipe
from support.tokenizer import build_tokenizer, build_wordpiece_tokenizer

from fsdpq.data.dealing.collate import build_step
from fsdpq.data.preparing.prepare import Preparation, prepare_data
from fsdpq.errors import UsageError
from fsdpq.rows.source import DataSources, RowSource, SourceFile
from fsdpq.worker.inspect import Inspection, RowInputs, Wanted

Inspect = Callable[..., dict[str, Any]]


def chat(*texts: str, system: str | None = None) -> dict[str, Any]:
    """Returns a row of the texts, of the user and the assistant in turn."""
    messages = [{"role": "system", "content": system}] if system is not None else []
    for index, text in enumerate(texts):
        messages.append({"role": ("user", "assistant")[index % 2], "content": text})
    return {"messages": messages}


def _write(path: Path, rows: list[Any]) -> tuple[Path, str]:
    """Writes a file of rows and returns its path and hash."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path, hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("model")
    build_tokenizer().save_pretrained(directory)
    return directory


@pytest.fixture
def inspect(tmp_path: Path, model_dir: Path) -> Inspect:
    """Writes rows (or lines of text) to files and returns what is found of them."""

    def run(
        *rows: Any,
        held_out: list[Any] | None = None,
        wanted: Wanted | None = None,
        tokenizer_dir: Path = model_dir,
        training: dict[str, Any] | None = None,
        max_rows: int | None = None,
        **data: Any,
    ) -> dict[str, Any]:
        def source(name: str, content: list[Any]) -> RowSource:
            lines = [row if isinstance(row, str) else json.dumps(row) for row in content]
            (tmp_path / name).write_text("\n".join(lines) + "\n", encoding="utf-8")
            files = (SourceFile(tmp_path / name, ""),)
            return RowSource(name, files, data.get("format", "messages"), 0, max_rows=max_rows)

        recipe = tiny_recipe(data={"path": "rows.jsonl", **data}, training=training or {})
        sources = DataSources(
            (source("rows.jsonl", list(rows)),),
            None if held_out is None else source("eval.jsonl", held_out),
        )
        inputs = RowInputs(tokenizer_dir, sources)
        return Inspection(recipe, inputs, wanted or Wanted()).run()

    return run


def finding(content: dict[str, Any], kind: str) -> dict[str, Any]:
    [found] = [entry for entry in content["findings"] if entry["kind"] == kind]
    return found


def test_clean_rows_have_no_findings(inspect: Inspect) -> None:
    content = inspect(chat("one", "two"), chat("three", "four"))
    assert content["findings"] == []
    assert content["notes"] == []
    assert content["ok"]
    assert content["counts"]["rows"] == content["counts"]["usable"] == 2


def test_marks_that_segments_are_written_with_are_no_finding(inspect: Inspect) -> None:
    segments = [{"label": False, "text": "one "}, {"label": True, "text": "two<|im_end|>"}]
    content = inspect({"segments": segments}, format="input_output")
    assert content["findings"] == []
    assert finding(inspect(chat("one", "two<|im_end|>")), "special_tokens")["count"] == 1


@pytest.mark.parametrize("truncation", ["truncate_end", "truncate_start"])
def test_tokens_are_those_that_training_counts(inspect: Inspect, truncation: str) -> None:
    """`tokenize_rows` is what training does with the same rows."""
    rows = [chat("one two " * n, "three " * (2 * n)) for n in range(1, 30)]
    content = inspect(*rows, seq_len=40, truncation=truncation)
    cut = {"format": "messages", "seq_len": 40, "truncation": truncation}
    trained = tokenize_rows(rows, build_tokenizer(), tiny_recipe(data=cut).data)
    counts = content["counts"]
    assert counts["kept_tokens"] == sum(len(row.input_ids) for row in trained.rows)
    assert counts["kept_trained_tokens"] == sum(row.num_trained for row in trained.rows)
    assert (counts["cut"], counts["untrained"]) == (
        trained.chunk.num_cut,
        trained.chunk.num_untrained,
    )
    assert counts["cut"] > 0
    assert (counts["untrained"] > 0) is (truncation == "truncate_end")
    whole = tiny_recipe(data={"format": "messages", "seq_len": 4000}).data
    uncut = tokenize_rows(rows, build_tokenizer(), whole).rows
    assert counts["tokens"] == sum(len(row.input_ids) for row in uncut)
    assert counts["trained_tokens"] == sum(row.num_trained for row in uncut)


@pytest.mark.parametrize(
    ("truncation", "packing"), [("truncate_end", "best_fit"), ("drop", "none")]
)
def test_counts_are_those_of_prepared_data(
    tmp_path: Path, model_dir: Path, truncation: str, packing: str
) -> None:
    """What preparing says it did with a mixture, and what it wrote."""
    parts = [
        _write(tmp_path / f"{name}.jsonl", [chat(f"{name} {n}", "two " * n) for n in range(count)])
        for name, count in (("one", 30), ("two", 50))
    ]
    sources = DataSources(
        tuple(
            RowSource(path.stem, (SourceFile(path, sha256),), "messages", count, weight=weight)
            for (path, sha256), count, weight in zip(parts, (30, 50), (1.0, 2.0), strict=True)
        )
    )
    data = {"seq_len": 64, "truncation": truncation, "packing": packing, "eval_fraction": 0.2}
    recipe = tiny_recipe(data={"path": None, **data})
    (tmp_path / "prepared").mkdir()
    job = Preparation(sources, recipe.data, build_tokenizer(), recipe.training.seed)
    report = prepare_data(job, tmp_path / "prepared", key={})
    content = Inspection(recipe, RowInputs(model_dir, sources), Wanted(), num_processes=2).run()
    for source, expected in zip(content["sources"], report.sources, strict=True):
        counts = source["counts"]
        assert counts["rows"] - counts["bad_rows"] == expected.num_rows
        assert (counts["cut"], counts["too_long"]) == (expected.num_cut, expected.num_too_long)
        assert (counts["untrained"], counts["usable"]) == (
            expected.num_untrained,
            expected.num_kept,
        )
        assert source["epoch_rows"] == expected.num_used
        assert counts["kept_tokens"] == expected.num_tokens
        assert counts["kept_trained_tokens"] == expected.num_trained
    assert content["held_out"]["rows"] == report.num_held_out > 0
    assert content["packing"]["rows"] == report.num_train_rows
    if report.fill is not None:
        assert content["packing"]["sequences"] == report.num_sequences
        assert content["packing"]["fill"] == pytest.approx(report.fill)


def test_all_bad_rows_are_counted_by_kind_and_the_first_are_named(inspect: Inspect) -> None:
    broken = ['{"messages": [', '{"messages": ['] * 15
    content = inspect(chat("one", "two"), *broken, {"prompt": "x"}, chat("three", "four"))
    assert not content["ok"]
    assert content["counts"]["bad_rows"] == 31
    by_text = {entry["text"]: entry for entry in content["findings"]}
    assert [entry["count"] for entry in by_text.values()] == [30, 1]
    first, second = by_text.values()
    assert first["text"].startswith("not JSON")
    assert [(e["row"], e["line"]) for e in first["examples"]] == [(n, n) for n in range(2, 7)]
    assert first["examples"][0]["detail"] == '{"messages": ['
    assert "no `messages`" in second["text"]
    assert (second["examples"][0]["row"], content["counts"]["usable"]) == (32, 2)


def test_bad_rows_that_are_skipped_are_no_error(inspect: Inspect) -> None:
    content = inspect(chat("one", "two"), "{", on_bad_row="skip")
    assert (content["ok"], content["counts"]["bad_rows"]) == (True, 1)


def test_texts_that_differ_in_numbers_are_one_finding(inspect: Inspect) -> None:
    content = inspect(chat("one", "two"), '{"messages": [1]}', '{"messages": [{}, }', '{"a": }')
    texts = [entry["text"] for entry in content["findings"]]
    assert len(texts) == len(set(texts))
    json_mistakes = [e for e in content["findings"] if e["text"].startswith("not JSON")]
    assert sum(entry["count"] for entry in json_mistakes) == 2
    assert any("column" in e["detail"] or "column" in f["text"]
               for f in json_mistakes for e in f["examples"])  # fmt: skip


def test_nothing_to_train_on_is_an_error(inspect: Inspect) -> None:
    content = inspect(chat("one"), chat("two"))
    assert [error["message"] for error in content["errors"]] == [
        "none of the 2 rows can be trained on"
    ]
    assert content["counts"]["untrained"] == 2
    assert finding(content, "roles")["text"] == "no assistant message"


@pytest.mark.parametrize(
    ("truncation", "kind", "usable", "ok"),
    [
        ("truncate_end", "cut", 2, True),
        ("truncate_start", "cut", 2, True),
        ("drop", "too_long", 1, True),
        ("error", "over_limit", 1, False),
    ],
)
def test_long_rows_are_counted_by_policy(
    inspect: Inspect, truncation: str, kind: str, usable: int, ok: bool
) -> None:
    rows = chat("one", "two"), chat("one", "two " * 60)
    content = inspect(*rows, seq_len=64, truncation=truncation)
    found = finding(content, kind)
    assert (found["count"], found["examples"][0]["row"]) == (1, 2)
    assert (content["counts"]["usable"], content["ok"]) == (usable, ok)
    assert content["lengths"]["limit"]["longer_rows"] == 1


def test_row_whose_answer_is_cut_off_has_nothing_to_train(inspect: Inspect) -> None:
    content = inspect(chat("one", "two"), chat("one " * 80, "two"), seq_len=64)
    assert finding(content, "untrained")["text"] == ("no token that carries loss, once it is cut")
    assert (content["counts"]["cut"], content["counts"]["untrained"]) == (1, 1)
    at_start = inspect(chat("one " * 80, "two"), seq_len=64, truncation="truncate_start")
    assert at_start["counts"]["untrained"] == 0


def test_empty_fields_are_named(inspect: Inspect) -> None:
    content = inspect(chat("one", " \n"), chat("", "two"), chat("one", "two"))
    empty = [e for e in content["findings"] if e["kind"] == "empty"]
    assert {(e["text"], e["examples"][0]["row"]) for e in empty} == {
        ("empty `assistant message`", 1), ("empty `user message`", 2),
    }  # fmt: skip
    assert content["counts"]["empty"] == 2


def test_empty_columns_are_named_unless_they_may_be(inspect: Inspect) -> None:
    row = {"instruction": "add", "input": "", "output": ""}
    content = inspect(row, {**row, "output": "x"}, format="alpaca")
    assert finding(content, "empty")["text"] == "empty `output`"
    assert content["counts"]["empty"] == 1


def test_call_of_a_tool_needs_no_text(inspect: Inspect) -> None:
    call = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
    messages = [
        {"role": "user", "content": "one"},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": "two"},
        {"role": "assistant", "content": "three"},
    ]
    content = inspect({"messages": messages})
    assert content["counts"]["empty"] == content["counts"]["role_mistakes"] == 0
    assert content["conversations"]["max_turns"] == 2


def test_conversation_without_its_last_answer_is_a_finding(inspect: Inspect) -> None:
    content = inspect(chat("one", "two", "three"), chat("one", "two"))
    found = finding(content, "roles")
    assert found["text"] == "the conversation ends with a user message"
    assert (found["count"], content["counts"]["role_mistakes"]) == (1, 1)


def test_roles_of_guanaco_rows_are_looked_at(inspect: Inspect) -> None:
    text = "### Human: one### Human: two### Assistant: three"
    content = inspect({"text": text}, format="guanaco")
    assert finding(content, "roles")["text"] == "two user messages in a row"


def test_duplicates_say_the_same_in_other_white_space(inspect: Inspect) -> None:
    rows = chat("one", "two"), chat("One", "two"), chat(" one\n", "two"), chat("one", "two")
    content = inspect(*rows)
    found = finding(content, "duplicate")
    assert content["counts"]["duplicates"] == found["count"] == 2
    assert [e["row"] for e in found["examples"]] == [3, 4]
    assert {e["detail"] for e in found["examples"]} == {"row 1"}


def test_duplicates_are_equal_in_composed_characters(inspect: Inspect) -> None:
    content = inspect(chat("caf\u00e9", "two"), chat("cafe\u0301", "two"))
    assert content["counts"]["duplicates"] == 1


def test_evaluation_rows_that_are_trained_on_are_contamination(inspect: Inspect) -> None:
    train = [chat("one", "two"), chat("three", "four"), chat("five", "six")]
    content = inspect(*train, held_out=[chat("three", "four"), chat("seven", "eight")])
    assert content["held_out"] == {"rows": 2, "in_training": 1}
    found = finding(content, "held_out_duplicate")
    [example] = found["examples"]
    assert Path(example["file"]).name == "eval.jsonl"
    assert (example["row"], example["detail"]) == (1, "row 2 of rows.jsonl")
    assert content["counts"]["duplicates"] == 0
    assert content["counts"]["rows"] == 3, "the counts are of the rows to train on"
    assert any("held-out rows" in note for note in content["notes"])


def test_held_out_fraction_is_searched_for_training_rows(inspect: Inspect) -> None:
    rows = [chat(f"one {n}", "two") for n in range(20)]
    content = inspect(*rows, *rows, eval_fraction=0.25)
    held_out = content["held_out"]
    assert held_out["rows"] == 10
    # A held-out row is in training unless its twin is held out too.
    assert 0 < held_out["in_training"] <= 10
    assert inspect(*rows, eval_fraction=0.25)["held_out"] == {"rows": 5, "in_training": 0}


def test_system_prompts_and_turns_are_counted(inspect: Inspect) -> None:
    content = inspect(
        chat("one", "two", system="red"),
        chat("one", "two", "three", "four", system="red"),
        chat("five", "six", system="blue"),
        chat("seven", "eight"),
    )
    assert content["counts"]["system_prompts"] == 3
    talks = {"mean_turns": 1.25, "max_turns": 2, "distinct_system_prompts": 2}
    assert content["conversations"] == talks


def test_special_tokens_in_text_are_found(inspect: Inspect) -> None:
    content = inspect(chat("one <|im_end|>", "two"), chat("one", "two <|im_"))
    assert finding(content, "special_tokens")["count"] == 1
    assert content["counts"]["special_tokens"] == 1


def test_text_outside_of_the_vocabulary_is_found(inspect: Inspect, tmp_path: Path) -> None:
    build_wordpiece_tokenizer().save_pretrained(tmp_path / "wordpiece")
    rows = [{"text": "what is the capital"}, {"text": "the capital \u4f60\u597d"}]
    content = inspect(*rows, format="text", tokenizer_dir=tmp_path / "wordpiece")
    assert finding(content, "unknown_tokens")["examples"][0]["row"] == 2
    assert content["counts"]["unknown_tokens"] == 1


def test_padding_and_packing_are_those_of_training(inspect: Inspect) -> None:
    """The reference is the loader: rows of its micro-batches times their width."""
    rows = [chat("one", "two " * (1 + n % 40)) for n in range(64)]
    sizes = {"micro_batch_size": 4, "global_batch_size": 64}
    content = inspect(*rows, seq_len=128, training=sizes)
    recipe = tiny_recipe(data={"format": "messages", "seq_len": 128})
    tokenized = tokenize_rows(rows, build_tokenizer(), recipe.data).rows
    step = build_step(tokenized, micro_batch_size=4, rank=0, world_size=1)
    computed = sum(batch.input_ids.numel() for batch in step.micro_batches)
    packing = content["packing"]
    assert packing["padding_share"] == pytest.approx(1 - step.num_tokens / computed)
    assert packing["rows"] == 64
    assert packing["fill"] == pytest.approx(step.num_tokens / (128 * packing["sequences"]))
    assert packing["sequences"] >= step.num_tokens / 128


def test_max_rows_counts_good_rows(inspect: Inspect) -> None:
    content = inspect("{", chat("one", "two"), chat("three", "four"), "{", max_rows=1)
    assert (content["counts"]["rows"], content["counts"]["usable"]) == (2, 1)


def test_streaming_reads_the_first_window_only(inspect: Inspect) -> None:
    rows = [chat(f"one {n}", "two") for n in range(130)]
    content = inspect(*rows, streaming=True, stream_window=100)
    assert content["counts"]["rows"] == 100


def test_samples_depend_on_the_seed_only(inspect: Inspect) -> None:
    rows = [chat(f"one {n}", "two") for n in range(50)]
    drawn = {
        seed: [
            sample["place"]["row"]
            for sample in inspect(*rows, wanted=Wanted(5), training={"seed": seed})["samples"]
        ]
        for seed in (1, 1, 2)
    }
    assert len(set(drawn[1])) == 5
    assert drawn[1] == sorted(drawn[1])
    assert drawn[1] != drawn[2]


def test_sample_shows_what_is_left_of_a_row(inspect: Inspect) -> None:
    content = inspect(chat("one", "two " * 80), seq_len=32, wanted=Wanted(1))
    [sample] = content["samples"]
    assert (sample["num_kept"], sample["num_tokens"] > 32) == (32, True)
    text = "".join(segment["text"] for segment in sample["segments"])
    assert text.startswith("<|im_start|>user\none<|im_end|>")
    assert not text.endswith("<|im_end|>")


def test_one_row_is_shown_token_by_token(inspect: Inspect, tmp_path: Path) -> None:
    wanted = Wanted(file=str(tmp_path / "rows.jsonl"), row=3)
    content = inspect(chat("one", "two"), "{", chat("three", "four"), wanted=wanted)
    row = content["row"]
    assert json.loads(row["content"]) == chat("three", "four")
    expected = build_tokenizer().apply_chat_template(
        chat("three", "four")["messages"], tokenize=True, return_dict=True
    )
    assert [token["id"] for token in row["tokens"]] == expected["input_ids"]  # pyright: ignore[reportArgumentType, reportCallIssue]
    trained = "".join(token["text"] for token in row["tokens"] if token["trained"])
    assert trained == "four<|im_end|>"


def test_bad_row_is_shown_with_its_mistake(inspect: Inspect, tmp_path: Path) -> None:
    wanted = Wanted(file=str(tmp_path / "rows.jsonl"), row=2)
    row = inspect(chat("one", "two"), '{"messages"', wanted=wanted)["row"]
    assert row["mistake"].startswith("not JSON")
    assert row["content"] == '{"messages"'


def test_row_that_is_not_there_is_refused(inspect: Inspect, tmp_path: Path) -> None:
    wanted = Wanted(file=str(tmp_path / "rows.jsonl"), row=9)
    with pytest.raises(UsageError, match="has no row 9"):
        inspect(chat("one", "two"), wanted=wanted)


def test_context_of_the_model_bounds_what_is_advised(
    inspect: Inspect, tmp_path: Path, model_dir: Path
) -> None:
    short = tmp_path / "short"
    build_tokenizer().save_pretrained(short)
    config = {"model_type": "llama", "max_position_embeddings": 128}
    (short / "config.json").write_text(json.dumps(config))
    rows = [chat("one", "two " * 150)]
    [note] = inspect(*rows, seq_len=128)["notes"]
    assert "data.seq_len=320 keeps 99% whole" in note
    content = inspect(*rows, seq_len=128, tokenizer_dir=short)
    [note] = content["notes"]
    assert "the model's context is 128" in note
    assert content["ok"]
    [error] = inspect(*rows, seq_len=129, tokenizer_dir=short)["errors"]
    assert error["message"] == "`data.seq_len` is 129, the model's context is 128 tokens"


def test_rows_that_the_template_refuses_are_found(inspect: Inspect, tmp_path: Path) -> None:
    template = (
        "{% for m in messages %}{% if 'no' in m.content %}{{ raise_exception('not ' ~ m.content) }}"
        "{% endif %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    build_tokenizer(template=template).save_pretrained(tmp_path / "strict")
    rows = chat("one", "two"), chat("no", "two")
    content = inspect(*rows, tokenizer_dir=tmp_path / "strict")
    found = finding(content, "unrenderable")
    assert (found["count"], found["examples"][0]["row"]) == (1, 2)
    assert "not no" in found["text"]
    assert (content["ok"], content["counts"]["usable"]) == (False, 1)
    skipped = inspect(*rows, tokenizer_dir=tmp_path / "strict", on_bad_row="skip")
    assert skipped["ok"]


def test_hostile_rows_are_counted_as_any_others(inspect: Inspect) -> None:
    texts = ["\x1b[2J\x07", "</script><script>", "\u202eabc", "\x00", "\U0001f469\u200d\U0001f4bb"]
    content = inspect(*(chat(text, "one") for text in texts), wanted=Wanted(10))
    assert content["counts"]["usable"] == len(texts)
    shown = json.dumps(content)
    assert "\\u001b[2J" in shown
    for text, sample in zip(texts, content["samples"], strict=True):
        assert text in "".join(segment["text"] for segment in sample["segments"])


def test_lone_surrogates_are_a_bad_row_or_readable(inspect: Inspect) -> None:
    line = json.dumps(chat("\ud800", "two"))
    assert "\\ud800" in line
    content = inspect(chat("one", "two"), line)
    assert content["counts"]["rows"] == 2
    json.dumps(content).encode()


def test_content_is_plain_json(inspect: Inspect) -> None:
    content = inspect(chat("one", "two"), "{", wanted=Wanted(1))
    assert json.loads(json.dumps(content, allow_nan=False)) == content
    assert not any(isinstance(value, np.generic) for value in content["counts"].values())
