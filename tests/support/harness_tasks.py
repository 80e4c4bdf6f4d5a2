"""A folder of tasks for lm-evaluation-harness: choices, whole texts, answers; no network."""

from __future__ import annotations

import json
from pathlib import Path

WORDS = ("one", "two", "three", "four", "five", "six", "seven", "eight")
NAMES = ("tiny_choices", "tiny_texts", "tiny_answers")

CHOICES = """\
task: tiny_choices
dataset_path: json
dataset_kwargs: {{data_files: {{test: {rows}, train: {rows}}}}}
output_type: multiple_choice
test_split: test
fewshot_split: train
num_fewshot: 1
doc_to_text: "{{{{question}}}}"
doc_to_target: gold
doc_to_choice: choices
metric_list:
  - {{metric: acc}}
  - {{metric: acc_norm}}
"""
TEXTS = """\
task: tiny_texts
dataset_path: json
dataset_kwargs: {{data_files: {{test: {rows}}}}}
output_type: loglikelihood_rolling
test_split: test
doc_to_text: ""
doc_to_target: "{{{{text}}}}"
metric_list:
  - {{metric: word_perplexity}}
  - {{metric: bits_per_byte}}
"""
ANSWERS = """\
task: tiny_answers
dataset_path: json
dataset_kwargs: {{data_files: {{test: {rows}}}}}
output_type: generate_until
test_split: test
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{choices[gold]}}}}"
generation_kwargs: {{until: ["w"], max_gen_toks: 12, do_sample: false}}
metric_list:
  - {{metric: exact_match}}
"""


def save_harness_tasks(directory: Path, *, num_questions: int = 7) -> Path:
    """Writes the tasks of `NAMES` and their rows; an odd number leaves a rank without a share."""
    directory.mkdir()
    rows = directory / "rows.jsonl"
    with rows.open("w") as file:
        for index in range(num_questions):
            word = WORDS[index % len(WORDS)]
            row = {
                "question": f"What is {word}?" + " Say it." * (index % 3),
                # One token each, and longer ones; trailing space belongs to the answer.
                "choices": [f" {word}", f" {word} is {word}", " it", " what"],
                "gold": index % 4,
                "text": " ".join(WORDS[: 2 + index % 6]) * (1 + 12 * (index % 3)),
            }
            file.write(json.dumps(row) + "\n")
    for name, text in zip(NAMES, (CHOICES, TEXTS, ANSWERS), strict=True):
        (directory / f"{name}.yaml").write_text(text.format(rows=rows))
    return directory
