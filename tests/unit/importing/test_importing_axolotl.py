"""axolotl: the keys of its FSDP QLoRA examples, and what it drops of them itself."""

from collections.abc import Callable

import pytest
import yaml
from support.imported import messages, told

from fsdpq.importing.write import write_recipe

Importer = Callable[..., object]

LLAMA_70B = """\
base_model: some/llama-70b
model_type: LlamaForCausalLM
tokenizer_type: AutoTokenizer
load_in_8bit: false
load_in_4bit: true
strict: false
datasets:
  - path: org/instructions
    type: alpaca
dataset_prepared_path: prepared
val_set_size: 0.05
output_dir: ./out
adapter: qlora
lora_model_dir:
sequence_len: 512
sample_packing: false
pad_to_sequence_len: true
lora_r: 8
lora_alpha: 16
lora_dropout: 0.05
lora_target_modules:
lora_target_linear: true
lora_fan_in_fan_out:
wandb_project:
wandb_watch:
gradient_accumulation_steps: 4
micro_batch_size: 1
num_epochs: 4
optimizer: adamw_torch
lr_scheduler: cosine
learning_rate: 0.00001
train_on_inputs: false
group_by_length: false
bf16: auto
fp16:
tf32: false
gradient_checkpointing: true
gradient_checkpointing_kwargs:
  use_reentrant: true
logging_steps: 1
flash_attention: true
warmup_steps: 10
evals_per_epoch: 4
saves_per_epoch: 1
weight_decay: 0.0
fsdp:
  - full_shard
  - auto_wrap
fsdp_config:
  fsdp_limit_all_gathers: true
  fsdp_sync_module_states: true
  fsdp_offload_params: true
  fsdp_use_orig_params: false
  fsdp_cpu_ram_efficient_loading: true
  fsdp_auto_wrap_policy: TRANSFORMER_BASED_WRAP
  fsdp_transformer_layer_cls_to_wrap: LlamaDecoderLayer
  fsdp_state_dict_type: FULL_STATE_DICT
  fsdp_sharding_strategy: FULL_SHARD
special_tokens:
  pad_token: <|end_of_text|>
torch_compile: auto
liger_rope: true
liger_fused_linear_cross_entropy: true
"""


def test_qlora_fsdp_70b_becomes_this_recipe(import_text: Importer) -> None:
    result = import_text(LLAMA_70B)
    assert result.tool == "axolotl"
    assert result.document == {
        "version": 1,
        "name": "llama-70b-qlora",
        "description": "Imported from axolotl",
        "model": {
            "name_or_path": "some/llama-70b",
            "attn_implementation": "flash_attention_2",
            "use_liger_kernel": True,
        },
        "quantization": {"kind": "bnb"},
        "adapter": {
            "kind": "lora",
            "rank": 8,
            "alpha": 16,
            "dropout": 0.05,
            "target_modules": "all-linear",
        },
        "fsdp": {
            "strategy": "full_shard",
            "offload": "cpu",
            "activation_checkpointing": "full",
        },
        "data": {
            "dataset": "org/instructions",
            "format": "alpaca",
            "seq_len": 512,
            "truncation": "drop",
            "train_on_prompt": False,
            "eval_fraction": 0.05,
        },
        "optimizer": {"kind": "adamw", "lr": 1e-5, "weight_decay": 0.0},
        "lr_scheduler": {"kind": "cosine", "warmup_steps": 10},
        "training": {
            "epochs": 4,
            "gradient_accumulation_steps": 4,
            "micro_batch_size": 1,
            "compile": True,
        },
        "metrics": {"log_interval": 1},
    }


def test_keys_without_counterpart_and_dead_keys_are_told_apart(import_text: Importer) -> None:
    result = import_text(LLAMA_70B)
    assert told(result, "no_counterpart") == {"evals_per_epoch": 43, "saves_per_epoch": 44}
    assert told(result, "dropped") == {
        "fsdp_config.fsdp_limit_all_gathers": 50,
        "fsdp_config.fsdp_sharding_strategy": 58,
    }
    assert told(result, "unusable") == {}


def test_every_key_of_the_source_is_accounted_for(import_text: Importer) -> None:
    result = import_text(LLAMA_70B)
    said = {finding.key.split(".")[0] for finding in result.findings}
    written = {line.split(":")[0] for line in LLAMA_70B.splitlines() if line[:1].isalpha()}
    assert written - said == set()


def test_typo_of_a_shipped_example_is_found(import_text: Importer) -> None:
    result = import_text(LLAMA_70B + "context_parapllel_size: 2\n")
    assert told(result, "dropped")["context_parapllel_size"] == 64
    [message] = messages(result, "context_parapllel_size")
    assert message.endswith("did you mean `context_parallel_size`?")


def test_405b_with_packing_and_mixtral_with_shares(import_text: Importer) -> None:
    text = (
        "base_model: org/405B\nload_in_4bit: true\nadapter: qlora\nsequence_len: 2048\n"
        "datasets: [{path: rows.jsonl, type: chat_template}]\nsample_packing: true\n"
        "lora_r: 16\nlora_alpha: 16\nlora_target_modules: [q_proj, v_proj]\nbf16: true\n"
        "lora_target_linear: false\nwarmup_ratio: 0.1\nmax_steps: 50\nnum_epochs: 2\n"
        "fsdp: [shard_grad_op, offload]\noptimizer: paged_adamw_8bit\nsave_steps: 100\n"
        "wandb_project: p\nwandb_name: n\ntrust_remote_code: true\n"
    )
    result = import_text(text)
    document = result.document
    assert document["data"]["path"] == "rows.jsonl"
    assert document["data"]["packing"] == "best_fit"
    assert document["model"]["dtype"] == "bf16"
    assert document["adapter"]["target_modules"] == ["q_proj", "v_proj"]
    assert document["fsdp"] == {
        "strategy": "shard_grad_op",
        "offload": "cpu",
        "activation_checkpointing": "none",
    }
    assert document["training"] == {
        "steps": 50,
        "gradient_accumulation_steps": 1,
        "micro_batch_size": 1,
    }
    assert document["lr_scheduler"] == {"kind": "cosine", "warmup_ratio": 0.1}
    assert document["checkpoint"] == {"interval": 100}
    assert document["metrics"]["wandb"] == {"project": "p", "name": "n"}
    assert document["metrics"]["sinks"] == ["jsonl", "wandb"]
    assert told(result, "no_counterpart") == {"trust_remote_code": 20}
    assert told(result, "assumed") == {"optimizer": 16}
    assert told(result, "dropped") == {"num_epochs": 14}


@pytest.mark.parametrize(
    ("lines", "quantization", "adapter"),
    [
        ("adapter: lora", {"kind": "none"}, "lora"),
        ("adapter: lora\nload_in_8bit: true", {"kind": "hqq", "nbits": 8}, "lora"),
        ("adapter: qlora\nload_in_4bit: true\npeft_use_dora: true", {"kind": "bnb"}, "dora"),
        ("strict: true", {"kind": "none"}, "none"),
    ],
)
def test_bits_and_adapters(
    import_text: Importer, lines: str, quantization: dict[str, object], adapter: str
) -> None:
    text = f"base_model: a/b\ndatasets: [{{path: c/d, type: alpaca}}]\n{lines}\n"
    document = import_text(text, "axolotl").document
    assert document["quantization"] == quantization
    assert document["adapter"]["kind"] == adapter


def test_adapter_settings_of_a_full_finetuning_have_no_effect(import_text: Importer) -> None:
    text = "base_model: a/b\nlora_r: 8\ndatasets: [{path: c/d, type: completion}]\n"
    result = import_text(text, "axolotl")
    assert result.document["adapter"] == {"kind": "none"}
    assert told(result, "dropped") == {"lora_r": 2}
    assert result.document["data"] == {
        "dataset": "c/d", "format": "text", "seq_len": 512, "truncation": "drop",
    }  # fmt: skip


def test_unknown_type_and_unknown_key_are_told(import_text: Importer) -> None:
    text = "base_model: a/b\ndatasets:\n  - {path: c/d, type: made_up, sahrds: 2}\n"
    result = import_text(text, "axolotl")
    assert result.document["data"]["format"] == "auto"
    assert told(result, "assumed") == {"datasets.0.type": 3}
    assert messages(result, "datasets.0.sahrds")[0].endswith("did you mean `shards`?")


MIXED = """\
base_model: a/b
chat_template: chatml
datasets:
  - path: c/d
    type: chat_template
    field_messages: chat
    message_property_mappings: {role: who, content: value}
    roles_to_train: [gpt, tool]
    roles: {assistant: [gpt, model], user: [human, customer]}
    train_on_eos: last
    split: train_sft
    name: all
  - path: json
    data_files: [x.jsonl, y.jsonl]
    type: completion
    field: body
    shards: 4
  - {path: rows.jsonl, type: {field_instruction: q, field_output: a}, train_on_eos: turn}
  - {path: seg.jsonl, type: input_output}
test_datasets:
  - {path: t.jsonl, type: alpaca}
  - {path: u.jsonl, type: alpaca}
"""


def test_datasets_become_the_parts_of_a_mixture(import_text: Importer) -> None:
    result = import_text(MIXED)
    assert result.document["data"] == {
        "mixture": [
            {
                "dataset": "c/d",
                "config": "all",
                "split": "train_sft",
                "format": "messages",
                "columns": {"messages": "chat", "messages.role": "who"},
            },
            {
                "path": ["x.jsonl", "y.jsonl"],
                "split": "train[:25%]",
                "format": "text",
                "columns": {"text": "body"},
            },
            {
                "path": "rows.jsonl",
                "format": "prompt_completion",
                "columns": {"prompt": "q", "completion": "a"},
            },
            {"path": "seg.jsonl", "format": "input_output"},
        ],
        "seq_len": 512,
        "truncation": "drop",
        "chat_template": "chatml",
        "roles_to_train": ["assistant", "tool"],
        "train_on_eos": "last",
        "eval": {"path": "t.jsonl", "format": "alpaca"},
    }
    assert result.origins["data.mixture.1.split"] == "datasets.1.shards"
    assert told(result, "no_counterpart") == {
        "datasets.0.roles.user": 9, "datasets.2.train_on_eos": 18, "test_datasets": 20,
    }  # fmt: skip
    assert told(result, "assumed") == {"datasets.1.shards": 17, "datasets.2.type": 18}
    assert told(result, "refused")["datasets.3.path"] == 19, "there is no such file here"


def test_a_mixture_is_written_so_that_it_reads_back(import_text: Importer) -> None:
    result = import_text(MIXED)
    text = write_recipe(result)
    assert yaml.safe_load(text)["data"] == result.document["data"]
    assert "    - dataset: c/d                              # datasets.0.path\n" in text


def test_a_bad_value_of_a_part_is_left_out_alone(import_text: Importer) -> None:
    text = "base_model: a/b\ndatasets:\n  - {path: c/d, split: 'a b'}\n  - path: e/f\n"
    result = import_text(text, "axolotl")
    assert result.document["data"]["mixture"] == [{"dataset": "c/d"}, {"dataset": "e/f"}]
    [message] = messages(result, "datasets.0.split")
    assert message.startswith("`data.mixture.0.split` must be ")


@pytest.mark.parametrize(
    ("word", "format_name", "columns"),
    [
        ("oasst", "prompt_completion", {"prompt": "INSTRUCTION", "completion": "RESPONSE"}),
        ("alpaca_chat.load_qa", "qna_no_ctx", None),
        ("gpteacher:chat", "alpaca", {"output": "response"}),
        ("context_qa.load_v2", "qna", None),
        ("context_qa", "qna", {"context": "article"}),
        ("sharegpt", "messages", None),
    ],
)
def test_types_have_their_columns(
    import_text: Importer, word: str, format_name: str, columns: dict[str, str] | None
) -> None:
    text = f"base_model: a/b\ndatasets: [{{path: c/d, type: '{word}'}}]\n"
    data = import_text(text, "axolotl").document["data"]
    assert (data["format"], data.get("columns")) == (format_name, columns)


@pytest.mark.parametrize(
    ("lines", "template", "outcome"),
    [
        ("chat_template: tokenizer_default", None, "built_in"),
        ("chat_template: tokenizer_default_fallback_chatml", None, "assumed"),
        ("chat_template: phi_3", "phi3", "converted"),
        ("chat_template: made_up", None, "assumed"),
        ("chat_template_jinja: mine.jinja", "mine.jinja", "converted"),
        ("chat_template_jinja: '{{ messages }}'", None, "no_counterpart"),
    ],
)
def test_chat_templates(
    import_text: Importer, lines: str, template: str | None, outcome: str
) -> None:
    text = f"base_model: a/b\ndatasets: [{{path: c/d}}]\n{lines}\nstreaming: true\n"
    result = import_text(text, "axolotl")
    assert result.document["data"].get("chat_template") == template
    assert told(result, outcome)[lines.partition(":")[0]] == 3
    assert result.document["data"]["streaming"] is True
