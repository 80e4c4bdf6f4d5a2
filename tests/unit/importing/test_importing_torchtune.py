"""torchtune: its 70B and 405B QLoRA configs, components out of closed tables, dead keys."""

from collections.abc import Callable

import pytest
from support.imported import messages, told

from fsdpq.importing.torchtune_components import MODELS

Importer = Callable[..., object]

QLORA_405B = """\
output_dir: /tmp/out
model:
  _component_: torchtune.models.llama3_1.qlora_llama3_1_405b
  lora_attn_modules: ['q_proj', 'v_proj', 'output_proj']
  apply_lora_to_mlp: True
  apply_lora_to_output: False
  lora_rank: 16
  lora_alpha: 32
tokenizer:
  _component_: torchtune.models.llama3.llama3_tokenizer
  path: /tmp/model/original/tokenizer.model
checkpointer:
  _component_: torchtune.training.FullModelHFCheckpointer
  checkpoint_dir: /tmp/model/
  checkpoint_files:
    filename_format: model-{}-of-{}.safetensors
    max_filename: "00191"
  recipe_checkpoint: null
  output_dir: ${output_dir}
  model_type: LLAMA3
resume_from_checkpoint: False
save_adapter_weights_only: True
dataset:
  _component_: torchtune.datasets.alpaca_dataset
  packed: False
  train_on_input: True
seed: null
shuffle: True
batch_size: 1
optimizer:
  _component_: torch.optim.AdamW
  weight_decay: 0.01
  lr: 3e-4
  fused: True
lr_scheduler:
  _component_: torchtune.training.lr_schedulers.get_cosine_schedule_with_warmup
  num_warmup_steps: 100
loss:
  _component_: torchtune.modules.loss.CEWithChunkedOutputLoss
fsdp:
  cpu_offload: False
epochs: 1
max_steps_per_epoch: null
gradient_accumulation_steps: 8
clip_grad_norm: null
compile: {model: True, loss: True}
metric_logger:
  _component_: torchtune.training.metric_logging.DiskLogger
  log_dir: ${output_dir}/logs
log_every_n_steps: 1
log_peak_memory_stats: True
device: cuda
dtype: bf16
enable_activation_checkpointing: True
enable_activation_offloading: False
profiler:
  _component_: torchtune.training.setup_torch_profiler
  enabled: False
  output_dir: ${output_dir}/profiling_outputs
  cpu: True
  wait_steps: 5
  warmup_steps: 3
  active_steps: 2
"""


def test_405b_qlora_becomes_this_recipe(import_text: Importer) -> None:
    result = import_text(QLORA_405B)
    assert result.tool == "torchtune"
    assert result.document == {
        "version": 1,
        "name": "model-qlora",
        "description": "Imported from torchtune",
        "model": {"name_or_path": "/tmp/model/"},
        "quantization": {"kind": "bnb"},
        "adapter": {
            "kind": "lora",
            "rank": 16,
            "alpha": 32,
            "target_modules": [
                "q_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj",
            ],
        },
        "fsdp": {
            "precision": "bf16",
            "activation_checkpointing": "full",
            "activation_offload": False,
        },
        "data": {
            "dataset": "tatsu-lab/alpaca",
            "format": "alpaca",
            "seq_len": 2048,
            "train_on_prompt": True,
        },
        "optimizer": {"kind": "adamw", "lr": 3e-4, "weight_decay": 0.01},
        "lr_scheduler": {"kind": "cosine", "warmup_steps": 100},
        "training": {
            "epochs": 1,
            "gradient_accumulation_steps": 8,
            "micro_batch_size": 1,
            "max_grad_norm": None,
            "compile": True,
        },
        "metrics": {"log_interval": 1, "log_memory": True},
        "launch": {"device": "cuda"},
    }  # fmt: skip


def test_dead_offload_switch_of_the_shipped_config_is_found(import_text: Importer) -> None:
    result = import_text(QLORA_405B)
    assert told(result, "dropped") == {"fsdp.cpu_offload": 41}
    assert messages(result, "fsdp.cpu_offload") == [
        "torchtune's recipes never look at it; did you mean `fsdp_cpu_offload`?"
    ]
    assert told(result, "no_counterpart") == {}
    [message] = messages(result, "checkpointer.checkpoint_dir")
    assert "`meta-llama/Llama-3.1-405B-Instruct`" in message


def test_70b_lora_with_offload_steps_and_typos(import_text: Importer) -> None:
    text = QLORA_405B.replace("qlora_llama3_1_405b", "lora_llama3_3_70b")
    text = text.replace("epochs: 1", "epohcs: 1").replace("save_adapter_weights_only: True\n", "")
    text = text.replace("max_steps_per_epoch: null", "max_steps_per_epoch: 20")
    text = text.replace("fsdp:\n  cpu_offload: False", "fsdp_cpu_offload: True")
    text = text.replace("packed: False", "packed: True").replace("lr: 3e-4", "lr: banana")
    text = text.replace("lora_rank: 16", "lora_rnak: 16")
    result = import_text(text)
    assert result.document["quantization"] == {"kind": "none"}
    assert result.document["fsdp"]["offload"] == "cpu"
    assert result.document["training"]["steps"] == 20
    assert result.document["data"]["packing"] == "best_fit"
    assert result.document["export"] == {"merge": True}
    assert "lr" not in result.document["optimizer"]
    assert told(result, "unusable") == {"optimizer.lr": 32}
    assert set(told(result, "dropped")) == {"epohcs", "model.lora_rnak"}
    assert messages(result, "epohcs")[0].endswith("did you mean `epochs`?")
    assert messages(result, "model.lora_rnak")[0].endswith("did you mean `lora_rank`?")


def test_dora_fused_matrices_wandb_and_profiler(import_text: Importer) -> None:
    text = """\
model: {_component_: torchtune.models.phi3.lora_phi3_mini, use_dora: true, quantize_base: true,
  lora_attn_modules: [q_proj, k_proj, v_proj, output_proj], apply_lora_to_mlp: true}
tokenizer: {max_seq_len: 4096}
checkpointer: {_component_: torchtune.training.FullModelMetaCheckpointer, checkpoint_dir: /m}
dataset: {_component_: torchtune.datasets.chat_dataset, source: json, data_files: chats.json,
  conversation_column: dialogue, conversation_style: openai, split: train}
batch_size: 2
epochs: 3
loss: {_component_: torchtune.modules.loss.LinearCrossEntropyLoss}
optimizer: {_component_: bitsandbytes.optim.PagedAdamW8bit, lr: 2e-5}
metric_logger: {_component_: torchtune.training.metric_logging.WandBLogger, project: p}
profiler: {enabled: true, wait_steps: 1, warmup_steps: 2, active_steps: 4}
fsdp_reshard_after_forward: false
clip_grad_norm: 1.0
ac_mode: selective
"""
    result = import_text(text)
    document = result.document
    assert document["model"] == {"name_or_path": "microsoft/Phi-3-mini-4k-instruct"}
    assert document["quantization"] == {"kind": "bnb"}
    assert document["adapter"]["kind"] == "dora"
    assert document["adapter"]["target_modules"] == "all-linear"
    assert document["fsdp"] == {
        "strategy": "shard_grad_op",
        "activation_checkpointing": "selective",
    }
    assert document["data"]["path"] == "chats.json"
    assert "dataset" not in document["data"]
    assert document["metrics"]["sinks"] == ["jsonl", "wandb"]
    assert document["metrics"]["wandb"] == {"project": "p"}
    assert document["metrics"]["profile"] == {"start_step": 4, "num_steps": 4}
    assert document["training"]["max_grad_norm"] == 1.0
    assert told(result, "no_counterpart") == {}


@pytest.mark.parametrize("prefix", ["", "lora_", "qlora_"])
@pytest.mark.parametrize("model", ["llama2_70b", "mistral_7b", "qwen2_5_7b_instruct"])
def test_model_components_are_words(import_text: Importer, prefix: str, model: str) -> None:
    text = (
        f"model: {{_component_: torchtune.models.any.{prefix}{model}}}\n"
        "dataset: {source: a/b, _component_: torchtune.datasets.instruct_dataset}\n"
        "optimizer: {lr: 1e-4}\n"
    )
    document = import_text(text).document
    assert document["model"]["name_or_path"] == MODELS[model]
    assert document["quantization"]["kind"] == ("bnb" if prefix == "qlora_" else "none")
    assert document["adapter"]["kind"] == ("lora" if prefix else "none")


def test_component_that_runs_code_is_only_a_word(import_text: Importer) -> None:
    text = QLORA_405B.replace("torchtune.datasets.alpaca_dataset", "os.system")
    result = import_text(text.replace("torch.optim.AdamW", "builtins.eval"))
    assert set(told(result, "no_counterpart")) == {"dataset._component_", "optimizer._component_"}
    assert result.document["optimizer"]["kind"] == "adamw"


def test_datasets_that_are_joined_and_their_columns(import_text: Importer) -> None:
    result = import_text(
        "model: {_component_: torchtune.models.llama3.lora_llama3_8b}\noptimizer: {lr: 1e-4}\n"
        "dataset:\n"
        "  - {_component_: torchtune.datasets.samsum_dataset, split: 'train[:10%]'}\n"
        "  - _component_: torchtune.datasets.instruct_dataset\n"
        "    source: json\n"
        "    data_files: rows.json\n"
        "    column_map: {input: q, output: a, extra: b}\n"
        "  - {_component_: torchtune.datasets.chat_dataset, source: a/b, conversation_column: c}\n"
        "  - {_component_: torchtune.datasets.text_completion_dataset, source: a/w, column: page}\n"
        "dataset_val: {_component_: torchtune.datasets.alpaca_dataset, split: 'train[90%:]'}\n"
        "run_val_every_n_steps: 20\nshuffle: false\n"
    )
    data = result.document["data"]
    assert data["mixture"] == [
        {
            "dataset": "Samsung/samsum",
            "split": "train[:10%]",
            "format": "prompt_completion",
            "columns": {"prompt": "dialogue", "completion": "summary"},
        },
        {
            "path": "rows.json",
            "format": "prompt_completion",
            "columns": {"prompt": "q", "completion": "a"},
        },
        {"dataset": "a/b", "format": "messages", "columns": {"messages": "c"}},
        {"dataset": "a/w", "format": "text", "columns": {"text": "page"}},
    ]
    assert data["eval"] == {
        "dataset": "tatsu-lab/alpaca", "split": "train[90%:]", "format": "alpaca",
    }  # fmt: skip
    assert data["shuffle"] is False
    assert "train_on_prompt" not in data
    assert result.document["training"]["eval_interval"] == 20
    assert list(told(result, "no_counterpart")) == ["dataset.1.column_map.extra"]
    assert "asks for a summary is left out" in messages(result, "dataset.0._component_")[0]
