"""The seed: all its flags, every command of its README, and what a shell makes of them."""

import shlex
from collections.abc import Callable
from pathlib import Path

import pytest
from support.imported import messages, told

from fsdpq.errors import UsageError
from fsdpq.importing.convert import import_words
from fsdpq.importing.fsdp_qlora import DATASETS, RULES, TRAIN_TYPES
from fsdpq.importing.known_keys import FSDP_QLORA

Importer = Callable[..., object]

DUAL_24GB = """\
python train.py \\
--model_name meta-llama/Llama-2-70b-hf \\
--batch_size 2 \\
--context_length 2048 \\
--precision bf16 \\
--train_type qlora \\
--use_gradient_checkpointing true \\
--use_cpu_offload true \\
--dataset alpaca \\
--reentrant_checkpointing true
"""

OPTIONS = """\
export CUDA_VISIBLE_DEVICES=4,5 # which devices
python train.py \\
--world_size 2 \\ # found by itself on one machine
--master_port 12356 \\ # 12355 otherwise
--model_name meta-llama/Llama-2-7b-hf \\
--gradient_accumulation_steps 4 \\
--batch_size 8 \\
--context_length 512 \\
--precision bf16 \\
--train_type full \\
--use_gradient_checkpointing true \\
--use_cpu_offload false \\
--use_activation_cpu_offload false \\
--log_to wandb \\
--dataset alpaca
"""

FOUR_A100 = """\
export CUDA_VISIBLE_DEVICES=4,5,6,7
python train.py \\
--world_size 4 \\
--master_port 12356 \\
--model_name meta-llama/Llama-2-70b-hf \\
--gradient_accumulation_steps 4 \\
--batch_size 2 \\
--context_length 512 \\
--precision bf16_buffers_autocast \\
--train_type custom_qlora \\
--use_gradient_checkpointing true \\
--reentrant_checkpointing true
--use_cpu_offload false \\
--log_to stdout \\
--dataset alpaca
"""

GUANACO = (
    "train.py --train_type qlora --dataset guanaco --batch_size 8 --lr_scheduler cosine "
    "--log_to wandb --save_model True --output_dir guanaco_7B --gradient_accumulation_steps 2 "
    "--lr 2e-4"
)

ADAMW = {"kind": "adamw", "lr": 1e-5, "betas": [0.9, 0.95], "eps": 1e-5, "weight_decay": 0.1}
LORA = {
    "kind": "lora",
    "rank": 64,
    "alpha": 16,
    "dropout": 0.1,
    "target_modules": ["k_proj", "q_proj", "v_proj", "up_proj", "down_proj", "gate_proj"],
}


def test_there_are_54_flags_and_each_has_a_rule() -> None:
    assert len(FSDP_QLORA) == 54
    assert set(RULES) == FSDP_QLORA


def test_readme_70b_on_two_24gb_cards(import_text: Importer) -> None:
    result = import_text(DUAL_24GB, "fsdp_qlora")
    assert result.document == {
        "version": 1,
        "name": "llama-2-70b-hf-qlora",
        "description": "Imported from fsdp_qlora",
        "model": {"name_or_path": "meta-llama/Llama-2-70b-hf"},
        "quantization": {"kind": "bnb"},
        "adapter": LORA,
        "fsdp": {"offload": "cpu", "precision": "bf16", "activation_checkpointing": "full"},
        "data": {"dataset": "yahma/alpaca-cleaned", "format": "alpaca", "seq_len": 2048},
        "optimizer": ADAMW,
        "lr_scheduler": {"kind": "constant"},
        "training": {
            "epochs": 1,
            "gradient_accumulation_steps": 1,
            "micro_batch_size": 2,
            "max_grad_norm": None,
            "seed": 42,
        },
    }
    for outcome in ("dropped", "unusable", "no_counterpart", "assumed"):
        assert told(result, outcome) == {}


@pytest.mark.parametrize(
    ("train_type", "quantization", "adapter"),
    [
        ("full", {"kind": "none"}, {"kind": "none"}),
        ("lora", {"kind": "none"}, LORA),
        ("custom_lora", {"kind": "none"}, LORA),
        ("qlora", {"kind": "bnb"}, LORA),
        ("custom_qlora", {"kind": "bnb"}, LORA),
        ("hqq_lora", {"kind": "hqq", "group_size": 64}, LORA),
    ],
)
def test_readme_options_with_every_train_type_it_names(
    import_text: Importer,
    train_type: str,
    quantization: dict[str, object],
    adapter: dict[str, object],
) -> None:
    text = OPTIONS.replace("--train_type full", f"--train_type {train_type}")
    result = import_text(text, "fsdp_qlora")
    assert result.document["quantization"] == quantization
    assert result.document["adapter"] == adapter
    assert result.document["fsdp"] == {
        "precision": "bf16",
        "activation_checkpointing": "full",
        "activation_offload": False,
    }
    assert result.document["launch"] == {"nproc_per_node": 2}
    assert result.document["metrics"] == {
        "sinks": ["jsonl", "wandb"],
        "wandb": {"project": "fsdp_qlora"},
    }
    assert told(result, "unusable") == told(result, "dropped") == {}


def test_readme_4_a100_misses_a_backslash_and_is_taken_as_meant(import_text: Importer) -> None:
    result = import_text(FOUR_A100, "fsdp_qlora")
    assert result.document["data"] == {
        "dataset": "yahma/alpaca-cleaned",
        "format": "alpaca",
        "seq_len": 512,
    }
    assert "offload" not in result.document["fsdp"]
    assert told(result, "assumed") == {"use_cpu_offload": 13}
    hqq = FOUR_A100.replace("--train_type custom_qlora", "--train_type hqq_lora")
    hqq = hqq.replace("--reentrant_checkpointing true\n", "")
    result = import_text(hqq, "fsdp_qlora")
    assert result.document["quantization"] == {"kind": "hqq", "group_size": 64}
    assert result.document["fsdp"]["precision"] == "bf16_buffers_autocast"
    assert told(result, "assumed") == {"train_type": 10}


def test_readme_guanaco_given_as_words(tmp_path: Path) -> None:
    document = import_words(GUANACO.split(), base_dir=tmp_path).document
    assert document["data"]["dataset"] == "timdettmers/openassistant-guanaco"
    assert document["data"]["format"] == "guanaco"
    assert document["optimizer"]["lr"] == 2e-4
    assert document["lr_scheduler"] == {
        "kind": "cosine",
        "warmup_ratio": 0.1,
        "min_lr_ratio": 0.1,
    }
    assert document["training"]["gradient_accumulation_steps"] == 2
    assert document["fsdp"]["offload"] == "cpu"
    assert document["fsdp"]["no_sync"] is True


def test_slurm_script_with_variables_is_read_and_not_expanded(import_text: Importer) -> None:
    text = (
        "#SBATCH --nodes=1\nexport MASTER_PORT=12342\nsrun python $DIR/train.py \\\n"
        "--world_size=$WORLD_SIZE \\\n--master_addr=$MASTER_ADDR \\\n--dataset dummy \\\n"
        "--train_type hqq_lora --sharding_strategy full_shard --verbose true\n"
    )
    result = import_text(text, "fsdp_qlora")
    assert result.document["data"]["format"] == "dummy"
    assert result.document["data"]["max_rows"] == 512
    assert told(result, "unusable") == {"world_size": 4, "master_addr": 5}
    assert "launch" not in result.document


@pytest.mark.parametrize("train_type", TRAIN_TYPES)
@pytest.mark.parametrize("dataset", DATASETS)
def test_every_train_type_and_dataset_makes_a_recipe(
    tmp_path: Path, train_type: str, dataset: str
) -> None:
    words = ["--train_type", train_type, "--dataset", dataset]
    result = import_words(words, base_dir=tmp_path)
    quantization, adapter = TRAIN_TYPES[train_type]
    assert result.document["quantization"]["kind"] == quantization
    assert result.document["adapter"]["kind"] == adapter
    assert told(result, "unusable") == {}


def test_llama_pro_reads_the_layers_off_the_path(tmp_path: Path) -> None:
    words = ["--train_type", "bnb_llama_pro", "--llama_pro_path", "m/llama_blk_exp-32-35"]
    document = import_words(words, base_dir=tmp_path).document
    assert document["adapter"] == {"kind": "llama_pro", "num_new_layers": 3}


def test_flags_that_train_py_ignores_are_told(tmp_path: Path) -> None:
    words = shlex.split(
        "--train_type bnb_dora --lora_alpha 8 --lora_rank 32 --n_bits 3 --grad_norm 1.0 "
        "--dataset alpaca --dataset_samples 10 --name x --optimizer sgd --wd 0.2 --with_stack "
        "true"
    )
    result = import_words(words, base_dir=tmp_path)
    ignored = {"lora_alpha", "n_bits", "grad_norm", "dataset_samples", "name", "wd", "with_stack"}
    assert set(told(result, "dropped")) == ignored
    assert result.document["adapter"] == {
        "kind": "dora",
        "rank": 32,
        "alpha": 32,
        "target_modules": LORA["target_modules"],
    }
    assert result.document["optimizer"] == {"kind": "sgd", "lr": 1e-5}


def test_unknown_flag_and_stray_word_are_told(import_text: Importer) -> None:
    result = import_text("python train.py --lora_rnak 8 stray --seed 1\n", "fsdp_qlora")
    assert told(result, "dropped") == {"lora_rnak": 1}
    assert messages(result, "lora_rnak")[0].endswith("did you mean `lora_rank`?")
    assert told(result, "unusable") == {"": 1}
    assert result.document["training"]["seed"] == 1


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (DUAL_24GB + FOUR_A100, "holds 2 commands, on lines 1, 12"),
        ("axolotl train config.yml\n", "holds no command"),
        ("", "holds no command"),
        ("--what 1\n", "holds no command"),
    ],
)
def test_file_without_one_command_is_refused(
    import_text: Importer, text: str, message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        import_text(text, "fsdp_qlora")


def test_settings_of_profiler_clipping_and_nodes(tmp_path: Path) -> None:
    words = shlex.split(
        "--profile true --warmup_steps 1 --active_steps 2 --profiling_frequency 10 "
        "--apply_gradient_clipping true --grad_norm 0.5 --master_addr node1 --master_port "
        "1234 --precision mp_bf16_autocast --max_steps 8 --gradient_accumulation_steps 2 "
        "--use_cpu_offload false --no_sync true --lora_target_modules default"
    )
    document = import_words(words, base_dir=tmp_path).document
    assert document["metrics"]["profile"] == {"start_step": 9, "num_steps": 2}
    assert document["training"]["max_grad_norm"] == 0.5
    assert document["training"]["steps"] == 4
    assert document["launch"] == {"rdzv_endpoint": "node1:1234"}
    assert document["fsdp"] == {"precision": "bf16_autocast", "no_sync": True}
    assert document["adapter"]["target_modules"] == ["q_proj", "v_proj"]
