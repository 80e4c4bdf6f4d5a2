"""TRL: YAML of ``trl sft``, its defaults, and what it forwards to accelerate unread."""

from collections.abc import Callable

from support.imported import messages, told

Importer = Callable[..., object]

QLORA = """\
model_name_or_path: org/small
dataset_name: org/chats
dataset_train_split: train_sft
use_peft: true
lora_r: 32
lora_alpha: 16
load_in_4bit: true
lora_target_modules: all-linear
use_dora: true
max_length: 2048
packing: true
learning_rate: 2.0e-4
gradient_checkpointing: true
report_to: wandb
run_name: first
bf16: true
use_4bit: true
max_seq_lenght: 4096
use_liger_kernel: true
"""


def test_qdora_becomes_this_recipe(import_text: Importer) -> None:
    result = import_text(QLORA)
    assert result.tool == "trl"
    assert result.document == {
        "version": 1,
        "name": "small-qdora",
        "description": "Imported from trl",
        "model": {"name_or_path": "org/small", "dtype": "bf16", "use_liger_kernel": True},
        "quantization": {"kind": "bnb", "double_quant": False},
        "adapter": {
            "kind": "dora",
            "rank": 32,
            "alpha": 16,
            "dropout": 0.05,
            "target_modules": "all-linear",
        },
        "fsdp": {"activation_checkpointing": "full"},
        "data": {
            "dataset": "org/chats",
            "split": "train_sft",
            "seq_len": 2048,
            "packing": "best_fit",
            "train_on_prompt": True,
        },
        "optimizer": {"kind": "adamw", "lr": 2e-4},
        "lr_scheduler": {"kind": "linear"},
        "training": {
            "epochs": 3.0,
            "gradient_accumulation_steps": 1,
            "micro_batch_size": 8,
            "seed": 42,
        },
        "metrics": {
            "log_interval": 10,
            "sinks": ["jsonl", "wandb"],
            "wandb": {"project": "huggingface", "name": "first"},
        },
    }


def test_unknown_keys_carry_a_line_and_a_guess(import_text: Importer) -> None:
    result = import_text(QLORA)
    assert told(result, "dropped") == {"use_4bit": 17, "max_seq_lenght": 18}
    assert messages(result, "use_4bit")[0].endswith("did you mean `load_in_4bit`?")
    assert messages(result, "max_seq_lenght")[0].endswith("did you mean `max_seq_length`?")


def test_defaults_that_are_written_out_are_listed(import_text: Importer) -> None:
    defaults = {f.target for f in import_text(QLORA).of("default")}
    assert {"quantization.double_quant", "training.epochs"} <= defaults


def test_targets_of_peft_are_an_assumption(import_text: Importer) -> None:
    text = "model_name_or_path: a/b\ndataset_name: rows.jsonl\nuse_peft: true\nmax_length: 64\n"
    result = import_text(text, "trl")
    assert result.document["adapter"]["target_modules"] == ["q_proj", "v_proj"]
    assert result.document["data"]["path"] == "rows.jsonl"
    assert "lora_target_modules" in told(result, "assumed")


def test_full_finetuning_with_accelerate_fsdp2(import_text: Importer) -> None:
    text = (
        "model_name_or_path: a/b\ndataset_name: c/d\nassistant_only_loss: true\n"
        "load_in_4bit: true\ndataset_text_field: body\ntruncation_mode: keep_end\nlora_r: 8\n"
    )
    accelerate = (
        "distributed_type: FSDP\nmixed_precision: bf16\nnum_processes: 8\nfsdp_config:\n"
        "  fsdp_version: 2\n  fsdp_reshard_after_forward: false\n"
        "  fsdp_activation_checkpointing: false\n  fsdp_mixed_precision_policy: bf16\n"
        "num_proceses: 3\n"
    )
    result = import_text(text, "trl", accelerate=accelerate)
    assert result.document["adapter"] == {"kind": "none"}
    assert result.document["quantization"] == {"kind": "none"}
    assert result.document["fsdp"] == {
        "strategy": "shard_grad_op",
        "activation_checkpointing": "full",
        "precision": {"compute": "bf16", "reduce": "bf16"},
    }
    assert result.document["launch"] == {"nproc_per_node": 8}
    assert result.document["data"]["format"] == "text"
    assert result.document["data"]["columns"] == {"text": "body"}
    assert result.document["data"]["truncation"] == "truncate_start"
    assert result.document["data"]["train_on_prompt"] is False
    assert told(result, "no_counterpart") == {"load_in_4bit": 4}
    assert told(result, "dropped") == {"lora_r": 7, "accelerate.num_proceses": 9}


def test_the_coefficient_of_the_router_loss_is_kept(import_text: Importer) -> None:
    result = import_text(QLORA + "router_aux_loss_coef: 0.0\n")
    assert result.document["training"]["router_aux_loss_coef"] == 0.0


def test_a_mixture_and_its_files_are_taken(import_text: Importer) -> None:
    result = import_text(
        "model_name_or_path: a/b\nmax_length: 64\ndatasets:\n"
        "  - {path: org/chats, name: en, split: 'train[:10%]', columns: [messages], fraction: 3}\n"
        "  - {path: json, data_files: rows.jsonl, data_dir: x, fraction: 1}\n"
        "chat_template_path: mine.jinja\nstreaming: true\ntest_split_size: 0.1\n",
        "trl",
    )
    assert result.document["data"]["mixture"] == [
        {"dataset": "org/chats", "config": "en", "split": "train[:10%]", "weight": 3},
        {"path": "rows.jsonl", "weight": 1},
    ]
    assert result.document["data"]["chat_template"] == "mine.jinja"
    assert result.document["data"]["streaming"] is True
    assert list(told(result, "no_counterpart")) == ["datasets.1.data_dir"]
    assert "train_on_prompt" in str(result.of("assumed"))


def test_the_test_split_is_evaluated_where_the_config_evaluates(import_text: Importer) -> None:
    text = (
        "model_name_or_path: a/b\ndataset_name: c/d\ndataset_config: en\nmax_length: 64\n"
        "dataset_test_split: validation\ndataset_text_field: body\n"
    )
    assert "eval" not in import_text(text, "trl").document["data"]
    result = import_text(text + "eval_strategy: steps\neval_steps: 5\n", "trl")
    assert result.document["data"]["config"] == "en"
    assert result.document["data"]["eval"] == {
        "dataset": "c/d",
        "split": "validation",
        "config": "en",
        "format": "text",
        "columns": {"text": "body"},
    }
    assert result.document["training"]["eval_interval"] == 5
    assert "train_on_prompt" not in result.document["data"], "all of a text is trained on"


def test_a_fraction_of_one_dataset_asks_for_nothing(import_text: Importer) -> None:
    result = import_text(
        "model_name_or_path: a/b\nmax_length: 64\ndatasets: [{path: c/d, fraction: 0.5}]\n", "trl"
    )
    assert result.document["data"]["dataset"] == "c/d"
    assert list(told(result, "dropped")) == ["datasets.0.fraction"]
