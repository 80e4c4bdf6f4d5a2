"""The model card of an export: what a hub needs, and nothing of this machine."""

from __future__ import annotations

from typing import Any

import yaml

from fsdpq.reports.run_record import RunRecord
from fsdpq.worker.export.card import render_card
from fsdpq.worker.export.verify import Verified

HOME = "/home/someone/secret"


def make_record(**changes: Any) -> RunRecord:
    """Returns the record of a run over a base of the hub, with rows of the hub and of a file."""
    settings = {
        "name": "mine",
        "description": "a | b <b>",
        "model": {"name_or_path": "org/base", "revision": "main"},
        "quantization": {"kind": "bnb", "quant_type": "nf4"},
        "adapter": {"kind": "lora", "rank": 8},
        "data": {"mixture": [{"path": f"{HOME}/rows.jsonl"}, {"dataset": "org/rows"}],
                 "chat_template": "mine/chat.jinja"},
        "export": {"format": "peft"},
        "metrics": {"sample_prompts": ["my private question"], "wandb": {"entity": "me-myself"}},
    }  # fmt: skip
    sources = [
        {"name": f"{HOME}/rows.jsonl", "format": "messages", "num_rows": 3, "revision": None,
         "files": [{"path": f"{HOME}/rows.jsonl", "sha256": "5" * 64}]},
        {"name": "org/rows", "format": "alpaca", "num_rows": 4, "revision": "7" * 40, "files": []},
    ]  # fmt: skip
    model = {"directory": f"{HOME}/hub/base", "revision": "a" * 40, "license": "see there"}
    environment = {"fsdpq": "0.1.0", "inputs": {"model": model, "data": {"train": sources}}}
    setup = {"num_trainable": 1000, "num_parameters": 5000, "world_size": 2, "device": "CPU",
             "dtype": "fp32"}  # fmt: skip
    summary = {"tokens": 12345, "trained_tokens": 99, "steps": 7, "train_s": 61.0,
               "eval_loss_before": 2.0, "eval_loss_after": 1.0}  # fmt: skip
    values = {"settings": settings | changes, "environment": environment}
    return RunRecord(setup=setup, summary=summary, **values)


def front_matter(card: str) -> dict[str, Any]:
    return yaml.safe_load(card.split("---\n")[1])


def test_metadata_names_base_method_and_datasets() -> None:
    card = render_card(make_record(), Verified(1e-7, 1e-4), has_plot=True)
    assert front_matter(card) == {
        "library_name": "peft",
        "pipeline_tag": "text-generation",
        "tags": ["fsdpq", "lora"],
        "base_model": "org/base",
        "base_model_relation": "adapter",
        "datasets": ["org/rows"],
    }
    assert f'from_pretrained("org/base", revision="{"a" * 40}")' in card
    assert "| held-out loss | 2.0000 | 1.0000 |" in card
    assert "| perplexity | 7.39 | 2.72 |" in card
    assert "![Loss by step](loss.svg)" in card
    assert "by at most 1.0e-07 of the largest (0.0001 was allowed)" in card
    assert "a \\| b \\<b\\>" in card, "words of the recipe make no HTML and no table"


def test_nothing_of_this_machine_is_in_a_card() -> None:
    card = render_card(make_record(), None, has_plot=False)
    for private in (HOME, "someone", "private question", "me-myself", "mine/chat.jinja"):
        assert private not in card
    assert "path: rows.jsonl" in card
    assert f"| rows.jsonl | messages | 3 | `{'5' * 64}` |" in card
    assert "Nobody compared" in card
    assert "loss.svg" not in card


def test_a_local_base_is_its_name_and_hash() -> None:
    record = make_record(model={"name_or_path": f"{HOME}/base"}, export={"format": "transformers"})
    model = {"revision": None, "sha256": "b" * 64, "license": "Apache-2.0"}
    record.environment["inputs"]["model"] = model
    card = render_card(record, None, has_plot=False)
    found = front_matter(card)
    assert "base_model" not in found
    assert (found["license"], found["library_name"]) == ("apache-2.0", "transformers")
    assert f"`base` (its files: sha256 `{'b' * 64}`)" in card
    assert HOME not in card
    assert 'AutoModelForCausalLM.from_pretrained("THIS")' in card
