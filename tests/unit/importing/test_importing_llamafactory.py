"""LLaMA-Factory: its FSDP QLoRA example with the accelerate config beside it."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from support.imported import messages, told

Importer = Callable[..., object]

LLAMA_8B = """\
model_name_or_path: org/Llama-8B-Instruct
quantization_bit: 4
stage: sft
do_train: true
finetuning_type: lora
lora_target: q_proj,v_proj
ddp_timeout: 180000000
dataset: alpaca_en,identity
template: llama3
cutoff_len: 1024
max_samples: 1000
overwrite_cache: true
preprocessing_num_workers: 16
output_dir: saves/sft
logging_steps: 10
save_steps: 500
plot_loss: true
overwrite_output_dir: true
per_device_train_batch_size: 1
gradient_accumulation_steps: 8
learning_rate: 1.0e-4
num_train_epochs: 3.0
lr_scheduler_type: cosine
warmup_ratio: 0.1
bf16: true
val_size: 0.1
per_device_eval_batch_size: 1
eval_strategy: steps
eval_steps: 500
flash_attn: fa2
enable_liger_kernel: true
"""

ACCELERATE = """\
compute_environment: LOCAL_MACHINE
distributed_type: FSDP
downcast_bf16: 'no'
fsdp_config:
  fsdp_auto_wrap_policy: TRANSFORMER_BASED_WRAP
  fsdp_backward_prefetch: BACKWARD_PRE
  fsdp_offload_params: true
  fsdp_sharding_strategy: SHARD_GRAD_OP
  fsdp_state_dict_type: FULL_STATE_DICT
  fsdp_use_orgi_params: true
mixed_precision: bf16
num_machines: 2
num_processes: 8
main_process_ip: 10.0.0.1
main_process_port: 29500
use_cpu: false
dynamo_config:
  dynamo_backend: INDUCTOR
"""


def test_fsdp_qlora_example_becomes_this_recipe(import_text: Importer) -> None:
    result = import_text(LLAMA_8B)
    assert result.tool == "llamafactory"
    assert result.document == {
        "version": 1,
        "name": "llama-8b-instruct-qlora",
        "description": "Imported from llamafactory",
        "model": {
            "name_or_path": "org/Llama-8B-Instruct",
            "dtype": "bf16",
            "attn_implementation": "flash_attention_2",
            "use_liger_kernel": True,
        },
        "quantization": {"kind": "bnb"},
        "adapter": {"kind": "lora", "rank": 8, "alpha": 16, "target_modules": ["q_proj", "v_proj"]},
        "data": {
            "mixture": [
                {"dataset": "llamafactory/alpaca_en", "format": "alpaca", "max_rows": 1000},
                {"path": "data/identity.json", "format": "auto", "max_rows": 1000},
            ],
            "seq_len": 1024,
            "eval_fraction": 0.1,
        },
        "optimizer": {"kind": "adamw", "lr": 1e-4},
        "lr_scheduler": {"kind": "cosine", "warmup_ratio": 0.1},
        "training": {
            "epochs": 3.0,
            "gradient_accumulation_steps": 8,
            "micro_batch_size": 1,
            "seed": 42,
            "eval_interval": 500,
        },
        "checkpoint": {"interval": 500},
        "metrics": {"log_interval": 10},
    }
    assert told(result, "no_counterpart") == {"per_device_eval_batch_size": 27}
    assert told(result, "assumed") == {"dataset": 8, "template": 9}
    assert told(result, "dropped") == {}


def test_accelerate_config_says_ranks_sharding_and_offload(import_text: Importer) -> None:
    result = import_text(LLAMA_8B, accelerate=ACCELERATE)
    assert result.document["fsdp"] == {"strategy": "shard_grad_op", "offload": "cpu"}
    assert result.document["launch"] == {
        "nproc_per_node": 4,
        "nnodes": 2,
        "rdzv_endpoint": "10.0.0.1:29500",
    }
    assert told(result, "dropped") == {"accelerate.fsdp_config.fsdp_use_orgi_params": 10}
    [message] = messages(result, "accelerate.fsdp_config.fsdp_use_orgi_params")
    assert message.endswith("did you mean `fsdp_use_orig_params`?")


def test_hqq_full_and_llama_pro(import_text: Importer) -> None:
    head = "model_name_or_path: a/b\ndataset: x\nstage: sft\n"
    hqq = import_text(head + "quantization_bit: 2\nquantization_method: hqq\nlora_rank: 4\n")
    assert hqq.document["quantization"] == {"kind": "hqq", "nbits": 2}
    assert hqq.document["adapter"] == {"kind": "lora", "rank": 4, "alpha": 8}
    full = import_text(
        head + "finetuning_type: full\npure_bf16: true\n"
        "fsdp_config:\n  mixed_precision_policy: fp16\n"
    )
    assert full.document["adapter"] == {"kind": "none"}
    assert full.document["fsdp"]["precision"] == "bf16"
    assert list(told(full, "dropped")) == ["fsdp_config.mixed_precision_policy"]
    pro = import_text(
        head + "finetuning_type: freeze\nuse_llama_pro: true\nfreeze_trainable_layers: 8\n"
    )
    assert pro.document["adapter"] == {"kind": "llama_pro", "num_new_layers": 8}


@pytest.mark.parametrize("line", ["learning_rate: banana", "learning_rate: -1", "lora_rnak: 4"])
def test_nonsense_is_reported_and_left_out(import_text: Importer, line: str) -> None:
    text = LLAMA_8B.replace("learning_rate: 1.0e-4", line)
    result = import_text(text)
    assert result.document["optimizer"].get("lr", 5e-5) == 5e-5
    key = line.partition(":")[0]
    outcome = "dropped" if key == "lora_rnak" else "unusable"
    assert told(result, outcome) == {key: 21}


def test_the_coefficient_of_the_router_loss_is_kept(import_text: Importer) -> None:
    result = import_text(LLAMA_8B + "moe_aux_loss_coef: 0.01\n")
    assert result.document["training"]["router_aux_loss_coef"] == 0.01


INFO = {
    "chats": {
        "hf_hub_url": "org/chats",
        "subset": "en",
        "formatting": "sharegpt",
        "columns": {"messages": "chat", "system": "prompt", "tools": "functions"},
        "tags": {"role_tag": "who", "content_tag": "value", "user_tag": "customer"},
    },
    "pairs": {"file_name": "pairs.json", "columns": {"prompt": "q", "response": "a"}},
    "own": {
        "file_name": "own.json",
        "columns": {"prompt": "task", "query": "input", "response": "output", "history": "old"},
    },
    "wiki": {"file_name": "wiki.json", "columns": {"prompt": "text"}},
}


def test_the_info_file_says_what_datasets_are(import_text: Importer, tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "dataset_info.json").write_text(json.dumps(INFO))
    result = import_text(
        "model_name_or_path: a/b\nstage: sft\ntemplate: llama3\ndataset: chats, pairs, own\n"
        "mix_strategy: interleave_over\ninterleave_probs: 0.5,0.3,0.2\nmask_history: true\n"
        "eval_dataset: wiki\neval_steps: 10\neval_strategy: steps\nstreaming: true\n"
        "buffer_size: 500\ndisable_shuffling: true\n"
    )
    data = result.document["data"]
    assert data["mixture"] == [
        {
            "dataset": "org/chats",
            "config": "en",
            "format": "messages",
            "columns": {
                "messages": "chat",
                "system": "prompt",
                "tools": "functions",
                "messages.role": "who",
            },
            "weight": 0.5,
        },
        {
            "path": "data/pairs.json",
            "format": "prompt_completion",
            "columns": {"prompt": "q", "completion": "a"},
            "weight": 0.3,
        },
        {
            "path": "data/own.json",
            "format": "alpaca",
            "columns": {"instruction": "task"},
            "weight": 0.2,
        },
    ]
    assert data["mixture_stopping"] == "all_exhausted"
    assert data["eval"] == {"path": "data/wiki.json", "format": "text"}
    assert (data["turns_to_train"], data["chat_template"]) == ("last", "llama3")
    assert (data["streaming"], data["stream_window"], data["shuffle"]) == (True, 500, False)
    assert result.document["training"]["eval_interval"] == 10
    lost = [finding.message for finding in result.of("no_counterpart")]
    assert lost == [
        "`user_tag` of `chats` in `dataset_info.json` is not used",
        "`history` of `own` in `dataset_info.json` is not used",
    ]


@pytest.mark.parametrize("content", ["[", "[]", '{"x": 3}'])
def test_an_info_file_that_is_none_is_no_end(
    import_text: Importer, tmp_path: Path, content: str
) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "dataset_info.json").write_text(content)
    result = import_text("model_name_or_path: a/b\ndataset: x\nstage: pt\nfinetuning_type: lora\n")
    assert result.document["data"]["path"] == "data/x.json"
    assert result.document["data"]["format"] == "text"


@pytest.mark.parametrize("probs", ["0.5", "a,b"])
def test_shares_that_fit_no_mixture_are_told(import_text: Importer, probs: str) -> None:
    result = import_text(
        "model_name_or_path: a/b\ndataset: x,y\nstage: sft\nfinetuning_type: lora\n"
        f"mix_strategy: interleave_under\ninterleave_probs: {probs}\n"
    )
    assert set(told(result, "unusable")) == {"interleave_probs"}
    assert "weight" not in result.document["data"]["mixture"][0]
