"""accelerate's YAML, beside a config of LLaMA-Factory or TRL: ranks, sharding, precision."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from fsdpq.importing import known_keys
from fsdpq.importing.draft import Always, Draft, Lost, Part, Rule, Table, With
from fsdpq.importing.huggingface import BY_ITSELF, FSDP_CONFIG
from fsdpq.importing.values import mapping, text, whole
from fsdpq.recipe.source import Source

REFUSED = "accelerate does not know it and refuses the file"
DROPPED = "accelerate does not know it and drops it in silence"

FSDP = Table(
    {f"fsdp_{key.removeprefix('fsdp_')}": rule for key, rule in FSDP_CONFIG.items()},
    known_keys.ACCELERATE_FSDP, DROPPED, {},
)  # fmt: skip


def _read_dynamo(draft: Draft, key: str, value: Any) -> None:
    backend = text(mapping(value).get("dynamo_backend", "NO")).upper()
    draft.put("training.compile", backend != "NO", key=key)
    note = "" if backend in ("NO", "INDUCTOR") else "layers are compiled by inductor"
    draft.note("assumed" if note else "converted", key, note, target="training.compile")


RULES: Mapping[str, Rule] = {
    "distributed_type": Part("fsdp.strategy"),
    "fsdp_config": FSDP,
    "mixed_precision": Part("model.dtype"),
    "num_processes": Part("launch.nproc_per_node"),
    "num_machines": Part("launch.nnodes"),
    "main_process_ip": Part("launch.rdzv_endpoint"),
    "main_process_port": Part("launch.rdzv_endpoint"),
    "use_cpu": Part("launch.device"),
    "deepspeed_config": Lost("`fsdp.strategy: full_shard` shards as its stage 3 does"),
    "dynamo_config": With("training.compile", _read_dynamo),
    "gpu_ids": Lost("set `CUDA_VISIBLE_DEVICES` where you start the run"),
    **dict.fromkeys(
        ("compute_environment", "debug", "downcast_bf16", "enable_cpu_affinity", "machine_rank",
         "main_training_function", "rdzv_backend", "same_network", "tpu_env", "tpu_use_cluster",
         "tpu_use_sudo", "command_file", "commands"),
        Always(BY_ITSELF),
    ),
}  # fmt: skip

ACCELERATE = Table(RULES, known_keys.ACCELERATE, REFUSED, {})


def merge_accelerate(draft: Draft, extra: Source) -> None:
    """Adds what the accelerate config ``extra`` says to ``draft``; with findings of its own."""
    other = Draft("accelerate", extra.data, extra.marks)
    for problem in extra.problems:
        other.report_problem(problem)
    other.document = draft.document
    ACCELERATE.apply(other, "", extra.data)
    _assemble(other)
    other.settle()
    draft.origins.update({t: f"accelerate.{key}" for t, key in other.origins.items()})
    draft.findings += [replace(f, key=f"accelerate.{f.key}") for f in other.findings]


def _assemble(draft: Draft) -> None:
    kind = draft.read("distributed_type", text, "NO").upper()
    if kind == "MULTI_GPU":
        draft.put("fsdp.strategy", "ddp", key="distributed_type")
    elif kind == "FSDP" and not draft.has("fsdp.strategy"):
        draft.put("fsdp.strategy", "full_shard", key="distributed_type")
    elif kind not in ("FSDP", "NO"):
        why = "`fsdp.strategy: full_shard` shards as DeepSpeed's stage 3 does"
        draft.note("no_counterpart", "distributed_type", why)
    precision = str(draft.get("mixed_precision") or "no").lower()
    if precision in ("bf16", "fp16"):
        draft.put("model.dtype", precision, key="mixed_precision")
    elif precision == "fp8":
        draft.note("no_counterpart", "mixed_precision", "arithmetic is in 16 or 32 bits")
    machines = assemble_ranks(draft)
    address, port = draft.get("main_process_ip"), draft.get("main_process_port")
    if machines > 1 and address and port:
        draft.put("launch.rdzv_endpoint", f"{address}:{port}", key="main_process_ip")
    if draft.on("use_cpu"):
        draft.put("launch.device", "cpu", key="use_cpu")


def assemble_ranks(draft: Draft) -> int:
    """Fills ``launch`` from ``num_processes``, those of all machines; returns the machines."""
    machines = draft.read("num_machines", whole, 1)
    processes = draft.read("num_processes", whole)
    if processes and machines and processes % machines == 0:
        draft.put("launch.nproc_per_node", processes // machines, key="num_processes")
    if machines > 1:
        draft.put("launch.nnodes", machines, key="num_machines")
    return machines
