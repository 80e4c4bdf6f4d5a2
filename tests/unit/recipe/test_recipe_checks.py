"""Every cross-section rule: what it refuses, what it says, what it lets through."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from fsdpq.errors import Problem
from fsdpq.recipe import checks
from fsdpq.recipe.checks import CHECKS, NOTICES, adapter, batch, output
from fsdpq.recipe.load import dump_recipe
from fsdpq.recipe.root import Recipe

RULES = {check.__name__: check for check in CHECKS}
BASE: dict[str, Any] = {
    "version": 1,
    "name": "r",
    "model": {"name_or_path": "meta-llama/Llama-2-7b-hf"},
    "data": {"dataset": "pypi:chatterbot-english"},
}
KINDS = {"quantization": "bnb", "adapter": "lora", "optimizer": "adamw", "lr_scheduler": "cosine"}


def recipe(**edits: Any) -> Recipe:
    """Returns a recipe with ``section__field=value`` on top of the smallest one."""
    data: dict[str, Any] = json.loads(json.dumps(BASE))
    for name, value in edits.items():
        section, _, field = name.partition("__")
        kind = {"kind": KINDS[section]} if section in KINDS else {}
        data.setdefault(section, kind)[field] = value
    return Recipe.model_validate_json(json.dumps(data), strict=True)


def ask(rule: str, base_dir: Path = Path(), **edits: Any) -> list[Problem]:
    return list(RULES[rule](recipe(**edits), base_dir))


HQQ = {"quantization__kind": "hqq"}
PRO = {"adapter__kind": "llama_pro"}
FULL = {"adapter__kind": "none", "quantization__kind": "none"}
LIGER = {"model__use_liger_kernel": True}
FLASH = {"model__attn_implementation": "flash_attention_2"}
SMOLLM = {"model__name_or_path": "pypi:smollm2-135m-instruct"}
GEMMA2 = {"model__name_or_path": "google/gemma-2-9b"}
FALCON = {"model__name_or_path": "tiiuae/falcon-7b"}
WSD = {"lr_scheduler__kind": "wsd"}
STREAM = {"data__streaming": True, "training__steps": 100}
MIXED = {"data__dataset": None, "data__mixture": [{"path": "a"}, {"path": "b"}]}
WANDB = {"metrics__sinks": ["wandb"]}

CASES: list[tuple[str, dict[str, Any], str, str, str]] = [
    ("check_model_revision_used", {**SMOLLM, "model__revision": "main"},
     "model.revision", "it is pinned", "delete `revision`"),
    ("check_seq_len_fits", {"data__seq_len": 4097},
     "data.seq_len", "4097 and the model's context is 4096 tokens", "`seq_len: 4096`"),
    ("check_dtype_agrees", {"model__dtype": "bf16", "fsdp__precision": "fp16_autocast"},
     "model.dtype", "fp16_autocast`, which keeps weights in fp32", "`dtype: fp32`"),
    ("check_dtype_agrees", {"model__dtype": "bf16", "fsdp__precision": {"compute": "fp32"}},
     "model.dtype", "`fsdp.precision.compute: fp32`, which computes in fp32", "use `dtype: fp32`"),
    ("check_dtype_agrees", {"model__dtype": "fp16", "fsdp__precision": {"compute": "bf16"}},
     "model.dtype", "computes in bf16", "`dtype: fp32` or `dtype: bf16`"),
    ("check_param_trains", {"fsdp__precision": {"param": "fp16", "compute": "fp16"}},
     "fsdp.precision.param", "zero below", "`param: fp32` with `compute: fp16`"),
    ("check_param_trains", {"fsdp__precision": {"param": "bf16"}, "model__dtype": "fp16"},
     "fsdp.precision.param", "beside products in fp16", "`param: fp32`"),
    ("check_buffers_meet_compute", {"fsdp__precision": {"buffers": "bf16", "compute": "fp32"}},
     "fsdp.precision.buffers", "products are in fp32", "`compute: bf16` beside it"),
    ("check_buffers_meet_compute", {"fsdp__precision": {"buffers": "fp16"}},
     "fsdp.precision.buffers", "the machine has", "`buffers: fp32`"),
    ("check_reduce_sends",
     {"fsdp__precision": {"reduce": "bf16"}, "launch__nproc_per_node": 1},
     "fsdp.precision.reduce", "with one rank nothing is sent", "delete `reduce`"),
    ("check_router_loss_has_routers", {"training__router_aux_loss_coef": 0.01},
     "training.router_aux_loss_coef", "the model has none", "delete"),
    ("check_flash_attention_runs", {**FLASH, "launch__device": "cpu"},
     "model.attn_implementation", "needs a GPU", "sdpa"),
    ("check_flash_attention_runs", {**FLASH, "model__dtype": "fp32"},
     "model.attn_implementation", "`model.dtype` is `fp32`", "bf16"),
    ("check_flash_attention_runs", {**FLASH, "fsdp__precision": "fp32"},
     "model.attn_implementation", "`fsdp.precision` is `fp32`", "bf16"),
    ("check_flash_attention_runs", {**FLASH, "fsdp__precision": {"compute": "fp32"}},
     "model.attn_implementation", "`fsdp.precision.compute` is `fp32`", "bf16"),
    ("check_flex_attention_runs",
     {"model__attn_implementation": "flex_attention", "launch__device": "cpu"},
     "model.attn_implementation", "cannot be trained on a CPU", "sdpa"),
    ("check_flex_attention_runs_whole",
     {"model__attn_implementation": "flex_attention", "training__layer_chunks": 2},
     "model.attn_implementation", "all rows at once, and `training.layer_chunks` is 2",
     "layer_chunks: 1`, or"),
    ("check_liger_kernel_runs", {**LIGER, "launch__device": "cpu"},
     "model.use_liger_kernel", "needs a GPU", "delete `use_liger_kernel`"),
    ("check_liger_kernel_used", {**LIGER, **FALCON},
     "model.use_liger_kernel", "has no effect on `falcon` models", "delete `use_liger_kernel`"),
    ("check_architecture_has_attention", GEMMA2,
     "model.attn_implementation", "`gemma2` models do not run with", "eager"),
    ("check_architecture_has_attention",
     {**FALCON, "model__attn_implementation": "flex_attention"},
     "model.attn_implementation", "`falcon` models do not run with", "eager"),
    ("check_packed_rows_stay_apart", {**FALCON, **FLASH, "data__packing": "best_fit"},
     "data.packing", "packed rows of `falcon` models would see each other", "sdpa"),
    ("check_packed_rows_stay_apart",
     {**FLASH, "data__packing": "best_fit", "training__layer_chunks": 3},
     "data.packing", "is one sequence, and here it is 2", "training.layer_chunks: 4` or `1`"),
    ("check_base_can_be_trained", {"adapter__kind": "none"},
     "adapter.kind", "quantized weights cannot be trained", "quantization: {kind: none}"),
    ("check_hqq_groups_fit", {**SMOLLM, **HQQ, "quantization__group_size": 128},
     "quantization.group_size", "does not divide the 576 inputs of `self_attn.q_proj`",
     "`16`, `32`, `64` or `null`"),
    ("check_hqq_groups_fit",
     {**FALCON, **HQQ, "quantization__nbits": 1, "quantization__group_size": 256},
     "quantization.group_size", "4544 inputs", "`16`, `32`, `64` or `null`"),
    ("check_hqq_groups_fit",
     {**SMOLLM, **HQQ, "quantization__group_size": 256, "quantization__axis": 0},
     "quantization.group_size", "does not divide the 576 outputs of `self_attn.q_proj`",
     "`16`, `32`, `64` or `axis: 1`"),
    ("check_hqq_columns_have_groups",
     {**HQQ, "quantization__group_size": None, "quantization__axis": 0},
     "quantization.axis", "a group of a whole column", "`group_size: 64`"),
    ("check_unconverted_modules_exist", {"quantization__modules_to_not_convert": ["c_attn"]},
     "quantization.modules_to_not_convert", "no linear layer `c_attn`", "`self_attn.q_proj`"),
    ("check_unconverted_modules_exist", {"quantization__modules_to_not_convert": ["lm_head"]},
     "quantization.modules_to_not_convert", "`lm_head` to quantize", "head is never quantized"),
    ("check_unconverted_modules_differ",
     {"quantization__modules_to_not_convert": ["o_proj", "o_proj"]},
     "quantization.modules_to_not_convert", "names `o_proj` twice", "delete"),
    ("check_targets_not_empty", {"adapter__target_modules": []},
     "adapter.target_modules", "nothing would be trained", "all-linear"),
    ("check_targets_differ", {"adapter__target_modules": ["q_proj", "q_proj"]},
     "adapter.target_modules", "names `q_proj` twice", "delete"),
    ("check_targets_differ", {"adapter__modules_to_save": ["lm_head", "lm_head"]},
     "adapter.modules_to_save", "names `lm_head` twice", "delete"),
    ("check_targets_differ",
     {"adapter__modules_to_save": ["q_proj"], "adapter__target_modules": ["q_proj", "v_proj"]},
     "adapter.modules_to_save", "`q_proj`, which `target_modules` names too", "delete one"),
    ("check_target_pattern", {"adapter__target_modules": "q_proj"},
     "adapter.target_modules", "names have dots", "`[q_proj]`"),
    ("check_target_pattern", {"adapter__target_modules": "(q_proj"},
     "adapter.target_modules", "is no regular expression", "a list of names"),
    ("check_init_keeps_base", {"adapter__init": "pissa"},
     "adapter.init", "quantizes to other weights", "`quantization: {kind: none}`"),
    ("check_init_keeps_base",
     {"adapter__kind": "dora", "adapter__init": "olora", "quantization__kind": "none"},
     "adapter.init", "does not work with `kind: dora`", "`kind: lora`"),
    ("check_targets_exist", {"adapter__target_modules": ["q_proj", "query_key_value"]},
     "adapter.target_modules", "no linear layer `query_key_value`", "`mlp.down_proj`"),
    ("check_new_layers_given", PRO, "adapter", "needs `num_new_layers`", "num_new_layers: 4"),
    ("check_new_layers_given",
     {**PRO, "adapter__num_new_layers": 4, "adapter__expansion_rate": 0.5},
     "adapter.expansion_rate", "has both", "delete"),
    ("check_new_layers_divide", {**PRO, "adapter__num_new_layers": 5},
     "adapter.num_new_layers", "evenly over the model's 32", "`1`, `2`, `4`, `8`, `16` or `32`"),
    ("check_new_layers_divide", {**PRO, "adapter__expansion_rate": 0.1},
     "adapter.expansion_rate", "is 0.1, which does not spread", "`0.125`"),
    ("check_strategy_has_ranks", {"fsdp__strategy": "ddp", "launch__nproc_per_node": 1},
     "fsdp.strategy", "`fsdp.strategy: ddp` has no effect with one rank", "nproc_per_node"),
    ("check_shard_size_used", {"fsdp__shard_size": 2},
     "fsdp.shard_size", "no effect with `fsdp.strategy: full_shard`", "hybrid_full_shard"),
    ("check_shard_size_divides",
     {"fsdp__strategy": "hybrid_full_shard", "fsdp__shard_size": 3, "launch__nproc_per_node": 8},
     "fsdp.shard_size", "is 3, which does not divide 8 ranks", "2, 4"),
    ("check_shard_size_divides",
     {"fsdp__strategy": "hybrid_full_shard", "fsdp__shard_size": 4, "launch__nproc_per_node": 2,
      "launch__nnodes": "3:4", "launch__rdzv_endpoint": "10.0.0.1:29500"},
     "fsdp.shard_size", "is 4, which does not divide 6 ranks", "2, 3"),
    ("check_hybrid_has_groups",
     {"fsdp__strategy": "hybrid_full_shard", "fsdp__shard_size": 8, "launch__nproc_per_node": 8},
     "fsdp.strategy", "one group of 8 ranks, which is `full_shard`", "`strategy: full_shard`"),
    ("check_hybrid_has_groups",
     {"fsdp__strategy": "hybrid_shard_grad_op", "launch__nproc_per_node": 2},
     "fsdp.strategy", "two groups of two ranks, and there are 2", "shard_grad_op"),
    ("check_offloaded_activations_exist",
     {"fsdp__activation_offload": True, "fsdp__activation_checkpointing": "none"},
     "fsdp.activation_offload", "with `activation_checkpointing: none`", "full"),
    ("check_kept_weights_are_few", {"fsdp__offload_trained": False},
     "fsdp.offload_trained", "has no effect with `fsdp.offload: none`", "`offload: cpu`"),
    ("check_kept_weights_are_few",
     {**FULL, "fsdp__offload": "cpu", "fsdp__offload_trained": False},
     "fsdp.offload_trained", "leaves nothing to `offload: cpu`", "`offload: none`"),
    ("check_disk_holds_frozen_weights", {**FULL, "fsdp__offload": "disk"},
     "fsdp.offload", "`adapter.kind: none` has none", "offload: cpu"),
    ("check_disk_maps_a_base", {"fsdp__offload": "disk", "quantization__cache": False},
     "quantization.cache", "maps the quantized base of the cache", "offload: cpu"),
    ("check_one_data_source", {"data__dataset": None}, "data", "needs `path` or `dataset`", "add"),
    ("check_one_data_source", {"data__path": "rows.jsonl"}, "data.dataset", "has both", "delete"),
    ("check_one_data_source", {"data__format": "dummy"},
     "data.dataset", "no effect with `data.format: dummy`", "delete `dataset`"),
    ("check_data_path_exists", {"data__path": "no.jsonl"}, "data.path", "there is no file", "dir"),
    ("check_hub_settings_used", {"data__split": "test"},
     "data.split", "on a `pypi:` dataset", "delete `split`"),
    ("check_hub_settings_used", {"data__dataset": None, "data__path": "a", "data__revision": "b"},
     "data.revision", "with `path`", "delete `revision`"),
    ("check_hub_settings_used", {"data__dataset": None, "data__path": "a", "data__split": "test"},
     "data.split", "rows of files are all `train`", "only a directory has other splits"),
    ("check_hub_settings_used", {**MIXED, "data__eval": {"path": "a", "config": "b"}},
     "data.eval.config", "with `path`", "delete `config`"),
    ("check_one_data_source", {"data__dataset": None, "data__mixture": [{"path": "a"}, {}]},
     "data.mixture.1", "needs `path` or `dataset`", "add"),
    ("check_one_data_source", {"data__mixture": [{"path": "a"}]},
     "data.mixture", "`data` has both `dataset` and `mixture`", "`data.mixture=null`"),
    ("check_one_data_source", {"data__eval": {"path": "a", "dataset": "b/c"}},
     "data.eval.dataset", "`data.eval` has both `path` and `dataset`", "delete"),
    ("check_one_data_source", {"data__dataset": None, "data__mixture": [{"format": "dummy"}]},
     "data.mixture.0.format", "made-up rows are no source", "alone"),
    ("check_mixture_parts_say_it", {**MIXED, "data__max_rows": 5},
     "data.max_rows", "beside `mixture`", "move `max_rows` into the parts"),
    ("check_mixture_parts_say_it", {**MIXED, "data__format": "text"},
     "data.format", "beside `mixture`", "move `format` into the parts"),
    ("check_weights",
     {"data__mixture": [{"path": "a", "weight": 1}, {"path": "b"}], "data__dataset": None},
     "data.mixture.1", "has no `weight`, and other parts have", "every part a weight, or none"),
    ("check_weights", {**MIXED, "data__mixture_stopping": "all_exhausted"},
     "data.mixture_stopping", "without weights in a `mixture`", "delete"),
    ("check_data_path_exists", {"data__dataset": None, "data__mixture": [{"path": "no.csv"}]},
     "data.mixture.0.path", "there is no file", "dir"),
    ("check_data_path_exists", {"data__dataset": None, "data__path": [".", "no*.csv"]},
     "data.path.1", "no file matches", "dir"),
    ("check_columns_used", {"data__format": "dummy", "data__columns": {"text": "a"}},
     "data.columns", "no effect with `data.format: dummy`", "delete"),
    ("check_one_source_of_held_out_rows",
     {"data__eval": {"path": "a"}, "data__eval_fraction": 0.1},
     "data.eval_fraction", "has both `eval` and `eval_fraction`", "delete one"),
    ("check_bad_rows_exist", {"data__format": "dummy", "data__on_bad_row": "skip"},
     "data.on_bad_row", "no effect with `data.format: dummy`", "delete"),
    ("check_truncation_used", {"data__format": "dummy", "data__truncation": "drop"},
     "data.truncation", "each row has `seq_len` tokens", "delete"),
    ("check_truncation_used", {"data__format": "dummy", "data__packing": "best_fit"},
     "data.packing", "each row has `seq_len` tokens", "delete"),
    ("check_chat_template", {"data__chat_template": "chatlm"},
     "data.chat_template", "`data.chat_template: chatlm` is no template", "mean `chatml`?"),
    ("check_chat_template", {"data__chat_template": "mine.jinja"},
     "data.chat_template", "there is no file `mine.jinja`", "the recipe's directory"),
    ("check_turns_exist", {"data__format": "text", "data__chat_template": "chatml"},
     "data.chat_template", "its rows have no turns", "delete `chat_template`"),
    ("check_turns_exist", {"data__train_on_prompt": True, "data__turns_to_train": "last"},
     "data.turns_to_train", "every turn is trained", "delete `turns_to_train`"),
    ("check_several_turns", {"data__format": "alpaca", "data__turns_to_train": "last"},
     "data.turns_to_train", "its rows have one answer", "delete `turns_to_train`"),
    ("check_several_turns", {"data__format": "qna", "data__train_on_eos": "last"},
     "data.train_on_eos", "its rows have one answer", "delete `train_on_eos`"),
    ("check_roles_exist", {"data__format": "guanaco", "data__roles_to_train": ["user", "tool"]},
     "data.roles_to_train", "rows of `guanaco` have no role `tool`", "delete `tool`"),
    ("check_end_marks_exist", {"data__format": "dummy", "data__train_on_eos": "none"},
     "data.train_on_eos", "nothing is added to its rows", "delete `train_on_eos`"),
    ("check_end_marks_exist", {"data__format": "text", "data__train_on_eos": "last"},
     "data.train_on_eos", "its rows have one end", "delete `train_on_eos`"),
    ("check_prompts_exist", {"data__format": "text", "data__train_on_prompt": True},
     "data.train_on_prompt", "its rows have no prompt", "delete"),
    ("check_columns_of_format", {"data__format": "alpaca", "data__columns": {"outputt": "o"}},
     "data.columns.outputt", "`alpaca` has no column `outputt`", "did you mean `output`?"),
    ("check_columns_of_format", {"data__format": "qna_no_ctx", "data__columns": {"q": "question"}},
     "data.columns.q", "`qna_no_ctx` has no column `q`", "`question: q`"),
    ("check_columns_of_format", {"data__format": "text", "data__columns": {"zz": "o"}},
     "data.columns.zz", "`text` has no column `zz`", "its columns are `text`"),
    ("check_columns_of_format", {"data__format": "auto", "data__columns": {"zz": "o"}},
     "data.columns.zz", "no format has a column `zz`", "`messages`"),
    ("check_columns_of_one_format",
     {"data__format": "auto", "data__columns": {"text": "a", "answer": "b"}},
     "data.columns", "no format has the columns `text` and `answer` together", "`format`"),
    ("check_one_batch_size",
     {"training__global_batch_size": 8, "training__gradient_accumulation_steps": 2},
     "training.gradient_accumulation_steps", "has both", "null"),
    ("check_batch_divides", {"training__global_batch_size": 16, "launch__nproc_per_node": 3},
     "training.global_batch_size", "does not divide into 3 ranks", "use 15 or 18"),
    ("check_batch_divides",
     {"training__global_batch_size": 24, "launch__nproc_per_node": 2,
      "training__micro_batch_size": 8},
     "training.global_batch_size", "is 12 rows on each of 2 ranks",
     "16 or 32, or `micro_batch_size: 6`"),
    ("check_micro_batch_is_filled",
     {"training__global_batch_size": 8, "training__micro_batch_size": 16},
     "training.micro_batch_size", "a step has 8 rows", "`micro_batch_size: 8`"),
    ("check_layer_chunks_divide", {"training__layer_chunks": 3},
     "training.layer_chunks", "`micro_batch_size: 4`", "1, 2, 4"),
    ("check_no_sync_used", {"fsdp__no_sync": True, "launch__nproc_per_node": 1},
     "fsdp.no_sync", "with one rank", "delete"),
    ("check_no_sync_used", {"fsdp__no_sync": True, "training__gradient_accumulation_steps": 1},
     "fsdp.no_sync", "with one micro-batch a step", "training.micro_batch_size"),
    ("check_no_sync_used",
     {"fsdp__no_sync": True, "training__global_batch_size": 8, "launch__nproc_per_node": 2},
     "fsdp.no_sync", "with one micro-batch a step", "training.micro_batch_size"),
    ("check_one_duration", {"training__steps": 5, "training__epochs": 1},
     "training.epochs", "has both", "null"),
    ("check_one_warmup", {"lr_scheduler__warmup_steps": 5, "lr_scheduler__warmup_ratio": 0.1},
     "lr_scheduler.warmup_ratio", "has both", "null"),
    ("check_warmup_fits", {"training__steps": 40, "lr_scheduler__warmup_steps": 40},
     "lr_scheduler.warmup_steps", "is 40 and `training.steps` is 40", "about 4 steps"),
    ("check_warmup_fits", {"training__steps": 10, "lr_scheduler__warmup_ratio": 0.95},
     "lr_scheduler.warmup_ratio", "is all of 10 steps", "lower it"),
    ("check_schedule_moves", {"lr_scheduler__min_lr_ratio": 1},
     "lr_scheduler.min_lr_ratio", "`lr_scheduler.kind: cosine` has no effect", "constant"),
    ("check_schedule_moves", {**WSD, "lr_scheduler__min_lr_ratio": 1},
     "lr_scheduler.min_lr_ratio", "`lr_scheduler.kind: wsd` has no effect", "constant"),
    ("check_one_decay",
     {**WSD, "lr_scheduler__decay_steps": 5, "lr_scheduler__decay_ratio": 0.1},
     "lr_scheduler.decay_ratio", "has both", "null"),
    ("check_decay_fits",
     {**WSD, "lr_scheduler__decay_steps": 35, "lr_scheduler__warmup_steps": 10,
      "training__steps": 40},
     "lr_scheduler.decay_steps", "warms up for 10 steps and decays for 35", "room for 30 steps"),
    ("check_decay_fits",
     {**WSD, "lr_scheduler__decay_ratio": 0.9, "lr_scheduler__warmup_steps": 10,
      "training__steps": 40},
     "lr_scheduler.decay_ratio", "`training.steps` is 40", "lower `decay_ratio`"),
    ("check_lora_plus_used", {**PRO, "optimizer__lora_plus_ratio": 16},
     "optimizer.lora_plus_ratio", "with `adapter.kind: llama_pro`", "delete"),
    ("check_nesterov_has_momentum", {"optimizer__kind": "sgd", "optimizer__nesterov": True},
     "optimizer.nesterov", "without `momentum`", "momentum: 0.9"),
    ("check_stream_has_steps", {"data__streaming": True},
     "data.streaming", "needs `training.steps`", "add `steps: 1000`"),
    ("check_stream_has_steps", {"data__streaming": True, "training__epochs": 2},
     "data.streaming", "is known at its end only", "and delete `epochs`"),
    ("check_stream_holds_nothing_out", {**STREAM, "data__eval_fraction": 0.1},
     "data.eval_fraction", "cannot be held out of rows that are streamed", "`data.eval`"),
    ("check_stream_settings_used", {"data__stream_window": 5000},
     "data.stream_window", "has no effect without `data.streaming`", "delete `stream_window`"),
    ("check_stream_settings_used",
     {**STREAM, "data__format": "dummy", "data__dataset": None},
     "data.streaming", "with `data.format: dummy`", "delete `streaming`"),
    ("check_eval_has_rows", {"training__eval_interval": 5},
     "training.eval_interval", "`data.eval_fraction` is 0", "eval_fraction: 0.1"),
    ("check_intervals_end", {"training__steps": 10, "checkpoint__interval": 11},
     "checkpoint.interval", "never comes: the run has 10 steps", "10 or less"),
    ("check_intervals_end", {"training__steps": 10, "metrics__log_interval": 100},
     "metrics.log_interval", "never comes", "10 or less"),
    ("check_export_fits_adapter", {**PRO, "export__format": "peft"},
     "export.format", "`adapter.kind` is `llama_pro`", "format: transformers"),
    ("check_export_fits_adapter", {"export__format": "transformers"},
     "export.format", "`adapter.kind` is `lora`", "merge: true"),
    ("check_export_fits_adapter", {**FULL, "export__format": "delta"},
     "export.format", "`adapter.kind` is `none`", "format: transformers"),
    ("check_merge_has_adapter", {**FULL, "export__merge": True},
     "export.merge", "with `adapter.kind: none`", "delete"),
    ("check_merge_settings_used", {"export__merge_requantize": "nf4"},
     "export.merge_requantize", "without `export.merge`", "merge: true"),
    ("check_merge_settings_used", {"quantization__kind": "none", "export__merge": True,
                                   "export__merge_onto": "original"},
     "export.merge_onto", "only the original weights", "delete"),
    ("check_best_is_evaluated", {"checkpoint__keep_best": True, "data__eval_fraction": 0.1},
     "checkpoint.keep_best", "without `training.eval_interval`", "eval_interval: 100"),
    ("check_keep_last_used", {"checkpoint__keep_last": 3, "checkpoint__interval_minutes": None},
     "checkpoint.keep_last", "without `checkpoint.interval`", "interval: 100"),
    ("check_tasks_differ", {"evaluation__tasks": ["arc_easy", "arc_easy"]},
     "evaluation.tasks", "names `arc_easy` twice", "delete"),
    ("check_tasks_are_named", {"evaluation__limit": 5},
     "evaluation.limit", "without `evaluation.tasks`", "add `tasks"),
    ("check_sinks_differ", {"metrics__sinks": ["jsonl", "jsonl"]},
     "metrics.sinks", "names `jsonl` twice", "delete"),
    ("check_wandb_has_project", WANDB, "metrics.sinks", "needs `metrics.wandb.project`", "add"),
    ("check_wandb_used", {"metrics__wandb": {"project": "p"}},
     "metrics.wandb.project", "`wandb` is not in `metrics.sinks`", "add it"),
    ("check_profile_ends", {"metrics__profile": {"start_step": 9}, "training__steps": 9},
     "metrics.profile", "traces steps 9 to 10, and the run has 9", "start_step"),
    ("check_sample_length_used", {"metrics__sample_max_new_tokens": 9},
     "metrics.sample_max_new_tokens", "without `sample_prompts`", "add a prompt"),
    ("check_port_exists", {"launch__rdzv_endpoint": "a:70000"},
     "launch.rdzv_endpoint", "no port from 1 to 65535", "delete"),
    ("check_machines_meet", {"launch__nnodes": 2},
     "launch.nnodes", "needs `launch.rdzv_endpoint`", "rdzv_endpoint: 10.0.0.1:29500"),
    ("check_machines_meet", {"launch__nnodes": 2, "launch__rdzv_endpoint": "localhost:29500"},
     "launch.rdzv_endpoint", "another machine on each of 2", "rdzv_endpoint: 10.0.0.1:29500"),
    ("check_range_of_machines", {"launch__nnodes": "4:2", "launch__rdzv_endpoint": "10.0.0.1:9"},
     "launch.nnodes", "starts with 4 machines at least and 2 at most", "`nnodes: 2:4`"),
    ("check_waiting_used", {"launch__node_timeout_s": 5.0},
     "launch.node_timeout_s", "has no effect with one machine", "delete"),
    ("check_slurm_chooses_the_endpoint",
     {"launch__scheduler": "slurm", "launch__rdzv_endpoint": "a:29500"},
     "launch.rdzv_endpoint", "with `scheduler: slurm`", "delete"),
    ("check_slurm_settings_used", {"launch__slurm": {"partition": "gpu"}},
     "launch.slurm.partition", "has no effect with `launch.scheduler: local`", "scheduler: slurm"),
    ("check_slurm_gives_gpus", {"launch__scheduler": "slurm"},
     "launch.slurm.gpus_per_node", "nothing says how many GPUs", "`launch.device: cpu`"),
    ("check_slurm_gives_gpus",
     {"launch__scheduler": "slurm", "launch__nproc_per_node": 4,
      "launch__slurm": {"gpus_per_node": 2}},
     "launch.slurm.gpus_per_node", "`launch.nproc_per_node: 4` is more than", "every rank"),
    ("check_slurm_gives_gpus",
     {"launch__scheduler": "slurm", "launch__device": "cpu",
      "launch__slurm": {"gpus_per_node": 2}},
     "launch.slurm.gpus_per_node", "has no effect with `device: cpu`", "delete it"),
    ("check_slurm_time_for_saving",
     {"launch__scheduler": "slurm", "launch__device": "cpu", "launch__slurm": {"time_minutes": 2}},
     "launch.slurm.signal_lead_s", "is no less than `time_minutes: 2`", "time_minutes"),
    ("check_plan_check_used", {"launch__device": "cpu", "launch__plan_check": False},
     "launch.plan_check", "has no effect with `device: cpu`", "delete `plan_check`"),
]  # fmt: skip

FINE: list[tuple[str, dict[str, Any]]] = [
    ("check_plan_check_used", {"launch__plan_check": False}),
    ("check_slurm_settings_used",
     {"launch__scheduler": "slurm", "launch__nproc_per_node": 2,
      "launch__slurm": {"partition": "gpu"}}),
    ("check_slurm_gives_gpus", {"launch__scheduler": "slurm", "launch__nproc_per_node": 2}),
    ("check_slurm_gives_gpus",
     {"launch__scheduler": "slurm", "launch__slurm": {"gpus_per_node": 2}}),
    ("check_slurm_gives_gpus", {"launch__scheduler": "slurm", "launch__device": "cpu"}),
    ("check_slurm_time_for_saving",
     {"launch__scheduler": "slurm", "launch__device": "cpu", "launch__slurm": {"time_minutes": 3}}),
    ("check_model_revision_used", {"model__revision": "main"}),
    ("check_seq_len_fits", {"data__seq_len": 4096}),
    ("check_seq_len_fits", {"model__name_or_path": "nobody/knows", "data__seq_len": 10**6}),
    ("check_dtype_agrees", {"model__dtype": "fp32", "fsdp__precision": "fp16_autocast"}),
    ("check_dtype_agrees", {"model__dtype": "fp32", "fsdp__precision": {"compute": "bf16"}}),
    ("check_dtype_agrees", {"model__dtype": "fp16", "fsdp__precision": {"reduce": "bf16"}}),
    ("check_param_trains", {"fsdp__precision": {"param": "bf16", "compute": "fp32"}}),
    ("check_buffers_meet_compute",
     {"fsdp__precision": {"buffers": "bf16"}, "model__dtype": "bf16"}),
    ("check_buffers_meet_compute", {"fsdp__precision": {"buffers": "fp32", "compute": "bf16"}}),
    ("check_reduce_sends", {"fsdp__precision": {"reduce": "bf16"}}),
    ("check_flash_attention_runs",
     {**FLASH, "model__dtype": "fp32", "fsdp__precision": "bf16_autocast"}),
    ("check_liger_kernel_runs", {**LIGER, "launch__device": "cuda"}),
    ("check_liger_kernel_used", {**LIGER, "model__name_or_path": "nobody/knows"}),
    ("check_architecture_has_attention", {**GEMMA2, "model__attn_implementation": "eager"}),
    ("check_flex_attention_runs_whole",
     {"model__attn_implementation": "flex_attention", "training__layer_chunks": 1}),
    ("check_packed_rows_stay_apart", {"data__packing": "best_fit"}),
    ("check_packed_rows_stay_apart", {**FALCON, "data__packing": "best_fit"}),
    ("check_packed_rows_stay_apart",
     {**FLASH, "data__packing": "best_fit"}),
    ("check_packed_rows_stay_apart",
     {**FLASH, "data__packing": "best_fit", "training__layer_chunks": 4}),
    ("check_base_can_be_trained", FULL),
    ("check_hqq_groups_fit", {**HQQ, "quantization__group_size": 256}),
    ("check_hqq_groups_fit", {**HQQ, "quantization__nbits": 3, "quantization__group_size": None}),
    ("check_hqq_groups_fit", {**SMOLLM, "quantization__block_size": 128}),
    ("check_hqq_groups_fit", {**HQQ, "quantization__group_size": 64, "quantization__axis": 0}),
    ("check_hqq_columns_have_groups",
     {**HQQ, "quantization__group_size": None, "quantization__axis": 1}),
    ("check_unconverted_modules_exist", {"quantization__modules_to_not_convert": ["o_proj"]}),
    ("check_targets_exist", {"adapter__target_modules": ["mlp.down_proj", "q_proj"]}),
    ("check_target_pattern", {"adapter__target_modules": ".*[qv]_proj"}),
    ("check_init_keeps_base", {"adapter__init": "gaussian"}),
    ("check_init_keeps_base", {"adapter__init": "pissa", "quantization__kind": "none"}),
    ("check_new_layers_divide", {**PRO, "adapter__expansion_rate": 0.25}),
    ("check_new_layers_divide", {**PRO, "adapter__num_new_layers": 8}),
    ("check_strategy_has_ranks", {"fsdp__strategy": "ddp"}),
    ("check_strategy_has_ranks", {"launch__nproc_per_node": 1}),
    ("check_strategy_has_ranks",
     {"fsdp__strategy": "ddp", "launch__nproc_per_node": 1, "launch__nnodes": 2}),
    ("check_shard_size_divides",
     {"fsdp__strategy": "hybrid_full_shard", "fsdp__shard_size": 4, "launch__nproc_per_node": 8}),
    ("check_hybrid_has_groups", {"fsdp__strategy": "hybrid_full_shard"}),
    ("check_hybrid_has_groups",
     {"fsdp__strategy": "hybrid_full_shard", "launch__nproc_per_node": 4}),
    ("check_kept_weights_are_few", {"fsdp__offload": "cpu", "fsdp__offload_trained": False}),
    ("check_kept_weights_are_few",
     {**PRO, "fsdp__offload": "disk", "fsdp__offload_trained": False}),
    ("check_kept_weights_are_few", {**FULL, "fsdp__offload": "cpu"}),
    ("check_one_data_source", {"data__dataset": None, "data__format": "dummy"}),
    ("check_one_data_source", MIXED),
    ("check_hub_settings_used",
     {"data__dataset": "org/name", "data__split": "test", "data__config": "en"}),
    ("check_hub_settings_used", {"data__split": "train[:5]"}),
    ("check_hub_settings_used", {"data__dataset": None, "data__path": ".", "data__split": "test"}),
    ("check_data_path_exists", {"data__dataset": None, "data__path": ["*", "."]}),
    ("check_weights", {"data__mixture": [{"path": "a", "weight": 1}, {"path": "b", "weight": 2}],
     "data__mixture_stopping": "all_exhausted"}),
    ("check_eval_has_rows", {"data__eval": {"path": "a"}, "training__eval_interval": 5}),
    ("check_chat_template", {"data__chat_template": "none"}),
    ("check_chat_template", {"data__chat_template": "llama3"}),
    ("check_turns_exist", {"data__chat_template": "chatml", "data__turns_to_train": "last"}),
    ("check_several_turns", {"data__format": "alpaca", "data__train_on_eos": "none"}),
    ("check_roles_exist", {"data__format": "messages", "data__roles_to_train": ["tool"]}),
    ("check_end_marks_exist", {"data__format": "text", "data__train_on_eos": "none"}),
    ("check_prompts_exist", {"data__train_on_prompt": True}),
    ("check_columns_of_format",
     {"data__format": "messages", "data__columns": {"messages.role": "who", "messages": "chat"}}),
    ("check_columns_of_one_format",
     {"data__format": "auto", "data__columns": {"question": "q", "answer": "b"}}),
    ("check_batch_divides", {"training__global_batch_size": 16}),
    ("check_batch_divides", {"training__global_batch_size": 8, "launch__nproc_per_node": 4}),
    ("check_batch_divides", {"launch__nproc_per_node": 3}),
    ("check_micro_batch_is_filled", {"training__global_batch_size": 2}),
    ("check_layer_chunks_divide", {"training__layer_chunks": 4}),
    ("check_router_loss_has_routers", {"training__router_aux_loss_coef": 0}),
    ("check_router_loss_has_routers", {"model__name_or_path": "mistralai/Mixtral-8x7B-v0.1",
     "training__router_aux_loss_coef": 0.02}),
    ("check_router_loss_has_routers",
     {"model__name_or_path": "own/model", "training__router_aux_loss_coef": 0.02}),
    ("check_no_sync_used", {"fsdp__no_sync": True, "training__gradient_accumulation_steps": 2}),
    ("check_warmup_fits", {"training__steps": 1, "lr_scheduler__warmup_ratio": 0}),
    ("check_warmup_fits", {"lr_scheduler__warmup_steps": 10**6}),
    ("check_decay_fits", {**WSD, "training__steps": 1}),
    ("check_decay_fits", {**WSD, "lr_scheduler__decay_ratio": 1, "training__steps": 10}),
    ("check_lora_plus_used", {"optimizer__lora_plus_ratio": 16}),
    ("check_intervals_end", {"training__steps": 10, "checkpoint__interval": 10}),
    ("check_nesterov_has_momentum",
     {"optimizer__kind": "sgd", "optimizer__nesterov": True, "optimizer__momentum": 0.9}),
    ("check_merge_has_adapter", {"export__merge": True}),
    ("check_keep_last_used", {"checkpoint__keep_last": 3, "checkpoint__interval": 5}),
    ("check_tasks_are_named", {"evaluation__tasks": ["arc_easy"], "evaluation__num_fewshot": 2}),
    ("check_wandb_used", {**WANDB, "metrics__wandb": {"project": "p"}}),
    ("check_wandb_has_project", {**WANDB, "metrics__wandb": {"mode": "disabled"}}),
    ("check_profile_ends", {"metrics__profile": {"start_step": 8}, "training__steps": 9}),
    ("check_machines_meet", {"launch__nnodes": 2, "launch__rdzv_endpoint": "10.0.0.1:29500"}),
    ("check_machines_meet", {"launch__nnodes": 2, "launch__scheduler": "slurm"}),
    ("check_range_of_machines",
     {"launch__nnodes": "2:2", "launch__rdzv_endpoint": "10.0.0.1:29500"}),
    ("check_waiting_used", {
        "launch__nnodes": 2, "launch__rdzv_endpoint": "10.0.0.1:9", "launch__join_timeout_s": 9.0,
    }),
]  # fmt: skip


@pytest.mark.parametrize(("rule", "edits", "key", "message", "hint"), CASES)
def test_rule_refuses(rule: str, edits: dict[str, Any], key: str, message: str, hint: str) -> None:
    [problem] = ask(rule, **edits)
    assert problem.key == key
    assert message in problem.message
    assert hint in problem.hint
    assert not problem.message.endswith(".")


@pytest.mark.parametrize(("rule", "edits"), FINE)
def test_rule_lets_through(rule: str, edits: dict[str, Any]) -> None:
    assert ask(rule, **edits) == []


def test_every_rule_has_a_case() -> None:
    tested = {case[0] for case in CASES}
    elsewhere = {
        "check_flash_attention_head_size",
        "check_dataset_name",
        "check_stored_quantization_agrees",
    }
    assert set(RULES) - tested == elsewhere & set(RULES)
    assert len(RULES) >= 30


def test_rules_are_all_listed_and_named_once() -> None:
    modules = [value for value in vars(checks).values() if hasattr(value, "CHECKS")]
    written = [
        value
        for module in modules
        for name, value in vars(module).items()
        if name.startswith("check_") and value.__module__ == module.__name__
    ]
    assert set(written) == set(CHECKS)
    assert len(RULES) == len(CHECKS)


def test_heads_that_flash_attention_cannot_compute_are_refused(tmp_path: Path) -> None:
    config = {
        "model_type": "llama", "num_hidden_layers": 2, "hidden_size": 2048, "vocab_size": 100,
        "intermediate_size": 128, "num_attention_heads": 4, "max_position_embeddings": 4096,
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config))
    local = {"model__name_or_path": "."}
    [problem] = ask("check_flash_attention_head_size", tmp_path, **(FLASH | local))
    assert "heads of at most 256 values, and the model has 512" in problem.message
    assert ask("check_flash_attention_head_size", tmp_path, **local) == []
    (tmp_path / "config.json").write_text(json.dumps(config | {"head_dim": 256}))
    assert ask("check_flash_attention_head_size", tmp_path, **(FLASH | local)) == []


def test_the_config_of_a_local_model_bounds_seq_len(tmp_path: Path) -> None:
    config = {
        "model_type": "llama", "num_hidden_layers": 2, "hidden_size": 64, "vocab_size": 100,
        "intermediate_size": 128, "num_attention_heads": 4, "max_position_embeddings": 256,
    }  # fmt: skip
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "config.json").write_text(json.dumps(config))
    local = {"model__name_or_path": "base"}
    [problem] = ask("check_seq_len_fits", tmp_path, **local, data__seq_len=257)
    assert "257 and the model's context is 256 tokens" in problem.message
    assert ask("check_seq_len_fits", tmp_path, **local, data__seq_len=256) == []
    [problem] = ask("check_model_revision_used", tmp_path, **local, model__revision="main")
    assert "on a model directory" in problem.message


BNB_4BIT = {
    "quant_method": "bitsandbytes",
    "load_in_4bit": True,
    "bnb_4bit_quant_type": "nf4",
    "bnb_4bit_use_double_quant": True,
}


@pytest.mark.parametrize(
    ("stored", "edits", "key", "words"),
    [
        ({"quant_method": "gptq"}, {}, "model.name_or_path", "quantized already, by gptq"),
        (
            {"quant_method": "bitsandbytes", "load_in_8bit": True},
            {},
            "model.name_or_path",
            "8 bits",
        ),
        (BNB_4BIT, {"quantization__kind": "hqq"}, "quantization.kind", "is `hqq`"),
        (BNB_4BIT, {"quantization__quant_type": "fp4"}, "quantization.quant_type", "says `fp4`"),
        (BNB_4BIT, {"quantization__double_quant": False}, "quantization.double_quant", "`false`"),
        (BNB_4BIT, PRO, "adapter.kind", "are quantized already"),
    ],
)
def test_a_quantized_model_directory_must_be_what_the_recipe_says(
    tmp_path: Path, stored: dict[str, Any], edits: dict[str, Any], key: str, words: str
) -> None:
    rule, model = "check_stored_quantization_agrees", {"model__name_or_path": str(tmp_path)}
    assert ask(rule, **model, **edits) == []
    config = tmp_path / "config.json"
    config.write_text(json.dumps({"quantization_config": stored}))
    [problem] = ask(rule, **model, **edits)
    assert problem.key == key
    assert words in problem.message
    assert problem.hint
    config.write_text(json.dumps({"quantization_config": BNB_4BIT}))
    assert ask(rule, **model) == []


def test_no_rule_minds_the_smallest_recipe() -> None:
    small = recipe()
    assert [problem for check in CHECKS for problem in check(small, Path())] == []
    assert [notice for note in NOTICES for notice in note(small, Path())] == []


def test_a_recipe_that_spells_out_its_defaults_is_as_good() -> None:
    from yaml import safe_load

    whole = Recipe.model_validate(safe_load(dump_recipe(recipe())))
    assert [problem for check in CHECKS for problem in check(whole, Path())] == []


def test_dora_says_what_a_large_rank_costs() -> None:
    dora = {"adapter__kind": "dora", "adapter__rank": 64}
    [notice] = adapter.note_dora_cost(recipe(**dora, training__micro_batch_size=1), Path())
    assert "for 64 more tokens than lora would, beside the 512 of a micro-batch" in notice
    assert list(adapter.note_dora_cost(recipe(**dora), Path())) == []
    lora = recipe(adapter__rank=64, training__micro_batch_size=1)
    assert list(adapter.note_dora_cost(lora, Path())) == []


def test_chunks_of_unpacked_rows_are_said_to_be_padded() -> None:
    [notice] = batch.note_chunks_are_padded(recipe(training__layer_chunks=2), Path())
    assert "the longest of 4 in a micro-batch" in notice
    assert list(batch.note_chunks_are_padded(recipe(), Path())) == []
    packed = recipe(training__layer_chunks=2, data__packing="best_fit")
    assert list(batch.note_chunks_are_padded(packed, Path())) == []


def test_restarts_without_checkpoints_are_mentioned() -> None:
    never = {"launch__max_restarts": 1, "checkpoint__interval_minutes": None}
    [notice] = output.note_restarts_from_zero(recipe(**never), Path())
    assert "step 1" in notice
    kept = recipe(**never, checkpoint__interval=5)
    assert list(output.note_restarts_from_zero(kept, Path())) == []
